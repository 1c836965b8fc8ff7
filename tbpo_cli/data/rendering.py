"""Checks that a chat template renders all that a row says.

Its texts are looked for in the rendering. A text that may also stand there for another reason (it
is short, or a part of another text of the row, or of the template) is tried: each text is given a
mark that nothing else has, and the marks are looked for in another rendering.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tbpo_cli.data.encoder import unmask
from tbpo_cli.data.pairs import REASONING_KEYS, Message, Messages, RejectedRow, Tools

# Takes a text, or a value of JSON, and in words what it is; gives what stands in its place.
Change = Callable[[Any, str], Any]

THINKING = re.compile(r"(</?think(?:ing)?>)")
SHORT = 12  # characters that may stand in any rendering by chance
FIRST_NUMBER = 481_516_234_200_000  # marks of numbers are counted from here


def changed_answer(answer: Message, change: Change) -> Message:
    """An answer, in which `change` has replaced each part that its rendering must have.

    The tags around reasoning are not such parts: a template may write others, or have them in the
    generation prompt.
    """
    made = dict(answer)
    for key in REASONING_KEYS:
        if key in answer:
            made[key] = change(answer[key], f"the answer's {key}")
    *thoughts, said = THINKING.split(answer["content"])
    made["content"] = "".join(
        [
            part if THINKING.fullmatch(part) else change(part, "the answer's reasoning in <think>")
            for part in thoughts
        ]
        + [change(said, "the answer's text")]
    )
    return _with_changed_calls(made, change)


def changed_prompt(prompt: Messages, tools: Tools, change: Change) -> tuple[Messages, Tools]:
    """A prompt, in which `change` has replaced each part that its rendering must have.

    Text and reasoning of earlier answers are not such parts: a template may shorten them, at
    inference as well.
    """
    messages = []
    for message in prompt:
        made = dict(message)
        if message["role"] != "assistant":
            made["content"] = change(message["content"], f"the message of {message['role']}")
        messages.append(_with_changed_calls(made, change))
    return tuple(messages), tuple(_with_changed_name(tool, "the tool", change) for tool in tools)


def _with_changed_calls(message: Message, change: Change) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        what = f"an argument of the call of {_function(call).get('name')}"
        made = _with_changed_name(call, "the call of the tool", change)
        function = _function(made)
        if "arguments" in function:
            function["arguments"] = _changed_json(function["arguments"], what, change)
        calls.append(made)
    return {**message, "tool_calls": calls}


def _with_changed_name(tool: dict[str, Any], what: str, change: Change) -> dict[str, Any]:
    """A copy of a tool, or of a call of one, with its name replaced."""
    function = dict(_function(tool))
    if "name" in function:
        function["name"] = change(str(function["name"]), what)
    return {**tool, "function": function} if "function" in tool else function


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """The part of a tool, or of a call of one, that has its name."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}


def _changed_json(content: Any, what: str, change: Change) -> Any:
    """Nested JSON with all keys and values replaced."""
    if isinstance(content, dict):
        return {
            change(key, what): _changed_json(value, what, change) for key, value in content.items()
        }
    if isinstance(content, list):
        return [_changed_json(item, what, change) for item in content]
    return change(content, what)


@dataclass(frozen=True)
class Part:
    """A text of a row, or a value of JSON, and in words what it is."""

    value: Any
    what: str

    def __str__(self) -> str:
        return f"{self.what}: {_excerpt(str(self.value))}"


def check_rendering(
    text: str,
    row: Any,
    template: str,
    change_all: Callable[[Change], Any],
    render: Callable[[Any], str],
) -> None:
    """Checks that a rendering has all parts of what was rendered.

    1. Look for each part in the rendering.
    2. If some could be there for another reason, render once more, each with a mark of its own, and
       look for the marks. A template that refuses the marks is believed.

    Args:
        row: all that is rendered.
        template: the template's own text.
        change_all: takes a `Change`; gives the same content with its parts replaced.
        render: renders such content.

    Raises:
        RejectedRow: not_rendered, if a part is not there.
    """
    found = _parts(change_all)
    lost = _left_out(found, unmask(text))
    of_row = "\n".join(squeezed(str(leaf)) for leaf in _leaves(row))
    if lost is None and not _are_clear(found, of_row, template):
        changed, marked = _marked(change_all, of_row)
        with suppress(RejectedRow):
            again = render(changed).lower()
            lost = next((part for mark, part in marked if mark not in again), None)
    if lost is not None:
        raise RejectedRow("not_rendered", f"the chat template leaves out {lost}")


def _parts(change_all: Callable[[Change], Any]) -> list[Part]:
    """The parts that a function changes, in order."""
    found: list[Part] = []

    def note(value: Any, what: str) -> Any:
        found.append(Part(value, what))
        return value

    change_all(note)
    return found


def _left_out(of: Iterable[Part], rendering: str) -> Part | None:
    """The first part that a rendering lacks.

    White space does not count: templates trim. Text may be written as in JSON.
    """
    there = squeezed(rendering)
    return next((part for part in of if not _is_in(part.value, there)), None)


def _are_clear(of: Iterable[Part], row: str, template: str) -> bool:
    """Whether each part, if it is in a rendering, can be there for no other reason.

    Args:
        row: all texts of the row, a line each, without white space.
        template: the template's own text, without white space.
    """
    texts = [squeezed(str(part.value)) for part in of]
    return all(
        not text or (len(text) >= SHORT and row.count(text) == 1 and text not in template)
        for text in texts
    )


def _marked(change_all: Callable[[Change], Any], row: str) -> tuple[Any, list[tuple[str, Part]]]:
    """The same content with a mark in each part, and the marks.

    Values of JSON in which no mark can be put (truth values, fractions, null) stay as they are.
    """
    name = next(name for n in itertools.count() if (name := f"mark{n}x") not in row)
    found: list[tuple[str, Part]] = []

    def mark(value: Any, what: str) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            number = FIRST_NUMBER + len(found)
            found.append((str(number), Part(value, what)))
            return number
        if not isinstance(value, str) or not value.strip():
            return value
        body = value.rstrip()
        text = f"{name}{len(found)}z"
        found.append((text, Part(value, what)))
        return body + text + value[len(body) :]

    return change_all(mark), found


def _is_in(content: Any, there: str) -> bool:
    """Whether text, or a value of JSON, is in a text without white space, however it is written."""
    if isinstance(content, str):
        forms = {content, *(json.dumps(content, ensure_ascii=a)[1:-1] for a in (True, False))}
    else:
        forms = {json.dumps(content), str(content)}
    return any(squeezed(form) in there for form in forms)


def _leaves(content: Any) -> Iterator[Any]:
    """All keys and values of nested JSON."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _leaves(value)
    elif isinstance(content, list | tuple):
        for item in content:
            yield from _leaves(item)
    else:
        yield content


def squeezed(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def _excerpt(text: str, characters: int = 60) -> str:
    text = " ".join(text.split())
    return json.dumps(
        text[:characters] + ("…" if len(text) > characters else ""), ensure_ascii=False
    )
