"""Reads the column that says which of two answers is better.

A word has its meaning in each row; a number has its meaning from all rows of the source together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tbpo_cli.data.formats.columns import Columns, first_of
from tbpo_cli.data.pairs import RejectedRow
from tbpo_cli.data.sources import Row
from tbpo_cli.errors import TbpoError

# Names of the two answers, and of the column that says which is better.
STEMS = ("response", "answer", "completion", "output")
NUMBERED = tuple(
    (f"{stem}{join}{first}", f"{stem}{join}{first + 1}")
    for first in (0, 1)
    for stem in STEMS
    for join in ("_", "")
)
LETTERED = tuple((f"{stem}_a", f"{stem}_b") for stem in (*STEMS, "conversation"))
SIDES = (*LETTERED, *NUMBERED)
WINNERS = (
    "winner",
    "better_response_id",
    "preferred",
    "preference",
    "better",
    "best",
    "choice",
    "chosen",
    "label",
    "labels",
)
LABELS = ("label", "labels")  # where 1 may well mean that the first answer is better
# What says that the first, or the second, of the two is better.
SAID = {"a": 0, "b": 1, "first": 0, "second": 1}
WORD = re.compile(
    r"(?:(?:model|response|answer|completion|output|conversation|assistant)[ _-]?)?([ab]|\d+)"
)
NO_NUMBER = -1  # a usual way to write that there is none
MOST_VALUES = 20  # different numbers of a column that are kept, to find out what they mean

Sides = tuple[str, str]  # the names of the two answers
Bases = dict[tuple[str, Sides], int]  # by the column with the better one, and the two names


def sides_of(row: Columns) -> Sides | None:
    """The names of the two answers; None if there are none, or a third one."""
    for first, second in SIDES:
        stem = first[:-1]
        further = (f"{stem}{chr(ord(first[-1]) - 1)}", f"{stem}{chr(ord(second[-1]) + 1)}")
        if first_of(row, (first,)) and first_of(row, (second,)) and not first_of(row, further):
            return first, second
    return None


def better_of(row: Columns, column: str, sides: Sides) -> int:
    """0 or 1, the place of the better answer, where a word says it.

    Raises:
        RejectedRow: no_preference, for a tie; wrong_type, for anything else.
    """
    winner = row[column]
    said = str(winner).strip().lower()
    match = WORD.fullmatch(said)
    word = match[1] if match else said
    texts = [row[side] for side in sides]
    if said in sides:
        return sides.index(said)
    if word in SAID:
        return SAID[word]
    is_tie = said.startswith(("tie", "both", "neither")) or said in ("draw", "equal", "")
    if is_tie or number_of(winner) == NO_NUMBER:
        raise RejectedRow("no_preference", f"{column} is {winner!r}")
    if isinstance(winner, str) and texts.count(winner) == 1:
        return texts.index(winner)
    raise RejectedRow("wrong_type", f"{column} is {winner!r:.100}, not one of the two answers")


def number_of(said: Any) -> bool | float | None:
    """A number, also of text such as "2" or "response_2"; true or false; None for other words."""
    if isinstance(said, bool | int | float):
        return said if math.isfinite(said) else None
    word = str(said).strip().lower()
    if word in ("true", "false"):
        return word == "true"
    match = WORD.fullmatch(word)
    try:
        number = float(match[1] if match else word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def numbers_of_first(rows: Iterable[Row], renamed: Callable[[Any], Any]) -> Bases:
    """The number of the first answer, by the column and the names of the answers.

    One row does not say whether 1 is the first or the second answer: it needs all rows of a source.

    Args:
        rows: all of them.
        renamed: gives the content of a row our names of columns.

    Raises:
        TbpoError: if the numbers of a column leave open which answer they mean.
    """
    seen: dict[tuple[str, Sides], dict[str, Row]] = {}
    for row in rows:
        if found := _numbered(renamed(row.content)):
            column, sides, number = found
            values = seen.setdefault((column, sides), {})
            if len(values) < MOST_VALUES:
                values.setdefault(_written(number), row)
    return {key: _number_of_first(*key, values) for key, values in seen.items()}


def with_named_winners(
    rows: Iterable[Row], bases: Bases, renamed: Callable[[Any], Any], columns: dict[str, str]
) -> Iterator[Row]:
    """Rows of `winner`, with the name of the better answer in place of its number.

    Args:
        rows: all of them.
        bases: of `numbers_of_first`.
        renamed: gives the content of a row our names of columns, with
        columns: our names → those in the rows, where they differ.
    """
    for row in rows:
        found = _numbered(renamed(row.content))
        if found is None or found[2] == NO_NUMBER:
            yield row
            continue
        column, sides, number = found
        theirs = columns.get(column, column)
        name = theirs if theirs in row.content else column
        side = sides[int(number) - bases[column, sides]]
        yield Row(row.source, row.number, row.content | {name: side})


def has_numbers(contents: Iterable[Any]) -> bool:
    """Whether a row of `winner`, with our names of columns, says by a number which is better."""
    return any(_numbered(content) for content in contents)


def _numbered(content: Any) -> tuple[str, Sides, bool | float] | None:
    """The column, the names of the answers, and the number of the better one; None without one."""
    if not isinstance(content, dict):
        return None
    column = first_of(content, WINNERS)
    sides = sides_of(content)
    if not column or sides is None or str(content[column]).strip().lower() in sides:
        return None
    number = number_of(content[column])
    return None if number is None else (column, sides, number)


def _written(number: bool | float) -> str:
    """A value as a reader of the rows would write it."""
    return str(number).lower() if isinstance(number, bool) else f"{number:g}"


def _number_of_first(column: str, sides: Sides, values: dict[str, Row]) -> int:
    """The number of the first answer, 0 or 1, from all values of a column.

    1. Answers with numbers in their names are called by these.
    2. Else 1 and 2 count from 1, and 0 and 1 from 0; but in a column `label`, or beside −1, 1 may
       also say that the first answer is better, and nothing is assumed.

    Args:
        values: how the numbers are written, each with the first row that has it.

    Raises:
        TbpoError: for other values, or for one of the two alone.
    """
    numbers = {*values} - {f"{NO_NUMBER}"}
    names = f"{sides[0]} and {sides[1]}"
    if sides[0][-1].isdigit():
        base = int(sides[0][-1])
        expected = f"{base} and {base + 1} for {names}, as they are called"
        if numbers <= {f"{base}", f"{base + 1}"}:
            return base
    else:
        expected = f"1 and 2, or 0 and 1, for {names}, both in one column"
        is_unclear = column in LABELS or f"{NO_NUMBER}" in values
        if is_unclear:
            expected = f"1 and 2 for {names}; 1 beside 0 or -1 may say that {sides[0]} is better"
        if not numbers or numbers == {"1", "2"}:
            return 1
        if numbers == {"0", "1"} and not is_unclear:
            return 0
    listed = ", ".join(sorted(values, key=lambda value: (len(value), value)))
    value, first = next(item for item in values.items() if item[0] in numbers)
    raise TbpoError(
        f"the column {column} leaves open which answer is better: its values are {listed}",
        f"{first.source}, row {first.number}: {column} is {value}",
        expected,
        f'write "{sides[0]}" or "{sides[1]}" in that column (and "tie" where neither is better)',
    )
