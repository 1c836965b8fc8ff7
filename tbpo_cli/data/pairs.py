"""PreferencePair: one comparison as text, whatever the row looked like."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tbpo_cli.config.recipe import Data
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row
from tbpo_cli.errors import TbpoError

Message = dict[
    str, Any
]  # role, content; of an assistant also tool_calls, of a tool also name and tool_call_id
Messages = tuple[Message, ...]

# What a template may render of a message; any other key is left out.
MESSAGE_KEYS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "thinking",
)
# The roles that may come before each role; "" is the start of the conversation.
ROLES_BEFORE = {
    "system": {""},
    "user": {"", "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


class RejectedRow(Exception):  # noqa: N818 - a result, not a failure
    """A row that cannot be used. `reason` is a stable code, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class PreferencePair:
    """One comparison as chat messages.

    Args:
        pair_id: 16 hex digits of the hash of the texts: the same comparison has the same id everywhere.
        reversed_id: the id it would have with chosen and rejected exchanged.
        prompt_hash: 16 hex digits of the hash of prompt and tools.
        prompt: the messages before the response.
        chosen: the preferred response, an assistant's message.
        rejected: the other one; None for a demonstration, which only `sft` can use.
        tools: JSON schemas of the functions that the assistant may call.
        score_margin: score_chosen − score_rejected, for rows that have both.
    """

    pair_id: str
    reversed_id: str
    prompt_hash: str
    prompt: Messages
    chosen: Message
    rejected: Message | None
    tools: tuple[dict[str, Any], ...] = ()
    score_margin: float | None = None


def make_pair(
    row: dict[str, Any], prompt: Messages, chosen: Message, rejected: Message | None
) -> PreferencePair:
    """A checked pair, with the row's `tools`, `score_chosen` and `score_rejected` if it has them.

    Raises:
        RejectedRow: roles, empty_prompt, empty_response, identical, invalid_text, or wrong_type (of the tools).
    """
    _check_roles((*prompt, chosen))
    if not any(message["content"].strip() for message in prompt):
        raise RejectedRow("empty_prompt")
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if response and not (response["content"].strip() or response.get("tool_calls")):
            raise RejectedRow("empty_response", f"{side} is empty")
    if chosen == rejected:
        raise RejectedRow("identical", "chosen and rejected are the same")
    tools = _tools(row)
    prompt_hash, *responses = (_hash(content) for content in ((prompt, tools), chosen, rejected))
    pair_id, reversed_id = (_hash((prompt_hash, *order)) for order in (responses, responses[::-1]))
    return PreferencePair(
        pair_id, reversed_id, prompt_hash, prompt, chosen, rejected, tools, _score_margin(row)
    )


def _check_roles(messages: Messages) -> None:
    roles = ["", *(message["role"] for message in messages)]
    for number, (before, role) in enumerate(itertools.pairwise(roles), 1):
        if before not in ROLES_BEFORE[role]:
            raise RejectedRow(
                "roles", f"message {number} is of {role}, after {before or 'no message'}"
            )


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The `tools` column: a list of schemas, or that list as JSON text."""
    tools = row.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise RejectedRow("wrong_type", f"tools is not JSON: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RejectedRow("wrong_type", "tools is no list of JSON schemas")
    return tuple(_without_nulls(tools))


def _score_margin(row: dict[str, Any]) -> float | None:
    try:
        return float(row["score_chosen"]) - float(row["score_rejected"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _hash(content: Any) -> str:
    try:
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]
    except UnicodeEncodeError as error:
        raise RejectedRow("invalid_text", error.reason) from None
    except TypeError as error:
        raise RejectedRow("wrong_type", f"not JSON: {error}") from None


def _without_nulls(content: Any) -> Any:
    """JSON without null members: columnar files fill the keys that other rows have with them."""
    if isinstance(content, dict):
        return {key: _without_nulls(value) for key, value in content.items() if value is not None}
    return [_without_nulls(item) for item in content] if isinstance(content, list) else content


# --------------------------------------------------------------------------------------------------------- formats


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RejectedRow("wrong_type", f"{column} is {type(value).__name__}, not text")
    return value


def _messages(row: dict[str, Any], column: str, text_by: str = "") -> Messages:
    """The messages in a column; text, if it may be there, is a message of the role `text_by`."""
    value = row[column]
    if text_by and not isinstance(value, list):
        return ({"role": text_by, "content": _text(row, column)},)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RejectedRow("wrong_type", f"{column} is no list of messages")
    return tuple(_message(message, column) for message in value)


def _message(given: dict[str, Any], column: str) -> Message:
    role, content = given.get("role"), given.get("content")
    if role not in [*ROLES_BEFORE]:
        raise RejectedRow("unknown_role", f"{column}: {role!r}")
    if content is None and given.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RejectedRow(
            "wrong_type", f"{column}: a message's content is {type(content).__name__}, not text"
        )
    message: Message = _without_nulls(
        {key: given.get(key) for key in MESSAGE_KEYS} | {"content": content}
    )
    return message


def _prompt(row: dict[str, Any]) -> Messages:
    """The `prompt` column, text or messages, after the `system` column's text."""
    system = ({"role": "system", "content": _text(row, "system")},) if row.get("system") else ()
    return (*system, *_messages(row, "prompt", "user"))


def read_prompt(row: Any) -> Messages:
    """The prompt of a row with `prompt` (text or messages) or `messages`. Raises RejectedRow if there is none."""
    if not isinstance(row, dict) or not ("prompt" in row or "messages" in row):
        raise RejectedRow("missing_column", "prompt or messages")
    prompt = _prompt(row) if "prompt" in row else _messages(row, "messages")
    return make_pair(
        {}, prompt, {"role": "assistant", "content": "an answer"}, None
    ).prompt  # checked as in a pair


