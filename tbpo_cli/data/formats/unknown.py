"""What is said of rows of no known format, and of [data.columns] that name what is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from tbpo_cli.data.sources import Row
from tbpo_cli.errors import TbpoError

# Words in the names of columns, by what such a column may be.
LIKELY = {
    "rejected": ("reject", "worse", "bad", "lose", "loser", "negative", "dispreferred", "_b", "_l"),
    "chosen": ("chosen", "better", "good", "win", "positive", "prefer", "accept", "_a", "_w"),
    "prompt": ("prompt", "question", "instruction", "query", "input", "problem", "request", "user"),
    "completion": ("completion", "answer", "response", "output", "target", "text", "solution"),
}
PROMPT_ALONE = {"prompt", "system", "tools", "id"}  # columns of a row without answers
SIDES = ("prompt", "chosen", "rejected", "completion")
SHOWN = 40  # characters of a value


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The name that is most like another one; "" if none is."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), "")


def unknown_rows(row: Row, formats: str) -> TbpoError:
    """Rows of no known format: what is in them, and the lines that would name their columns."""
    what = "the rows have none of the known formats"
    place = f"{row.source}, row {row.number}"
    if not isinstance(row.content, dict):
        kind = type(row.content).__name__
        return TbpoError(
            what,
            f"{place}; its columns: none, it is {kind}",
            formats,
            'write each row as a table of columns, e.g. {"prompt": …, "chosen": …, "rejected": …}',
        )
    if row.content.keys() <= PROMPT_ALONE and isinstance(row.content.get("prompt"), str | list):
        what, expected = (
            "the rows are prompts without answers",
            "answers, or a judge of the own ones",
        )
        fix = "add the tables [judge] and [rounds]: the policy then answers them itself"
        return TbpoError(what, place, expected, fix)
    numbers = [name for name in SIDES if isinstance(row.content.get(name), int | float)]
    if numbers:
        what = f"the column {numbers[0]} holds numbers, not text"
    columns = ", ".join(f"{name} ({_seen(value)})" for name, value in row.content.items())
    guess = _guess(row.content)
    lines = "\n    ".join(f'{ours} = "{theirs}"' for ours, theirs in guess.items())
    fix = f"name the columns, for example\n    [data.columns]\n    {lines}"
    return TbpoError(what, f"{place}; its columns: {columns}", formats, fix)


def _seen(value: Any) -> str:
    """A value in a few words: what kind it is, and how it begins."""
    if isinstance(value, str):
        return repr(value[:SHOWN] + ("…" if len(value) > SHOWN else ""))
    if isinstance(value, list):
        inside = f" of {_seen(value[0])}" if value else ""
        return f"a list{inside}"
    if isinstance(value, dict):
        return f"a table of {', '.join(map(str, list(value)[:5]))}"
    return repr(value) if value is not None else "null"


def _guess(content: dict[str, Any]) -> dict[str, str]:
    """Our names of columns → those of a row that may be meant: by their names, then in order."""
    left = [name for name, value in content.items() if isinstance(value, str | list)]
    found: dict[str, str] = {}
    for ours, words in LIKELY.items():
        theirs = next((name for name in left if any(word in name.lower() for word in words)), "")
        if theirs and not (ours == "completion" and {"chosen", "rejected"} & found.keys()):
            found[ours] = theirs
            left.remove(theirs)
    sides = ("prompt", "completion") if "completion" in found else ("prompt", "chosen", "rejected")
    for ours in sides:
        if ours not in found:
            found[ours] = left.pop(0) if left else "…"
    return {ours: found[ours] for ours in sides}


def key_faults(columns: dict[str, str], known: tuple[str, ...], path: str) -> list[TbpoError]:
    """Keys of [data.columns] that are names of no column of ours."""
    faults = []
    for ours, theirs in columns.items():
        if ours in known:
            continue
        near = nearest(ours, known)
        fix = f'{near} = "{theirs}"' if near else "take the line out"
        if theirs in known and not nearest(ours, known, 0.8):
            fix = f'the other way round: {theirs} = "{ours}"'
        faults.append(
            TbpoError(
                f"data.columns.{ours} is not the name of a column that tbpo reads",
                f"{path}, [data.columns] {ours}",
                f"our name = the name in the rows; ours are {', '.join(known)}",
                fix,
            )
        )
    return faults


def absent_columns(columns: dict[str, str], seen: set[str], where: str) -> list[TbpoError]:
    """Names in [data.columns] that no row has.

    Args:
        seen: the columns of the first rows of all sources.
        where: these sources.
    """
    faults = []
    for ours, theirs in columns.items():
        if theirs in seen:
            continue
        near = nearest(theirs, seen)
        fix = f'{ours} = "{near}"' if near else "name a column that the rows have"
        if ours in seen and theirs in ("prompt", "chosen", "rejected"):
            fix = f'the other way round: {theirs} = "{ours}"'
        faults.append(
            TbpoError(
                f'data.columns.{ours} = "{theirs}" names a column that no row has',
                where,
                f"one of {', '.join(sorted(seen))}",
                fix,
            )
        )
    return faults


def unread_columns(
    columns: dict[str, str], found: Iterable[tuple[str, set[str]]], where: str
) -> list[TbpoError]:
    """Keys of [data.columns] that the formats of the rows do not read.

    Args:
        found: of each source its format, and the columns of its first rows that are read, by our
            names.
        where: these sources.
    """
    found = list(found)
    formats = dict.fromkeys(name for name, _ in found)
    read = {column for _, columns in found for column in columns}
    used = sorted(read)
    return [
        TbpoError(
            f"data.columns.{ours} is not read: the rows are of the format {', '.join(formats)}",
            where,
            f"our name of a column that such rows are read by, such as {', '.join(used)}",
            f'{near} = "{theirs}"' if (near := _alike(ours, used)) else "take the line out",
        )
        for ours, theirs in columns.items()
        if ours not in read
    ]


def _alike(name: str, names: Iterable[str]) -> str:
    """The name of the same thing, or the one that is spelt most like it; "" if there is none."""
    names = list(names)
    same = [ours for ours, words in LIKELY.items() if ours in names and name in words]
    return next(iter(same), "") or nearest(name, names)
