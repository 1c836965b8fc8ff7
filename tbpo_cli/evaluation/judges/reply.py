"""What a server of chat completions answers. Nothing of it is trusted: each value is checked here,
once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_TOKENS = 2**40  # that a server may say it has read or written
CUT = {"length", "max_tokens", "content_filter"}  # finish reasons of an answer that is not whole


@dataclass(frozen=True)
class Reply:
    """What the server answers to one request.

    Args:
        text: of the completion.
        finish_reason: why it ended there, in the server's word.
        logp: log-probability of its tokens together, nats; None if the server does not say.
        prompt_tokens: that the server has read.
        completion_tokens: that it has written.
        refused: why it does not answer this request, if it does not.

    Raises:
        ValueError: for a value that is none of these.
    """

    text: str
    finish_reason: str = ""
    logp: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: str = ""

    def __post_init__(self) -> None:
        texts = (self.text, self.finish_reason, self.refused)
        counts = (self.prompt_tokens, self.completion_tokens)
        if not all(isinstance(text, str) and _is_unicode(text) for text in texts):
            raise ValueError("its text is no text")
        if not all(type(count) is int and 0 <= count <= MAX_TOKENS for count in counts):
            raise ValueError("its numbers of tokens are no numbers of tokens")
        if self.logp is not None and not (
            isinstance(self.logp, float) and math.isfinite(self.logp)
        ):
            raise ValueError("its log-probability is not finite")

    @property
    def was_cut(self) -> bool:
        """Whether the answer stops at a limit, and not where the model ended it."""
        return self.finish_reason in CUT


def read_reply(text: str) -> Reply:
    """The reply in the body of an answer.

    A number of tokens or a log-probability that cannot be one counts as not given; half of a
    surrogate pair (an emoji that was cut) becomes the replacement character.

    Raises:
        ValueError: if the body is no chat completion; the message completes "the answer".
    """
    try:
        answer = json.loads(text, parse_constant=_refuse)
    except ValueError:
        raise ValueError("it is not JSON") from None
    except RecursionError:
        raise ValueError("it is nested without end") from None
    match answer:
        case {"choices": [{"message": {**message}, **choice}, *_]}:
            content = message.get("content") or ""
        case _:
            raise ValueError("it has no choices[0].message")
    if not isinstance(content, str):
        raise ValueError("its content is no text")
    given = answer.get("usage")
    usage = given if isinstance(given, dict) else {}
    return Reply(
        _whole_characters(content),
        _whole_characters(str(choice.get("finish_reason") or "")[:40]),
        _logp(choice.get("logprobs")),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else 0


def _logp(logprobs: Any) -> float | None:
    """The sum over the tokens of a completion; None if one of them has no log-probability."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or not tokens:
        return None
    values: list[Any] = [
        token.get("logprob") if isinstance(token, dict) else None for token in tokens
    ]
    if not all(isinstance(value, int | float) and -1e9 < value < 1e-3 for value in values):
        return None
    return float(sum(values))


def _is_unicode(text: str) -> bool:
    return text == _whole_characters(text)


def _whole_characters(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
