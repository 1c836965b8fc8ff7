"""`hh`: dialogues as text with "\n\nHuman:" and "\n\nAssistant:" turns.

Source: the format of the data released with arXiv 2204.05862 (HH-RLHF).
"""

from __future__ import annotations

import re

from tbpo_cli.data.formats.columns import Columns, text
from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, make_pair

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogues(row: Columns) -> bool:
    """Whether a row with the columns of this format is of it."""
    return TURN.match(str(row.get("prompt") or row["chosen"]).lstrip("\n")) is not None


def from_dialogues(row: Columns) -> PreferencePair:
    """Whole dialogues, or the dialogue of the `prompt` column and how it goes on."""
    prompt = text(row, "prompt") if row.get("prompt") else ""
    chosen, rejected = (_messages(prompt + text(row, side)) for side in ("chosen", "rejected"))
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        raise RejectedRow("roles", "the dialogue does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise RejectedRow("prompts_differ")
    return make_pair(row, chosen[:-1], chosen[-1], rejected[-1])


def _messages(dialogue: str) -> Messages:
    before, *turns = TURN.split(dialogue)  # "", "Human", its text, "Assistant", its text, …
    if before.strip() or not turns:
        raise RejectedRow(
            "wrong_type", "the dialogue does not begin with a Human: or Assistant: turn"
        )
    spoken = zip(turns[::2], turns[1::2], strict=True)
    return tuple({"role": ROLES[turn], "content": content.strip()} for turn, content in spoken)
