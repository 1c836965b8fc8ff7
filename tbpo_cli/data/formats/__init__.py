"""Rows as users have them → PreferencePair: a table of formats, one file a family."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tbpo_cli.config.recipe import Data
from tbpo_cli.data.formats.answers import from_answers, is_answers
from tbpo_cli.data.formats.columns import Columns, messages, prompt
from tbpo_cli.data.formats.conversations import from_conversations, is_conversations
from tbpo_cli.data.formats.demonstrations import from_chat, from_completion
from tbpo_cli.data.formats.dialogues import from_dialogues, is_dialogues
from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, make_pair
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row
from tbpo_cli.errors import TbpoError


@dataclass(frozen=True)
class Format:
    """One way to write a comparison as a row.

    Args:
        columns: the columns that a row must have, not null.
        parse: a row with these columns → its pair, or RejectedRow.
        recognise: whether a row with these columns is of this format, where another one has the
            same.
    """

    columns: tuple[str, ...]
    parse: Callable[[Columns], PreferencePair]
    recognise: Callable[[Columns], bool] = lambda row: True


MAX_DEPTH = 100  # of lists and tables in a row

FORMATS = {  # a row is of the first that fits it
    "hh": Format(("chosen", "rejected"), from_dialogues, is_dialogues),
    "prompt": Format(("prompt", "chosen", "rejected"), from_answers, is_answers),
    "messages": Format(("chosen", "rejected"), from_conversations, is_conversations),
    "sft_prompt": Format(("prompt", "completion"), from_completion),
    "sft_messages": Format(("messages",), from_chat),
}


def format_faults(data: Data, path: str) -> list[TbpoError]:
    """What is wrong with `data.format` in the recipe at `path`: it must be "auto" or in FORMATS."""
    names = ["auto", *FORMATS]
    if data.format in names:
        return []
    *most, last = map(repr, names)
    near = difflib.get_close_matches(data.format, names, n=1)
    return [
        TbpoError(
            f'data.format = "{data.format}" is not possible',
            f"{path}, [data] format",
            f"{', '.join(most)} or {last}",
            f'format = "{near[0]}"' if near else "change it there, or give --set data.format=…",
        )
    ]


def recognise(rows: Iterator[Row], data: Data) -> tuple[str, Iterator[Row]]:
    """The format of the rows, and all of the rows.

    It is `data.format`, or the first of FORMATS that fits the first row that any of them fits.

    Raises:
        TbpoError: if none fits, with the columns of the first row.
    """
    first = list(itertools.islice(rows, ROWS_AT_A_TIME))
    rows = itertools.chain(first, rows)
    if data.format != "auto" or not first:
        return data.format, rows
    contents = [_renamed(row.content, data.columns) for row in first]
    for content in contents:
        for name, known in FORMATS.items():
            if (
                isinstance(content, dict)
                and all(column in content for column in known.columns)
                and known.recognise(content)
            ):
                return name, rows
    columns = (
        ", ".join(contents[0])
        if isinstance(contents[0], dict)
        else f"none, it is {type(contents[0]).__name__}"
    )
    where = f"{first[0].source}, row {first[0].number}; its columns: {columns}"
    formats = "; ".join(f"{name}: {' + '.join(f.columns)}" for name, f in FORMATS.items())
    fix = 'name the columns, e.g. [data.columns] prompt = "question"'
    raise TbpoError("the rows have none of the known formats", where, formats, fix)


def to_pair(row: Row, format_name: str, columns: dict[str, str]) -> PreferencePair:
    """The row as a pair.

    Args:
        columns: our names of columns → the names in the row, where they differ.

    Raises:
        RejectedRow: with the reason why it cannot be used.
    """
    content = _renamed(row.content, columns)
    if _is_deep(content):
        raise RejectedRow("wrong_type", f"lists and tables are nested more than {MAX_DEPTH} deep")
    if not isinstance(content, dict):
        raise RejectedRow(
            "wrong_type", f"the row is {type(content).__name__}, not a table of columns"
        )
    for column in FORMATS[format_name].columns:
        if content.get(column) is None:
            raise RejectedRow("null_column" if column in content else "missing_column", column)
    return FORMATS[format_name].parse(content)


def _is_deep(content: Any) -> bool:
    """Whether lists and tables are nested more than MAX_DEPTH deep."""
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


def read_prompt(content: Any) -> tuple[Messages, tuple[dict[str, Any], ...]]:
    """The prompt, and the `tools`, of a row with `prompt` (text or messages) or `messages`.

    Both are checked as in a pair.

    Raises:
        RejectedRow: with the reason why it cannot be used.
    """
    if not isinstance(content, dict) or not ("prompt" in content or "messages" in content):
        raise RejectedRow("missing_column", "prompt or messages")
    asked = prompt(content) if "prompt" in content else messages(content, "messages")
    pair = make_pair(content, asked, {"role": "assistant", "content": "an answer"}, None)
    return pair.prompt, pair.tools


def _renamed(content: Any, columns: dict[str, str]) -> Any:
    if not isinstance(content, dict):
        return content
    renamed = {ours: content[theirs] for ours, theirs in columns.items() if theirs in content}
    return content | renamed