def _answer(row: dict[str, Any], column: str) -> Message:
    messages = _messages(row, column, "assistant")
    if [message["role"] for message in messages] != ["assistant"]:
        raise RejectedRow("roles", f"{column} is not one message of the assistant")
    return messages[0]


def _from_prompt(row: dict[str, Any]) -> PreferencePair:
    return make_pair(row, _prompt(row), _answer(row, "chosen"), _answer(row, "rejected"))


def _from_messages(row: dict[str, Any]) -> PreferencePair:
    """Whole conversations, whose prompt is what both begin with, or bare responses to the `prompt` column."""
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if not chosen or not rejected:
        raise RejectedRow("empty_response", "no message in it")
    if row.get("prompt") and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = _prompt(row)
    else:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if any(response[0]["role"] != "assistant" for response in (chosen, rejected)):
        raise RejectedRow("prompts_differ", "the conversations part before the assistant's message")
    if len(chosen) > 1 or len(rejected) > 1:
        raise RejectedRow(
            "extra_messages", "messages follow the one in which the conversations part"
        )
    return make_pair(row, prompt, chosen[0], rejected[0])


HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh_messages(text: str) -> Messages:
    """An HH-RLHF dialogue as messages. Source: the format of arXiv 2204.05862's released data."""
    before, *turns = HH_TURN.split(text)  # "", "Human", its text, "Assistant", its text, …
    if before.strip() or not turns:
        raise RejectedRow(
            "wrong_type", "the dialogue does not begin with a Human: or Assistant: turn"
        )
    spoken = zip(turns[::2], turns[1::2], strict=True)
    return tuple({"role": HH_ROLES[turn], "content": content.strip()} for turn, content in spoken)


def _from_hh(row: dict[str, Any]) -> PreferencePair:
    """Whole dialogues, or the `prompt` column's dialogue and how it goes on."""
    prompt = _text(row, "prompt") if row.get("prompt") else ""
    chosen, rejected = (_hh_messages(prompt + _text(row, side)) for side in ("chosen", "rejected"))
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        raise RejectedRow("roles", "the dialogue does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise RejectedRow("prompts_differ")
    return make_pair(row, chosen[:-1], chosen[-1], rejected[-1])


def _from_sft_prompt(row: dict[str, Any]) -> PreferencePair:
    return make_pair(row, _prompt(row), _answer(row, "completion"), None)


def _from_sft_messages(row: dict[str, Any]) -> PreferencePair:
    messages = _messages(row, "messages")
    if not messages or messages[-1]["role"] != "assistant":
        raise RejectedRow("roles", "the conversation does not end with the assistant")
    return make_pair(row, messages[:-1], messages[-1], None)


@dataclass(frozen=True)
class Format:
    """The columns a row must have, not null, how to read it, and a further sign by which a first row is recognised."""

    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], PreferencePair]
    recognise: Callable[[dict[str, Any]], bool] = lambda row: True


def _is_dialogue(row: dict[str, Any]) -> bool:
    return HH_TURN.match(str(row.get("prompt") or row["chosen"]).lstrip("\n")) is not None


FORMATS = {
    "hh": Format(("chosen", "rejected"), _from_hh, _is_dialogue),
    "prompt": Format(
        ("prompt", "chosen", "rejected"), _from_prompt, lambda row: isinstance(row["chosen"], str)
    ),
    "messages": Format(
        ("chosen", "rejected"), _from_messages, lambda row: isinstance(row["chosen"], list)
    ),
    "sft_prompt": Format(("prompt", "completion"), _from_sft_prompt),
    "sft_messages": Format(("messages",), _from_sft_messages),
}


def recognise(rows: Iterator[Row], data: Data) -> tuple[str, Iterator[Row]]:
    """The rows' format, `data.format` or the first of FORMATS that fits the first row that any fits; and all rows.

    Raises:
        TbpoError: if none fits, with the columns of the first row.
    """
    first = list(itertools.islice(rows, ROWS_AT_A_TIME))
    rows = itertools.chain(first, rows)
    if data.format != "auto" or not first:
        return data.format, rows
    contents = [_renamed(row.content, data.columns) for row in first]
    for content in contents:
        for name, known in FORMATS.items():
            if (
                isinstance(content, dict)
                and all(c in content for c in known.columns)
                and known.recognise(content)
            ):
                return name, rows
    columns = (
        ", ".join(contents[0])
        if isinstance(contents[0], dict)
        else f"none, it is {type(contents[0]).__name__}"
    )
    where = f"{first[0].source}, row {first[0].number}; its columns: {columns}"
    formats = "; ".join(f"{name}: {' + '.join(f.columns)}" for name, f in FORMATS.items())
    fix = 'name the columns, e.g. [data.columns] prompt = "question"'
    raise TbpoError("the rows have none of the known formats", where, formats, fix)


def to_pair(row: Row, format_name: str, columns: dict[str, str]) -> PreferencePair:
    """The row as a pair.

    Raises:
        RejectedRow: with the reason why it cannot be used.
    """
    content = _renamed(row.content, columns)
    if not isinstance(content, dict):
        raise RejectedRow(
            "wrong_type", f"the row is {type(content).__name__}, not a table of columns"
        )
    for column in FORMATS[format_name].columns:
        if content.get(column) is None:
            raise RejectedRow("null_column" if column in content else "missing_column", column)
    return FORMATS[format_name].parse(content)


def _renamed(content: Any, columns: dict[str, str]) -> Any:
    if not isinstance(content, dict):
        return content
    return content | {
        ours: content[theirs] for ours, theirs in columns.items() if theirs in content
    }
