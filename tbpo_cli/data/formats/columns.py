"""What the formats have in common: a column of a row as text, as messages, as one answer."""

from __future__ import annotations

from typing import Any

from tbpo_cli.data.pairs import (
    MESSAGE_KEYS,
    ROLES_BEFORE,
    Message,
    Messages,
    RejectedRow,
    without_nulls,
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
    role, content = given.get("role"), given.get("content")
    if role not in [*ROLES_BEFORE]:
        raise RejectedRow("unknown_role", f"{column}: {role!r}")
    if content is None and given.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        found = type(content).__name__
        raise RejectedRow("wrong_type", f"{column}: the content of a message is {found}, not text")
    kept = {key: given.get(key) for key in MESSAGE_KEYS} | {"content": content}
    message: Message = without_nulls(kept)
    return message


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
