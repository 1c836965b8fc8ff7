"""Messages about rows of no known format, and about faulty keys of [data.columns]."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tbpo_cli.data.formats.guess import LIKELY, advice
from tbpo_cli.data.formats.winners import SIDES as SIDES_OF_CHOICES
from tbpo_cli.data.sources import Row
from tbpo_cli.errors import TbpoError

PROMPT_ALONE = {"prompt", "system", "tools", "id"}  # columns of a row without answers
SIDES = ("prompt", "chosen", "rejected", "completion")
SHOWN = 40  # characters of a value
FEW = 10  # names of columns in a message
EXPECTED = (
    "columns such as prompt, chosen, rejected; prompt, responses, scores; or prompt, response_a,"
    " response_b, winner (all formats: docs/data.md)"
)
# Our names of the better and the worse answer, or of the first and the second one.
OPPOSITES = (
    ("chosen", "rejected"),
    ("score_chosen", "score_rejected"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
    ("human_ref_A", "human_ref_B"),
    *SIDES_OF_CHOICES,
)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The name that is most like another one; "" if none is."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), "")


def unknown_rows(row: Row, columns: dict[str, str]) -> TbpoError:
    """Rows of no known format: what is in them, and what to do about it.

    Args:
        row: the first one, with its own names of columns.
        columns: our names → those in the rows, as the recipe has them.
    """
    what = "the rows have none of the known formats"
    place = f"{row.source}, row {row.number}"
    content = row.content
    if not isinstance(content, dict):
        return TbpoError(
            what,
            f"{place}; it is {type(content).__name__}, without names of columns",
            EXPECTED,
            'write each row as a table of columns, e.g. {"prompt": …, "chosen": …, "rejected": …}',
        )
    if content.keys() <= PROMPT_ALONE and isinstance(content.get("prompt"), str | list):
        what = "the rows are prompts without answers"
        expected = "answers in the rows, or a judge for the policy's own answers"
        fix = "add the tables [judge] and [rounds]: the policy then answers them itself"
        return TbpoError(what, place, expected, fix)
    ours = {theirs: name for name, theirs in columns.items()}
    known = {str(ours.get(name) or name): value for name, value in content.items()}
    numbers = [name for name in SIDES if isinstance(known.get(name), int | float)]
    of_texts = [name for name in SIDES if _is_list_of_texts(known.get(name))]
    inner = _inner(content)
    lists = [value for value in content.values() if isinstance(value, list)]
    if _has_no_names(row):
        what = "the first line of the file does not name the columns"
        fix = "put a line with their names before it, e.g. prompt,chosen,rejected"
    elif len(lists) == len(content) > 1 and len({*map(len, lists)}) == 1:
        what = "the row holds whole columns, not one comparison"
        fix = "write a row for each comparison"
    elif inner:
        what = f"{what}: they are within {inner}"
        fix = f"write what is in {inner} as the row"
    elif of_texts:
        what = f"the column {of_texts[0]} holds a list of texts, not one text"
        fix = "write one text there, or a list of messages, each with its role and content"
    elif numbers:
        what = f"the column {numbers[0]} holds numbers, not text"
        fix = f'name the column with the text: [data.columns] {numbers[0]} = "…"'
    else:
        said, fix = advice(known)
        what = f"{what}: {said}" if said else what
    return TbpoError(what, f"{place}; its columns: {_shown(content)}", EXPECTED, fix)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _inner(content: dict[str, Any]) -> str:
    """The column that holds a table with most of our names of a comparison; "" if none does."""
    return next(
        (
            name
            for name, value in content.items()
            if isinstance(value, dict) and {"chosen", "rejected", "completion"} & value.keys()
        ),
        "",
    )


def _has_no_names(row: Row) -> bool:
    """Whether most names of a file with fields have a blank within, as texts have."""
    is_of_fields = Path(row.source).suffix in (".csv", ".tsv")
    return is_of_fields and 2 * sum(" " in name.strip() for name in row.content) > len(row.content)


def _shown(content: dict[str, Any]) -> str:
    """The columns of a row, and how they begin; of many, the first ones."""
    shown = [f"{name[:SHOWN]} ({_seen(value)})" for name, value in content.items()]
    more = f", and {len(shown) - FEW} more" if len(shown) > FEW else ""
    return ", ".join(shown[:FEW]) + more


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


def _few(names: Iterable[str], near: str = "") -> str:
    """Some of many names, those that are most like another one first."""
    names = list(names)
    like = difflib.get_close_matches(near, names, n=FEW, cutoff=0.4)
    shown = list(dict.fromkeys([*like, *names]))[:FEW]
    return ", ".join(shown) + (f", and {len(names) - FEW} more" if len(names) > FEW else "")


def reversed_columns(columns: dict[str, str], path: str) -> list[TbpoError]:
    """Keys of [data.columns] that give the better and the worse answer each other's column.

    They do so by our own names, or by names that say the opposite, as "rejected_text" does.
    """
    faults = []
    for better, worse in OPPOSITES:
        first, second = columns.get(better, better), columns.get(worse, worse)
        is_one = first == second
        is_opposite = (better, worse) == ("chosen", "rejected") and (
            _says(first, "rejected") and _says(second, "chosen")
        )
        if not (is_one or is_opposite or (first, second) == (worse, better)):
            continue
        what = f"data.columns reads {better} and {worse} from one column, {first}"
        fix = "name two columns"
        if not is_one:
            what = f'data.columns exchanges {better} and {worse}: {better} = "{first}"'
            fix = f'{better} = "{second}", {worse} = "{first}"'
            if (first, second) == (worse, better):
                fix = "take both lines out: the rows have columns of these names"
            fix += " (to train on exchanged answers on purpose: align.reverse = true)"
        expected = f"a column for {better} and another one for {worse}"
        faults.append(TbpoError(what, f"{path}, [data.columns]", expected, fix))
    return faults


def _says(name: str, ours: str) -> bool:
    """Whether a name says that a column is the chosen one, or the rejected one, and not both."""
    said = {
        side
        for side in ("chosen", "rejected")
        for word in LIKELY[side]
        if (name.lower().endswith(word) if word.startswith("_") else word in name.lower())
    }
    return said == {ours}


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
                f"our name = the name in the rows; ours are {_few(known, ours)}",
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
                f"one of {_few(sorted(seen), theirs)}",
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
