"""The judge that is a language model on a server: `[eval.judge]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Judge as Settings
from tbpo_cli.data.pairs import Messages
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.endpoint import Endpoint, Reply
from tbpo_cli.evaluation.judges.judge import Comparison, Judge, Verdict

TEMPLATE = Path(__file__).parent / "judge.txt"
VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
LAST_LINE = re.compile(
    r"^\W*(?:final )?(?:verdict|answer|winner)?(?: is)?\W*(A|B|C|tie)\W*\Z", re.I | re.M
)


def judge_of(settings: Settings, cache: Path | None = None) -> Judge:
    """A language model that is shown both completions, in both orders.

    Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685, section 3.4: the
    labels [[A]], [[B]], [[C]], and a win only if both orders say so, else a tie. The last label of an answer counts, or
    its last line if that is nothing but a letter. Completions that are the same tie without being shown.

    Raises TbpoError for a template without its places; later, if the server does not answer, or refuses every request.
    """
    path = Path(settings.template or TEMPLATE)
    try:
        template = path.read_text(encoding="utf-8")
        if missing := [name for name in ("{prompt}", "{a}", "{b}") if name not in template]:
            raise ValueError(f"it has no place {' or '.join(missing)}")
    except (OSError, ValueError) as error:
        expected = "a text file with {prompt}, {a} and {b} that asks for [[A]], [[B]] or [[C]]"
        raise TbpoError(
            f"the judge's template cannot be used: {error}", str(path), expected
        ) from None
    endpoint = Endpoint(settings.endpoint, settings.concurrency, settings.timeout, cache)

    def compare(comparisons: Sequence[Comparison]) -> list[Verdict]:
        both = [(one.prompt, one.completion_a, one.completion_b) for one in comparisons]
        asked = [
            request
            for prompt, a, b in both
            if a != b
            for request in ((prompt, a, b), (prompt, b, a))
        ]
        answers = endpoint.ask([_body(settings, template, *request) for request in asked])
        replies = dict(
            console.track(
                answers, f"asking {settings.model}", len(asked), every=len(asked) // 10 + 1
            )
        )
        if asked and all(reply.refused for reply in replies.values()):
            fix = "change eval.judge.body or the template"
            raise TbpoError(replies[0].refused, endpoint.url, "an answer", fix)
        judged = (
            _verdict(settings, replies[place], replies[place + 1])
            for place in range(0, len(asked), 2)
        )
        return [
            next(judged) if a != b else Verdict(0.5, "the completions are the same")
            for _, a, b in both
        ]

    return Judge(settings.model, compare)


def _body(settings: Settings, template: str, prompt: Messages, a: str, b: str) -> dict[str, Any]:
    turns = [f"{message['role']}: {message['content']}" for message in prompt]
    texts = {
        "prompt": "\n\n".join(turns) if len(turns) > 1 else prompt[0]["content"],
        "a": a,
        "b": b,
    }
    content = re.sub(r"\{(prompt|a|b)\}", lambda place: texts[place[1]], template)
    return {
        "model": settings.model,
        "messages": [{"role": "user", "content": content}],
        **settings.body,
    }


def _verdict(settings: Settings, forward: Reply, backward: Reply) -> Verdict:
    """Of the answers to (a, b) and to (b, a)."""
    value, reverse = _value(forward.text), _value(backward.text)
    reason = f"{forward.refused or forward.text}\n\nThe other way round: {backward.refused or backward.text}"
    read = forward.prompt_tokens + backward.prompt_tokens
    written = forward.completion_tokens + backward.completion_tokens
    prices = settings.price_per_million
    cost = (read * prices[0] + written * prices[1]) / 1e6 if prices else None
    if value is None or reverse is None:
        return Verdict(None, f"no verdict can be read: {reason}", None, None, (read, written), cost)
    consistent = value == 1 - reverse
    return Verdict(value if consistent else 0.5, reason, None, consistent, (read, written), cost)


def _value(answer: str) -> float | None:
    """1 if the completion shown first is better, 0 if the other one is, 0.5 if none, None if it does not say."""
    labels = VERDICT.findall(answer) or LAST_LINE.findall(answer)
    return {"A": 1.0, "B": 0.0}.get(labels[-1].upper(), 0.5) if labels else None
