"""Whether all that a row says is in what the chat template makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tbpo_cli.data.pairs import REASONING_KEYS, Message, Messages

THINKING = re.compile(r"</?think(?:ing)?>")


def left_out_of_answer(answer: Message, rendering: str) -> str:
    """What a rendered answer lacks of the message, in words; "" if nothing.

    White space does not count: templates trim. Text may be written as in JSON. The tags around
    reasoning in the content may be others, or in the generation prompt.
    """
    there = _squeezed(rendering)
    for key in REASONING_KEYS:
        if key in answer and not _is_in(answer[key], there):
            return f"the answer's {key}: {_excerpt(answer[key])}"
    *thoughts, said = THINKING.split(answer["content"])
    for thought in thoughts:
        if not _is_in(thought, there):
            return f"the answer's reasoning, within <think>: {_excerpt(thought)}"
    if not _is_in(said, there):
        return f"the answer's text: {_excerpt(said)}"
    return next(_left_out_of_calls(answer, there), "")


def left_out_of_prompt(prompt: Messages, tools: tuple[dict[str, Any], ...], rendering: str) -> str:
    """What a rendered prompt lacks, in words; "" if nothing.

    Text and reasoning of earlier answers may be shortened: inference shortens them as well.
    """
    there = _squeezed(rendering)
    for message in prompt:
        if message["role"] != "assistant" and not _is_in(message["content"], there):
            return f"the message of {message['role']}: {_excerpt(message['content'])}"
        for what in _left_out_of_calls(message, there):
            return what
    for tool in tools:
        name = _function(tool).get("name", "")
        if not _is_in(str(name), there):
            return f"the tool {name}"
    return ""


def _left_out_of_calls(message: Message, there: str) -> Iterator[str]:
    for call in message.get("tool_calls", ()):
        function = _function(call)
        name = str(function.get("name", ""))
        if not _is_in(name, there):
            yield f"the call of the tool {name}"
        for argument in _leaves(function.get("arguments")):
            if not _is_in(argument, there):
                yield f"an argument of the call of {name}: {_excerpt(str(argument))}"


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """The part of a tool, or of a call of one, that has its name."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}


def _leaves(content: Any) -> Iterator[Any]:
    """All keys and values of nested JSON."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _leaves(value)
    elif isinstance(content, list):
        for item in content:
            yield from _leaves(item)
    else:
        yield content


def _is_in(content: Any, there: str) -> bool:
    """Whether text, or a value of JSON, is in a text without white space, however it is written."""
    if isinstance(content, str):
        forms = {content, *(json.dumps(content, ensure_ascii=a)[1:-1] for a in (True, False))}
    else:
        forms = {json.dumps(content), str(content)}
    return any(_squeezed(form) in there for form in forms)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _excerpt(text: str, characters: int = 60) -> str:
    text = " ".join(text.split())
    return json.dumps(
        text[:characters] + ("…" if len(text) > characters else ""), ensure_ascii=False
    )
