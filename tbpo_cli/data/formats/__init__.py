"""Rows as users have them → PreferencePair: a table of formats, one file a family."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tbpo_cli.config.recipe import Data
from tbpo_cli.data.choosing import Chooser
from tbpo_cli.data.formats.answers import from_answers, is_answers
from tbpo_cli.data.formats.choices import (
    STRENGTHS,
    from_choice,
    from_shp,
    from_stack_exchange,
    from_strength,
    is_choice,
)
from tbpo_cli.data.formats.columns import PROMPTS, Columns, first_of, messages, prompt, with_system
from tbpo_cli.data.formats.conversations import (
    from_conversations,
    from_openai,
    from_sharegpt,
    is_conversations,
)
from tbpo_cli.data.formats.demonstrations import (
    CHATS,
    from_alpaca,
    from_chat,
    from_completion,
    is_alpaca,
)
from tbpo_cli.data.formats.dialogues import from_dialogues, is_dialogues
from tbpo_cli.data.formats.ranked import LISTS, RANKS, SCORES, from_ranked, is_ranked
from tbpo_cli.data.formats.unknown import key_faults, nearest, reversed_columns, unknown_rows
from tbpo_cli.data.formats.unpaired import from_unpaired, is_unpaired, pair_up
from tbpo_cli.data.formats.winners import SIDES as CHOICES
from tbpo_cli.data.formats.winners import WINNERS, has_numbers, numbers_of_first, with_named_winners
from tbpo_cli.data.pairs import MadePairs, Messages, PreferencePair, RejectedRow, make_pair
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row
from tbpo_cli.errors import TbpoError


def _names(column: str | tuple[str, ...]) -> tuple[str, ...]:
    return (column,) if isinstance(column, str) else column


@dataclass(frozen=True)
class Format:
    """One way to write a comparison as a row.

    Args:
        columns: the columns that a row must have, not null; of several names, one.
        parse: a row with these columns → its pair, or RejectedRow.
        recognise: whether a row with these columns is of this format, where another one has the
            same.
        parse_all: in place of `parse`, for rows with several answers, of which the second argument
            makes pairs.
    """

    columns: tuple[str | tuple[str, ...], ...]
    parse: Callable[[Columns], PreferencePair] | None
    recognise: Callable[[Columns], bool] = lambda row: True
    parse_all: Callable[[Columns, Chooser], MadePairs] | None = None

    def fits(self, content: Any) -> bool:
        """Whether a row is of this format."""
        if not isinstance(content, dict):
            return False
        return all(first_of(content, _names(c)) for c in self.columns) and self.recognise(content)

    def __str__(self) -> str:
        return " + ".join(_names(column)[0] for column in self.columns)


SIDES = ("chosen", "rejected")
NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")  # columns, if not empty
MAX_DEPTH = 100  # of lists and tables in a row

FORMATS = {  # a row is of the first that fits it
    "hh": Format(SIDES, from_dialogues, is_dialogues),
    "sharegpt": Format(("conversations", *SIDES), from_sharegpt),
    "prompt": Format((PROMPTS, *SIDES), from_answers, is_answers),
    "messages": Format(SIDES, from_conversations, is_conversations),
    "openai": Format(("input", "preferred_output", "non_preferred_output"), from_openai),
    "ranked": Format(((*PROMPTS, "input"), LISTS), None, is_ranked, from_ranked),
    "shp": Format(("history", "human_ref_A", "human_ref_B", "labels"), from_shp),
    "helpsteer": Format(((*PROMPTS, "context"), STRENGTHS), from_strength, is_choice),
    "winner": Format((WINNERS,), from_choice, is_choice),
    "stack_exchange": Format((PROMPTS, "response_j", "response_k"), from_stack_exchange),
    "unpaired": Format((PROMPTS, "completion", "label"), from_unpaired, is_unpaired),
    "sft_prompt": Format((PROMPTS, "completion"), from_completion),
    "sft_messages": Format((CHATS,), from_chat),
    "sft_alpaca": Format(("instruction", "output"), from_alpaca, is_alpaca),
}
# Of one completion a row, in `sft.train` as well, where nothing is compared.
NOT_FOR_SFT = ("unpaired",)
# Columns that a row of any format may have.
MORE_COLUMNS = (
    "system",
    "tools",
    "weight",
    "score_chosen",
    "score_rejected",
    "history",
    "input",
    "label",
    "truncated",
    "num_tokens",
)
KNOWN_COLUMNS = tuple(
    dict.fromkeys(
        [
            *(name for f in FORMATS.values() for column in f.columns for name in _names(column)),
            *SCORES,
            *RANKS,
            *(name for sides in CHOICES for name in sides),
            *MORE_COLUMNS,
        ]
    )
)


def format_faults(data: Data, path: str) -> list[TbpoError]:
    """What is wrong with `data.format` and the keys of `data.columns` in the recipe at `path`."""
    faults = key_faults(data.columns, KNOWN_COLUMNS, path) + reversed_columns(data.columns, path)
    names = ["auto", *FORMATS]
    if data.format in names:
        return faults
    *most, last = map(repr, names)
    near = nearest(data.format, names)
    fault = TbpoError(
        f'data.format = "{data.format}" is not possible',
        f"{path}, [data] format",
        f"{', '.join(most)} or {last}",
        f'format = "{near}"' if near else "change it there, or give --set data.format=…",
    )
    return [fault, *faults]


def recognise(
    open_rows: Callable[[], Iterator[Row]], data: Data, for_sft: bool = False
) -> tuple[str, Iterator[Row]]:
    """The format of the rows, and all of the rows; of labelled completions, the pairs among them.

    The format is `data.format`, or the first of FORMATS that fits the first row that any of them
    fits.

    Args:
        open_rows: gives the rows, from the first one, each time that it is called.
        for_sft: whether the rows are of `sft.train`, where nothing is compared.

    Raises:
        TbpoError: if none fits, with the columns of the first row; if a column of numbers leaves
            open which of two answers is better.
    """
    rows = open_rows()
    first = list(itertools.islice(rows, ROWS_AT_A_TIME))
    rows = itertools.chain(first, rows)
    with_our_names = partial(renamed, columns=data.columns)
    name = _format_of(first, data, for_sft)
    if name == "unpaired":
        rows = pair_up(rows, with_our_names)
    if name == "winner" and has_numbers(with_our_names(row.content) for row in first):
        bases = numbers_of_first(open_rows(), with_our_names)
        rows = with_named_winners(rows, bases, with_our_names, data.columns)
    return name, rows


def _format_of(first: Sequence[Row], data: Data, for_sft: bool) -> str:
    """`data.format`, or the format of some rows, if there are any: see `recognise`."""
    if data.format != "auto" or not first:
        return data.format
    found = (
        name
        for row in first
        for name, known in FORMATS.items()
        if known.fits(renamed(row.content, data.columns)) and not (for_sft and name in NOT_FOR_SFT)
    )
    if not (name := next(found, "")):
        raise unknown_rows(first[0], data.columns)
    return name


def to_pairs(row: Row, format_name: str, data: Data, chooser: Chooser | None = None) -> MadePairs:
    """The pairs that a row makes: one, or of a list of answers as [choose] says.

    Args:
        chooser: of a list of answers; None: as the defaults of [choose] say.

    Raises:
        RejectedRow: with the reason why the row cannot be used.
    """
    return _made(renamed(row.content, data.columns), FORMATS[format_name], chooser or Chooser())


def _made(content: Any, known: Format, chooser: Chooser) -> MadePairs:
    """The pairs of a row with our names of columns: see `to_pairs`."""
    if _is_deep(content):
        raise RejectedRow("wrong_type", f"lists and tables are nested more than {MAX_DEPTH} deep")
    if not isinstance(content, dict):
        raise RejectedRow(
            "wrong_type", f"the row is {type(content).__name__}, not a table of columns"
        )
    _check_that_it_is_text(content)
    for column in known.columns:
        names = _names(column)
        if not first_of(content, names):
            is_there = any(name in content for name in names)
            raise RejectedRow("null_column" if is_there else "missing_column", names[0])
    if known.parse_all is not None:
        return known.parse_all(content, chooser)
    assert known.parse is not None
    return MadePairs([known.parse(content)])


def _check_that_it_is_text(content: Columns) -> None:
    """Raises RejectedRow: not_text, for a row with images, videos or audio beside its text."""
    if column := next((name for name in NOT_TEXT if content.get(name)), ""):
        raise RejectedRow("not_text", f"the row has something in {column}; only text is read")


class _NotingReads(dict[str, Any]):
    """A row that notes which of its columns are read."""

    def __init__(self, content: dict[str, Any], read: set[str]) -> None:
        super().__init__(content)
        self.read = read

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        """As of a dict."""
        self.read.add(column)
        return super().get(column, default)

    def __or__(self, more: dict[str, Any]) -> _NotingReads:  # type: ignore[override]  # narrower
        return _NotingReads({**self, **more}, self.read)


def columns_read(rows: Sequence[Row], data: Data, for_sft: bool = False) -> tuple[str, set[str]]:
    """The format of some rows, and the columns, by our names, that are read to make their pairs.

    A row has only some of the columns that its format knows, and of two names for one thing only
    the first is read.

    Returns:
        All that `data.columns` names, where no row makes a pair, or completions are paired up.

    Raises:
        TbpoError: if the rows are of no known format.
    """
    data = replace(data, format="auto") if for_sft else data
    name = _format_of(rows, data, for_sft)
    read: set[str] = set()
    is_made = False
    for row in rows if name in FORMATS and name != "unpaired" else ():
        content = renamed(row.content, data.columns)
        noting = _NotingReads(content, read) if isinstance(content, dict) else content
        with suppress(RejectedRow):
            is_made |= bool(_made(noting, FORMATS[name], Chooser()).pairs)
    return name, read if is_made else read | {*data.columns}


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

    Both are checked as in a pair. AlpacaEval's rows have `instruction`, which is a name of the
    prompt; Arena-Hard's have `prompt` or, in its version 0.1, `turns`, a list with one question.

    Raises:
        RejectedRow: with the reason why it cannot be used.
    """
    if isinstance(content, dict) and content.get("turns") is not None:
        content = content | {"prompt": _only_turn(content["turns"])}
    if not isinstance(content, dict) or not first_of(content, (*PROMPTS, *CHATS)):
        raise RejectedRow("missing_column", "prompt or messages")
    _check_that_it_is_text(content)
    if first_of(content, PROMPTS):
        asked = prompt(content)
    else:
        asked = with_system(content, messages(content, first_of(content, CHATS)))
    pair = make_pair(content, asked, {"role": "assistant", "content": "an answer"}, None)
    return pair.prompt, pair.tools


def _only_turn(turns: Any) -> Any:
    """The text of the one question in `turns`, which MT-Bench and Arena-Hard have."""
    if not isinstance(turns, list) or len(turns) != 1:
        raise RejectedRow("wrong_type", "turns is not a list with one question")
    return turns[0].get("content") if isinstance(turns[0], dict) else turns[0]


def renamed(content: Any, columns: dict[str, str]) -> Any:
    """A row with our names of columns beside its own.

    Args:
        columns: our names → the names in the row, where they differ.
    """
    if not isinstance(content, dict):
        return content
    ours = {ours: content[theirs] for ours, theirs in columns.items() if theirs in content}
    return content | ours
