"""`messages`: two conversations, of which the last message is compared, or two bare answers."""

from __future__ import annotations

from tbpo_cli.data.formats.columns import Columns, messages, prompt
from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, make_pair


def is_conversations(row: Columns) -> bool:
    """Whether a row with the columns of this format is of it."""
    return isinstance(row["chosen"], list)


def from_conversations(row: Columns) -> PreferencePair:
    """Whole conversations, whose prompt is what both begin with, or bare answers to `prompt`."""
    chosen, rejected = messages(row, "chosen"), messages(row, "rejected")
    if not chosen or not rejected:
        raise RejectedRow("empty_response", "no message in it")
    if row.get("prompt") and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        asked = prompt(row)
    else:
        num_shared = _num_shared(chosen, rejected)
        asked = chosen[:num_shared]
        chosen, rejected = chosen[num_shared:], rejected[num_shared:]
    if any(response[0]["role"] != "assistant" for response in (chosen, rejected)):
        raise RejectedRow("prompts_differ", "the conversations part before the assistant's message")
    if len(chosen) > 1 or len(rejected) > 1:
        raise RejectedRow(
            "extra_messages", "messages follow the one in which the conversations part"
        )
    return make_pair(row, asked, chosen[0], rejected[0])


def _num_shared(chosen: Messages, rejected: Messages) -> int:
    """Messages that both begin with, without the last one of either."""
    num_shared = 0
    longest = min(len(chosen), len(rejected)) - 1
    while num_shared < longest and chosen[num_shared] == rejected[num_shared]:
        num_shared += 1
    return num_shared
