"""`sft_prompt` and `sft_messages`: one answer to a prompt, for `tbpo sft` alone."""

from __future__ import annotations

from tbpo_cli.data.formats.columns import Columns, answer, messages, prompt
from tbpo_cli.data.pairs import PreferencePair, RejectedRow, make_pair


def from_completion(row: Columns) -> PreferencePair:
    """{"prompt": "hello", "completion": "hi"}, each text or messages."""
    return make_pair(row, prompt(row), answer(row, "completion"), None)


def from_chat(row: Columns) -> PreferencePair:
    """{"messages": [...]}, of which the last, the assistant's, is the answer."""
    chat = messages(row, "messages")
    if not chat or chat[-1]["role"] != "assistant":
        raise RejectedRow("roles", "the conversation does not end with the assistant")
    return make_pair(row, chat[:-1], chat[-1], None)
