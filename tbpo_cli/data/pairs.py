"""PreferencePair: one comparison as text, whatever the row looked like."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tbpo_cli.data.sources import Field

# role, content; of an assistant also tool_calls, of a tool also name and tool_call_id; of a
# response also is_cut, where a limit and not the model ended it
Message = dict[str, Any]
Messages = tuple[Message, ...]
Tools = tuple[dict[str, Any], ...]  # JSON schemas

# What a template may render of a message beside its role and its content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", *REASONING_KEYS)
# The roles that may come before each role; "" is the start of the conversation.
ROLES_BEFORE = {
    "system": {""},
    "user": {"", "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


# Of a weight that is not 0: products with losses and sums over a step stay far inside of fp32.
MIN_WEIGHT = 1e-20
MAX_WEIGHT = 1e20

Noted = Counter[str]  # by reason: how many answers of a row are left out, or never chosen


class RejectedRow(Exception):  # noqa: N818 - a result, not a failure
    """A row that cannot be used. `reason` is a stable code, `detail` says more, and `noted` counts
    its answers that are left out.
    """

    def __init__(self, reason: str, detail: str = "", noted: Noted | None = None) -> None:
        super().__init__(reason, detail, noted)
        self.reason = reason
        self.detail = detail
        self.noted = noted or Noted()


@dataclass(frozen=True)
class PreferencePair:
    """One comparison as chat messages.

    Args:
        pair_id: 16 hex digits of the hash of the texts: the same comparison has the same id
            everywhere.
        reversed_id: the id it would have with chosen and rejected exchanged.
        prompt_hash: 16 hex digits of the hash of prompt and tools.
        prompt: the messages before the response.
        chosen: the preferred response, an assistant's message.
        rejected: the other one; None for a demonstration, which only `sft` can use.
        tools: JSON schemas of the functions that the assistant may call.
        score_margin: score_chosen − score_rejected, for rows that have both.
        weight: how much the pair counts for in a step's loss: 0, or from MIN_WEIGHT to
            MAX_WEIGHT; 1 without the column.
    """

    pair_id: str
    reversed_id: str
    prompt_hash: str
    prompt: Messages
    chosen: Message
    rejected: Message | None
    tools: Tools = ()
    score_margin: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class MadePairs:
    """The pairs of a row, and how many of its answers are left out or never chosen, by reason."""

    pairs: list[PreferencePair]
    noted: Noted = field(default_factory=Noted)


def make_pair(
    row: dict[str, Any], prompt: Messages, chosen: Message, rejected: Message | None
) -> PreferencePair:
    """A checked pair, with the row's `tools`, `weight` and scores if it has them.

    Raises:
        RejectedRow: roles, empty_prompt, empty_response, identical, invalid_text, bad_weight, or
            wrong_type (of the tools).
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
    about = (tools, _score_margin(row), weight_of(row))
    return PreferencePair(pair_id, reversed_id, prompt_hash, prompt, chosen, rejected, *about)


def weight_of(row: dict[str, Any]) -> float:
    """The `weight` column: 0, or a number from MIN_WEIGHT to MAX_WEIGHT; 1 in a row without it.

    A text is a number only in a file of a format that has nothing but texts.

    Raises:
        RejectedRow: bad_weight.
    """
    weight = row.get("weight", 1.0)
    number = math.nan
    if isinstance(weight, int | float | Decimal | Field) and not isinstance(weight, bool):
        with suppress(ValueError, OverflowError):  # a text that is no number; a very long integer
            number = float(weight)
    if number != 0 and not MIN_WEIGHT <= number <= MAX_WEIGHT:
        expected = f"0, or a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
        raise RejectedRow("bad_weight", f"weight is {weight!r:.40}, not {expected}")
    return abs(number)  # of -0.0 as well


def draw(seed: int, text: str) -> float:
    """A number in [0, 1) that the seed and the text decide."""
    digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _check_roles(messages: Messages) -> None:
    roles = ["", *(message["role"] for message in messages)]
    for number, (before, role) in enumerate(itertools.pairwise(roles), 1):
        if before not in ROLES_BEFORE[role]:
            raise RejectedRow(
                "roles", f"message {number} is of {role}, after {before or 'no message'}"
            )


def _tools(row: dict[str, Any]) -> Tools:
    """The `tools` column: a list of schemas, or that list as JSON text."""
    tools = row.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise RejectedRow("wrong_type", f"tools is not JSON: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RejectedRow("wrong_type", "tools is no list of JSON schemas")
    return tuple(tools)


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
