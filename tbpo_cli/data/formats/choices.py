"""`winner`, `shp`, `helpsteer`, `stack_exchange`: two answers to a prompt, and which is better."""

from __future__ import annotations

from tbpo_cli.data.formats.columns import PROMPTS, Columns, answer, first_of, messages, prompt
from tbpo_cli.data.formats.conversations import from_conversations
from tbpo_cli.data.formats.winners import WINNERS, better_of, number_of, sides_of
from tbpo_cli.data.pairs import PreferencePair, RejectedRow, make_pair

# Columns from −3, where the first answer is much better, to 3, where the second one is.
STRENGTHS = ("preference_strength", "overall_preference")


def is_choice(row: Columns) -> bool:
    """Whether the row has two answers, and which is better."""
    return sides_of(row) is not None


def from_choice(row: Columns) -> PreferencePair:
    """{"prompt", "response_a", "response_b", "winner": "a"}; LMSYS's conversations; PKU's numbers.

    A number has its meaning from the whole column: see formats/winners.py.

    Raises:
        RejectedRow: no_preference, for a tie.
    """
    sides = sides_of(row)
    if sides is None:
        raise RejectedRow("missing_column", "response_a and response_b")
    column = first_of(row, WINNERS)
    better = better_of(row, column, sides)
    first, second = sides[better], sides[1 - better]
    if not first.startswith("conversation"):
        return make_pair(row, prompt(row), answer(row, first), answer(row, second))
    return from_conversations(row | {"chosen": row[first], "rejected": row[second]})


def from_shp(row: Columns) -> PreferencePair:
    """{"history", "human_ref_A", "human_ref_B", "labels"}; a label of 1: A is better; 0: B is.

    Source: the rows of stanfordnlp/SHP; the votes `score_A` and `score_B` give the margin.

    Raises:
        RejectedRow: wrong_type, for another label.
    """
    label = number_of(row["labels"])
    if label not in (0, 1):
        raise RejectedRow("wrong_type", f"labels is {row['labels']!r:.100}, neither 0 nor 1")
    better, worse = "AB" if label else "BA"
    asked = messages(row, "history", role_of_text="user")
    marks = {
        "score_chosen": row.get(f"score_{better}"),
        "score_rejected": row.get(f"score_{worse}"),
    }
    sides = (answer(row, f"human_ref_{side}") for side in (better, worse))
    return make_pair(row | marks, asked, *sides)


def from_strength(row: Columns) -> PreferencePair:
    """{"prompt" or "context", "response_1", "response_2", "preference_strength": −3 to 3}.

    Source: the preferences of nvidia/HelpSteer2 and HelpSteer3: below 0, the first is better.

    Raises:
        RejectedRow: no_preference, for 0; wrong_type, for what is no number.
    """
    sides = sides_of(row)
    if sides is None:
        raise RejectedRow("missing_column", "response_1 and response_2")
    column = first_of(row, STRENGTHS)
    strength = number_of(row[column])
    if strength is None or isinstance(strength, bool):
        raise RejectedRow("wrong_type", f"{column} is {row[column]!r:.100}, not a number")
    if strength == 0:
        raise RejectedRow("no_preference", f"{column} is 0")
    better, worse = sides if strength < 0 else sides[::-1]
    asked = prompt(row if first_of(row, PROMPTS) else row | {"prompt": row["context"]})
    return make_pair(row, asked, answer(row, better), answer(row, worse))


def from_stack_exchange(row: Columns) -> PreferencePair:
    """{"question", "response_j", "response_k"}, of which response_j has more votes.

    Source: the paired rows of lvwerra/stack-exchange-paired.
    """
    asked = messages(row, first_of(row, PROMPTS), role_of_text="user")
    return make_pair(row, asked, answer(row, "response_j"), answer(row, "response_k"))
