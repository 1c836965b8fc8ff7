"""`sft_…`: one answer to a prompt, for `tbpo sft` alone."""

from __future__ import annotations

from tbpo_cli.data.formats.columns import Columns, answer, first_of, messages, prompt, with_system
from tbpo_cli.data.formats.unpaired import is_good
from tbpo_cli.data.pairs import PreferencePair, RejectedRow, make_pair

CHATS = ("messages", "conversations")


def from_completion(row: Columns) -> PreferencePair:
    """{"prompt": "hello", "completion": "hi"}, each text or messages; not if `label` is false."""
    if row.get("label") is not None and not is_good(row):
        raise RejectedRow("unwanted", "label is false: this completion is not to be learned")
    return make_pair(row, prompt(row), answer(row, "completion"), None)


def from_chat(row: Columns) -> PreferencePair:
    """{"messages": [...]}, of which the last, the assistant's, is the answer."""
    chat = with_system(row, messages(row, first_of(row, CHATS)))
    if not chat or chat[-1]["role"] != "assistant":
        raise RejectedRow("roles", "the conversation does not end with the assistant")
    return make_pair(row, chat[:-1], chat[-1], None)


def is_alpaca(row: Columns) -> bool:
    """Whether there is one output: of several, nothing says which is better."""
    return not isinstance(row["output"], list)


def from_alpaca(row: Columns) -> PreferencePair:
    """{"instruction", "input", "output"}, with LLaMA-Factory's "history": [[asked, said], …].

    Source: the rows of Stanford Alpaca; `input` may be empty or absent.
    """
    asked = prompt(row)
    turns = row.get("history") or []
    if not all(
        isinstance(turn, list) and [type(part) for part in turn] == [str, str] for turn in turns
    ):
        raise RejectedRow("wrong_type", "history is not a list of [asked, said]")
    before = [
        {"role": role, "content": part}
        for turn in turns
        for role, part in zip(("user", "assistant"), turn, strict=True)
    ]
    system = asked[:-1]
    last = asked[-1]
    return make_pair(row, (*system, *before, last), answer(row, "output"), None)
