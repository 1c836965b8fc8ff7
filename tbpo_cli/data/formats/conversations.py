"""`messages`, `sharegpt`, `openai`: conversations, of which the last message is compared."""

from __future__ import annotations

from tbpo_cli.data.formats.columns import (
    PROMPTS,
    Columns,
    answer,
    first_of,
    messages,
    prompt,
    with_system,
)
from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, make_pair


def is_conversations(row: Columns) -> bool:
    """Whether the two sides are messages."""
    chosen = row["chosen"]
    is_texts = isinstance(chosen, list) and bool(chosen) and isinstance(chosen[0], str)
    return isinstance(chosen, list | dict) and not is_texts


def from_conversations(row: Columns) -> PreferencePair:
    """Whole conversations, whose prompt is what both begin with, or bare answers to a prompt."""
    chosen, rejected = messages(row, "chosen"), messages(row, "rejected")
    if not chosen or not rejected:
        raise RejectedRow("empty_response", "no message in it")
    has_prompt = bool(first_of(row, PROMPTS))
    if has_prompt and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        asked = prompt(row)
    else:
        num_shared = _num_shared(chosen, rejected)
        asked = with_system(row, chosen[:num_shared])
        chosen, rejected = chosen[num_shared:], rejected[num_shared:]
        if has_prompt:
            asked = _agreeing(prompt(row), asked)
    if any(response[0]["role"] != "assistant" for response in (chosen, rejected)):
        raise RejectedRow("prompts_differ", "the conversations part before the assistant's message")
    if len(chosen) > 1 or len(rejected) > 1:
        raise RejectedRow(
            "extra_messages", "messages follow the one in which the conversations part"
        )
    return make_pair(row, asked, chosen[0], rejected[0])


def _num_shared(chosen: Messages, rejected: Messages) -> int:
    """Messages that both begin with, without the last one of either."""
    num_shared = 0
    longest = min(len(chosen), len(rejected)) - 1
    while num_shared < longest and chosen[num_shared] == rejected[num_shared]:
        num_shared += 1
    return num_shared


def _agreeing(prompt_column: Messages, asked: Messages) -> Messages:
    """What whole conversations begin with, checked against the column with the prompt.

    A message of the system that only the column has comes first. Of the rest, something must be
    said in both.

    Raises:
        RejectedRow: prompts_differ.
    """
    system = prompt_column[:1] if prompt_column[:1] and prompt_column[0]["role"] == "system" else ()
    if system and asked[:1] and asked[0]["role"] != "system":
        asked = (*system, *asked)
    said = [message["content"].strip() for message in prompt_column[len(system) :]]
    heard = [message["content"].strip() for message in asked if message["role"] == "user"]
    if said and not any(a in b or b in a for a in said for b in heard):
        raise RejectedRow("prompts_differ", "the prompt column is not in the conversations")
    return asked


def from_sharegpt(row: Columns) -> PreferencePair:
    """{"conversations": [{"from", "value"}], "chosen": {"from", "value"}, "rejected": …}."""
    asked = with_system(row, messages(row, "conversations"))
    return make_pair(row, asked, answer(row, "chosen"), answer(row, "rejected"))


def from_openai(row: Columns) -> PreferencePair:
    """{"input": {"messages", "tools"}, "preferred_output": [message], "non_preferred_output": …}.

    Source: OpenAI's fine-tuning API, preference format.
    """
    given = row["input"]
    if not isinstance(given, dict) or not given.get("messages"):
        raise RejectedRow("missing_column", "messages, in input")
    asked = with_system(row, messages(given, "messages"))
    sides = (answer(row, "preferred_output"), answer(row, "non_preferred_output"))
    return make_pair(row | {"tools": given.get("tools")}, asked, *sides)
