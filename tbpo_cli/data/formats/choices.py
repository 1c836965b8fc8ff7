"""`winner` and `stack_exchange`: a prompt and two answers, and which of them is better."""

from __future__ import annotations

from typing import Any

from tbpo_cli.data.formats.columns import PROMPTS, Columns, answer, first_of, messages, prompt
from tbpo_cli.data.formats.conversations import from_conversations
from tbpo_cli.data.pairs import PreferencePair, RejectedRow, make_pair

# Names of the two answers, and of the column that says which is better.
SIDES = (
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
    ("conversation_a", "conversation_b"),
    ("response_0", "response_1"),
)
WINNERS = ("winner", "better_response_id", "preferred", "preference")
# What says that the first, or the second, of the two is better.
FIRST = {"a", "model_a", "response_a", "answer_a", "completion_a", "conversation_a", "0"}
SECOND = {"b", "model_b", "response_b", "answer_b", "completion_b", "conversation_b", "1"}
FIRST_OF_NUMBERED, SECOND_OF_NUMBERED = {"0", "response_0"}, {"1", "response_1"}


def is_choice(row: Columns) -> bool:
    """Whether the row has two answers, and which is better."""
    return _sides(row) is not None


def from_choice(row: Columns) -> PreferencePair:
    """{"prompt", "response_a", "response_b", "winner": "a"}; LMSYS's conversations; PKU's numbers.

    Raises:
        RejectedRow: no_preference, for a tie.
    """
    sides = _sides(row)
    if sides is None:
        raise RejectedRow("missing_column", "response_a and response_b")
    column = first_of(row, WINNERS)
    first, second = sides
    if not _is_first(row[column], column, first):
        first, second = second, first
    if not first.startswith("conversation"):
        return make_pair(row, prompt(row), answer(row, first), answer(row, second))
    return from_conversations(row | {"chosen": row[first], "rejected": row[second]})


def _sides(row: Columns) -> tuple[str, str] | None:
    return next((pair for pair in SIDES if all(row.get(name) is not None for name in pair)), None)


def _is_first(winner: Any, column: str, first: str) -> bool:
    said = str(int(winner) if isinstance(winner, bool | float) else winner).strip().lower()
    numbered = first == "response_0"
    if said in (FIRST_OF_NUMBERED if numbered else FIRST):
        return True
    if said in (SECOND_OF_NUMBERED if numbered else SECOND):
        return False
    if said.startswith(("tie", "both", "neither")) or said in ("draw", "equal", "-1", ""):
        raise RejectedRow("no_preference", f"{column} is {winner!r}")
    raise RejectedRow("wrong_type", f"{column} is {winner!r}, not one of the two answers")


def from_stack_exchange(row: Columns) -> PreferencePair:
    """{"question", "response_j", "response_k"}, of which response_j has more votes.

    Source: the paired rows of lvwerra/stack-exchange-paired.
    """
    asked = messages(row, first_of(row, PROMPTS), role_of_text="user")
    return make_pair(row, asked, answer(row, "response_j"), answer(row, "response_k"))
