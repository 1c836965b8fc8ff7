"""What the formats have in common: a column of a row as text, as messages, as one answer."""

from __future__ import annotations

from typing import Any

from tbpo_cli.data.formats.messages import read_message
from tbpo_cli.data.pairs import Message, Messages, RejectedRow

Columns = dict[str, Any]  # of one row, by their names

PROMPTS = ("prompt", "question", "instruction", "query")  # names of the column with the prompt


def first_of(row: Columns, names: tuple[str, ...]) -> str:
    """The first of some names of a column that the row has a value for; "" if none."""
    return next((name for name in names if row.get(name) is not None), "")


def text(row: Columns, column: str) -> str:
    """A column of text. Raises RejectedRow: wrong_type."""
    value = row[column]
    if not isinstance(value, str):
        raise RejectedRow("wrong_type", f"{column} is {type(value).__name__}, not text")
    return value


def messages(row: Columns, column: str, role_of_text: str = "") -> Messages:
    """A column of messages, or with one message. Raises RejectedRow: wrong_type, unknown_role.

    Args:
        role_of_text: where the column may also hold text, the role of the one message that it is.
    """
    value = row[column]
    if isinstance(value, dict):
        value = [value]
    if role_of_text and not isinstance(value, list):
        return ({"role": role_of_text, "content": text(row, column)},)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RejectedRow("wrong_type", f"{column} is not a list of messages")
    return tuple(read_message(message, column) for message in value)


def with_system(row: Columns, asked: Messages) -> Messages:
    """Messages behind one with the text of the `system` column, if the row has one.

    Raises:
        RejectedRow: roles, if they begin with another message of the system.
    """
    if not row.get("system"):
        return asked
    message = {"role": "system", "content": text(row, "system")}
    if not asked or asked[0]["role"] != "system":
        return (message, *asked)
    if asked[0]["content"].strip() != message["content"].strip():
        raise RejectedRow("roles", "the system column and the first message are not the same")
    return asked


def prompt(row: Columns) -> Messages:
    """The system column, then the column with the prompt: text or messages.

    An `input` beside an `instruction` follows it, as in Alpaca's rows.
    """
    column = first_of(row, PROMPTS)
    asked = messages(row, column, role_of_text="user")
    if column == "instruction" and row.get("input") and isinstance(row[column], str):
        asked = ({"role": "user", "content": f"{row[column]}\n\n{text(row, 'input')}"},)
    return with_system(row, asked)


def answer(row: Columns, column: str) -> Message:
    """A column with one message of the assistant, or its text. Raises RejectedRow: roles."""
    found = messages(row, column, role_of_text="assistant")
    if [message["role"] for message in found] != ["assistant"]:
        raise RejectedRow("roles", f"{column} is not one message of the assistant")
    return found[0]
