"""PreferencePair: one comparison as text, whatever the row looked like."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tbpo_cli.data.sources import Row
from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Data

Messages = tuple[dict[str, str], ...]


class RejectedRow(Exception):  # noqa: N818 - a result, not a failure
    """A row that cannot be used. `reason` is a stable code, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class PreferencePair:
    """One comparison as chat messages, {"role", "content"} each.

    Args:
        pair_id: 16 hex digits of the hash of the texts: the same row has the same id everywhere.
        prompt: the messages before the response.
        chosen: the preferred response, one message or more.
        rejected: the other one; () for a demonstration, which only `sft` can use.
    """

    pair_id: str
    prompt: Messages
    chosen: Messages
    rejected: Messages

    @property
    def prompt_hash(self) -> str:
        return _hash(self.prompt)


def make_pair(prompt: Messages, chosen: Messages, rejected: Messages) -> PreferencePair:
    """A checked pair.

    Raises:
        RejectedRow: empty_prompt, empty_response, invalid_text, or identical (the two responses are the same).
    """
    if not prompt or not any(message["content"].strip() for message in prompt):
        raise RejectedRow("empty_prompt")
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if response and not response[-1]["content"].strip():
            raise RejectedRow("empty_response", f"{side} is empty")
    for message in (*prompt, *chosen, *rejected):
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise RejectedRow("invalid_text", f"{message['role']}: {error.reason}") from None
    if chosen == rejected:
        raise RejectedRow("identical", "chosen and rejected are the same")
    return PreferencePair(_hash((prompt, chosen, rejected)), prompt, chosen, rejected)


def _hash(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=True)  # ASCII, so that a lone surrogate can be hashed as well
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------- formats


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        raise RejectedRow("null_column", column)
    if not isinstance(value, str):
        raise RejectedRow("wrong_type", f"{column} is {type(value).__name__}, not text")
    return value


def _messages(row: dict[str, Any], column: str) -> Messages:
    value = row[column]
    if value is None:
        raise RejectedRow("null_column", column)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RejectedRow("wrong_type", f"{column} is no list of messages")
    messages = []
    for message in value:
        role, content = message.get("role"), message.get("content")
        if role not in {"system", "user", "assistant"}:
            raise RejectedRow("unknown_role", f"{column}: {role!r}")
        if not isinstance(content, str):
            raise RejectedRow("wrong_type", f"{column}: a message's content is {type(content).__name__}, not text")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _user(text: str) -> Messages:
    return ({"role": "user", "content": text},)


def _assistant(text: str) -> Messages:
    return ({"role": "assistant", "content": text},)


def _from_prompt(row: dict[str, Any]) -> PreferencePair:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    return make_pair(_user(_text(row, "prompt")), _assistant(chosen), _assistant(rejected))


def _from_messages(row: dict[str, Any]) -> PreferencePair:
    """Whole conversations or bare responses; the prompt is the `prompt` column's messages, or what both begin with."""
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    prompt = _messages(row, "prompt") if isinstance(row.get("prompt"), list) else ()
    if not prompt or chosen[: len(prompt)] == prompt:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not chosen or not rejected:
        raise RejectedRow("empty_response", "no message after the prompt")
    if any(response[0]["role"] != "assistant" for response in (chosen, rejected)):
        raise RejectedRow("prompts_differ", "the conversations part at a message that is not the assistant's")
    return make_pair(prompt, chosen, rejected)


HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh_messages(text: str) -> Messages:
    """An HH-RLHF dialogue as messages. Source: the format of arXiv 2204.05862's released data."""
    before, *turns = HH_TURN.split(text)  # "", "Human", its text, "Assistant", its text, …
    if before.strip() or not turns:
        raise RejectedRow("wrong_type", "the dialogue does not begin with a Human: or Assistant: turn")
    return tuple(
        {"role": HH_ROLES[turn], "content": content.strip()}
        for turn, content in zip(turns[::2], turns[1::2], strict=True)
    )


def _from_hh(row: dict[str, Any]) -> PreferencePair:
    chosen, rejected = _hh_messages(_text(row, "chosen")), _hh_messages(_text(row, "rejected"))
    for side in (chosen, rejected):
        if side[-1]["role"] != "assistant":
            raise RejectedRow("roles", "the dialogue does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise RejectedRow("prompts_differ")
    return make_pair(chosen[:-1], chosen[-1:], rejected[-1:])


def _from_sft_prompt(row: dict[str, Any]) -> PreferencePair:
    return make_pair(_user(_text(row, "prompt")), _assistant(_text(row, "completion")), ())


def _from_sft_messages(row: dict[str, Any]) -> PreferencePair:
    messages = _messages(row, "messages")
    if not messages or messages[-1]["role"] != "assistant":
        raise RejectedRow("roles", "the conversation does not end with the assistant")
    return make_pair(messages[:-1], messages[-1:], ())


@dataclass(frozen=True)
class Format:
    """The columns a row must have, a sign by which its first row is recognised, and how to read it."""

    columns: tuple[str, ...]
    recognise: Callable[[dict[str, Any]], bool]
    parse: Callable[[dict[str, Any]], PreferencePair]


FORMATS = {
    "prompt": Format(("prompt", "chosen", "rejected"), lambda row: isinstance(row["chosen"], str), _from_prompt),
    "messages": Format(("chosen", "rejected"), lambda row: isinstance(row["chosen"], list), _from_messages),
    "hh": Format(("chosen", "rejected"), lambda row: HH_TURN.search(str(row["chosen"])) is not None, _from_hh),
    "sft_prompt": Format(("prompt", "completion"), lambda row: True, _from_sft_prompt),
    "sft_messages": Format(("messages",), lambda row: True, _from_sft_messages),
}


def recognise(row: Row, data: Data) -> str:
    """The name of the row's format: `data.format`, or the first of FORMATS that fits.

    Raises:
        TbpoError: if none fits, with the columns that are there.
    """
    if data.format != "auto":
        return data.format
    content = _renamed(row.content, data.columns)
    for name, candidate in FORMATS.items():
        if isinstance(content, dict) and all(c in content for c in candidate.columns) and candidate.recognise(content):
            return name
    columns = ", ".join(content) if isinstance(content, dict) else f"no columns: {type(content).__name__}"
    raise TbpoError(
        "the row has none of the known formats",
        f"{row.source}, row {row.number}; its columns: {columns}",
        "; ".join(f"{name}: {' + '.join(f.columns)}" for name, f in FORMATS.items()),
        'name the columns, e.g. [data.columns] prompt = "question"',
    )


def to_pair(row: Row, format_name: str, columns: dict[str, str]) -> PreferencePair:
    """The row as a pair.

    Raises:
        RejectedRow: with the reason why it cannot be used.
    """
    content = _renamed(row.content, columns)
    if not isinstance(content, dict):
        raise RejectedRow("wrong_type", f"the row is {type(content).__name__}, not a table of columns")
    for column in FORMATS[format_name].columns:
        if column not in content:
            raise RejectedRow("missing_column", column)
    return FORMATS[format_name].parse(content)


def _renamed(content: Any, columns: dict[str, str]) -> Any:
    if not isinstance(content, dict):
        return content
    return content | {ours: content[theirs] for ours, theirs in columns.items() if theirs in content}
