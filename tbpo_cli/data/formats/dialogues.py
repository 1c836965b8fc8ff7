"""`hh`: dialogues as text with "\n\nHuman:" and "\n\nAssistant:" turns.

Source: the format of the data released with arXiv 2204.05862 (HH-RLHF).
"""

from __future__ import annotations

import re

from tbpo_cli.data.formats.columns import Columns, text, with_system
from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, make_pair

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(content: object) -> bool:
    """Whether text begins with a turn of a dialogue."""
    return isinstance(content, str) and TURN.match(content.lstrip("\n")) is not None


def is_dialogues(row: Columns) -> bool:
    """Whether the sides, or the prompt that they go on from, are dialogues."""
    return is_dialogue(row.get("prompt") or row["chosen"])


def from_dialogues(row: Columns) -> PreferencePair:
    """Whole dialogues, or the dialogue of the `prompt` column and how it goes on."""
    prompt = text(row, "prompt") if row.get("prompt") else ""
    chosen, rejected = (read_dialogue(prompt + text(row, side)) for side in ("chosen", "rejected"))
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        raise RejectedRow("roles", "the dialogue does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise RejectedRow("prompts_differ")
    return make_pair(row, with_system(row, chosen[:-1]), chosen[-1], rejected[-1])


def read_dialogue(dialogue: str) -> Messages:
    """The turns of a dialogue as messages. Raises RejectedRow: wrong_type, if none begins it."""
    before, *turns = TURN.split(dialogue)  # "", "Human", its text, "Assistant", its text, …
    if before.strip() or not turns:
        raise RejectedRow(
            "wrong_type", "the dialogue does not begin with a Human: or Assistant: turn"
        )
    spoken = zip(turns[::2], turns[1::2], strict=True)
    return tuple({"role": ROLES[turn], "content": content.strip()} for turn, content in spoken)
