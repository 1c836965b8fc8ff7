"""`prompt`: a prompt and its two answers, each text or messages."""

from __future__ import annotations

from tbpo_cli.data.formats.columns import Columns, answer, prompt
from tbpo_cli.data.pairs import PreferencePair, make_pair


def is_answers(row: Columns) -> bool:
    """Whether the answers are text."""
    return isinstance(row["chosen"], str)


def from_answers(row: Columns) -> PreferencePair:
    """{"prompt": "hello", "chosen": "hi", "rejected": "go"}."""
    return make_pair(row, prompt(row), answer(row, "chosen"), answer(row, "rejected"))
