"""One message of a conversation, in the format of any of the known tools."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from tbpo_cli.data.pairs import MESSAGE_KEYS, REASONING_KEYS, ROLES_BEFORE, Message, RejectedRow

# Other names of the roles: ShareGPT's, OpenAI's newer ones, Gemini's, Llama's.
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}


def read_message(given: dict[str, Any], column: str) -> Message:
    """A message from {"role", "content"}, or ShareGPT's {"from", "value"}, with what else it has.

    Raises:
        RejectedRow: unknown_role; wrong_type, for a content that is not text.
    """
    said = given.get("role") or given.get("from")
    role = OTHER_ROLES.get(str(said), said)
    if role not in ROLES_BEFORE:
        raise RejectedRow("unknown_role", f"{column}: {said!r}")
    content = given.get("content", given.get("value"))
    calls = given.get("tool_calls") or given.get("function_call")
    if said == "function_call" and isinstance(content, str):
        calls = _json_or_text(content)
        content = None
    message = {"role": role, "content": _text_of(content, bool(calls), column)}
    message |= {key: given[key] for key in MESSAGE_KEYS if given.get(key)}
    if calls:
        message["tool_calls"] = _calls(calls, column)
    for key in REASONING_KEYS:
        if not isinstance(message.get(key, ""), str):
            raise RejectedRow("wrong_type", f"{column}: {key} of a message is not text")
    return message


def _text_of(content: Any, has_calls: bool, column: str) -> str:
    """The content: text, a list of parts of text, or nothing beside calls of tools."""
    if content is None and has_calls:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = sorted({str(part.get("type", "text")) for part in content} - {"text"})
        if kinds:
            raise RejectedRow("wrong_type", f"{column}: a message has {', '.join(kinds)}, not text")
        parts = [part.get("text") for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(part for part in parts if part)
    if not isinstance(content, str):
        found = type(content).__name__
        raise RejectedRow("wrong_type", f"{column}: the content of a message is {found}, not text")
    return content


def _calls(calls: Any, column: str) -> list[dict[str, Any]]:
    """Calls of tools in one form: {"type": "function", "function": {"name", "arguments"}}.

    Arguments that are a JSON object as text, as OpenAI's API gives them, become that object.

    Raises:
        RejectedRow: wrong_type, if a call has no name, or arguments that are no JSON object.
    """
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RejectedRow("wrong_type", f"{column}: a call of a tool has no name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json_or_text(arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            name = function["name"]
            raise RejectedRow(
                "wrong_type", f"{column}: the arguments of the call of {name} are no JSON object"
            )
        outer = {key: call[key] for key in ("id", "index") if call.get(key) is not None}
        function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        made.append({**outer, "type": "function", "function": function})
    return made


def _json_or_text(text: str) -> Any:
    with suppress(ValueError):
        return json.loads(text)
    return text
