"""`unpaired`: completions that are each labelled good or bad; two of one prompt make a pair.

Source: KTO's data, arXiv 2402.01306, section 3; what has no counterpart is not used here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from tbpo_cli.data.formats.answers import from_answers
from tbpo_cli.data.formats.columns import PROMPTS, Columns, first_of
from tbpo_cli.data.pairs import PreferencePair, RejectedRow, weight_of
from tbpo_cli.data.sources import Row

GOOD = {"true", "1", "1.0", "good", "chosen", "yes"}
BAD = {"false", "0", "0.0", "-1", "-1.0", "bad", "rejected", "no"}


def is_good(row: Columns) -> bool:
    """What `label` says. Raises RejectedRow: wrong_type, if it says neither."""
    said = str(row["label"]).strip().lower()
    if said not in GOOD | BAD:
        raise RejectedRow("wrong_type", f"label is {row['label']!r}, neither true nor false")
    return said in GOOD


def is_unpaired(row: Columns) -> bool:
    """Whether `label` is true or false, not a label of another kind."""
    return str(row["label"]).strip().lower() in GOOD | BAD


def pair_up(rows: Iterator[Row], renamed: Callable[[Any], Any]) -> Iterator[Row]:
    """Rows in which a good and a bad completion of one prompt stand together, then what is left.

    1. A row waits until one of the same prompt, input, system, tools and weight comes with the
       other label.
    2. The two make one row, with the number of the later one; the first to wait is the first taken.
    3. What still waits at the end follows as it is, as do rows that are no such rows at once.

    Args:
        renamed: gives the content of a row our names of columns.
    """
    waiting: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        content = renamed(row.content)
        try:
            good = is_good(content)
            asked = [content[first_of(content, PROMPTS)]]
            asked += [content.get(name) for name in ("input", "system", "tools")]
            asked.append(weight_of(content))
            key = json.dumps(asked, sort_keys=True)
        except (RejectedRow, TypeError, KeyError, ValueError):
            yield row
            continue
        if others := waiting.get((key, not good)):
            other = renamed(others.pop(0).content)
            chosen, rejected = (content, other) if good else (other, content)
            sides = {"chosen": chosen["completion"], "rejected": rejected["completion"]}
            yield Row(row.source, row.number, content | sides)
        else:
            waiting.setdefault((key, good), []).append(row)
    for left in waiting.values():
        yield from left


def from_unpaired(row: Columns) -> PreferencePair:
    """A row that `pair_up` made of two.

    Raises:
        RejectedRow: bad_weight, or unpaired, for a row that stayed alone.
    """
    if "chosen" in row and "rejected" in row:
        return from_answers(row)
    label = "bad" if is_good(row) else "good"
    which = f"labelled {label}, of the same weight ({weight_of(row):g})"
    raise RejectedRow("unpaired", f"the prompt has no further completion that is {which}")
