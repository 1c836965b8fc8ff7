"""What the formats have in common: a column of a row as text, as messages, as one answer."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from tbpo_cli.data.pairs import (
    MESSAGE_KEYS,
    REASONING_KEYS,
    ROLES_BEFORE,
    Message,
    Messages,
    RejectedRow,
)

Columns = dict[str, Any]  # of one row, by their names


def text(row: Columns, column: str) -> str:
    """A column of text. Raises RejectedRow: wrong_type."""
    value = row[column]
    if not isinstance(value, str):
        raise RejectedRow("wrong_type", f"{column} is {type(value).__name__}, not text")
    return value


def messages(row: Columns, column: str, role_of_text: str = "") -> Messages:
    """A column of messages. Raises RejectedRow: wrong_type, unknown_role.

    Args:
        role_of_text: where the column may also hold text, the role of the one message that it is.
    """
    value = row[column]
    if role_of_text and not isinstance(value, list):
        return ({"role": role_of_text, "content": text(row, column)},)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RejectedRow("wrong_type", f"{column} is not a list of messages")
    return tuple(_message(message, column) for message in value)


def _message(given: Columns, column: str) -> Message:
    role = given.get("role")
    if role not in [*ROLES_BEFORE]:
        raise RejectedRow("unknown_role", f"{column}: {role!r}")
    calls = given.get("tool_calls") or given.get("function_call")
    message = {"role": role, "content": _content(given.get("content"), bool(calls), column)}
    message |= {key: given[key] for key in MESSAGE_KEYS if given.get(key)}
    if calls:
        message["tool_calls"] = _calls(calls, column)
    for key in REASONING_KEYS:
        if not isinstance(message.get(key, ""), str):
            raise RejectedRow("wrong_type", f"{column}: {key} of a message is not text")
    return message


def _content(content: Any, has_calls: bool, column: str) -> str:
    """A message's text: text, a list of parts of text, or nothing beside calls of tools."""
    if content is None and has_calls:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        if len(parts) < len(content):
            kinds = sorted({str(part.get("type", "text")) for part in content} - {"text"})
            raise RejectedRow("wrong_type", f"{column}: a message has {', '.join(kinds)}, not text")
        if all(isinstance(part, str) for part in parts):
            return "".join(part for part in parts if part)
    if not isinstance(content, str):
        found = type(content).__name__
        raise RejectedRow("wrong_type", f"{column}: the content of a message is {found}, not text")
    return content


def _calls(calls: Any, column: str) -> list[Columns]:
    """Calls of tools in one form, {"type": "function", "function": {"name", "arguments"}}.

    Arguments that are a JSON object as text, as OpenAI's API gives them, become that object.
    """
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RejectedRow("wrong_type", f"{column}: a call of a tool has no name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError):
                parsed = json.loads(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
        outer = {key: call[key] for key in ("id", "index") if call.get(key) is not None}
        function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        made.append({**outer, "type": "function", "function": function})
    return made


def prompt(row: Columns) -> Messages:
    """The `system` column as a message, then the `prompt` column, text or messages."""
    asked = messages(row, "prompt", role_of_text="user")
    if not row.get("system"):
        return asked
    return ({"role": "system", "content": text(row, "system")}, *asked)


def answer(row: Columns, column: str) -> Message:
    """A column with one message of the assistant, or its text. Raises RejectedRow: roles."""
    found = messages(row, column, role_of_text="assistant")
    if [message["role"] for message in found] != ["assistant"]:
        raise RejectedRow("roles", f"{column} is not one message of the assistant")
    return found[0]
