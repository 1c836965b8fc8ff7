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
from tbpo_cli.evaluation.judges.endpoint import Endpoint
from tbpo_cli.evaluation.judges.judge import Comparison, Judge, Verdict
from tbpo_cli.evaluation.judges.reply import Reply

TEMPLATE = Path(__file__).parent / "judge.txt"
VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
LAST_LINE = re.compile(
    r"^\W*(?:final )?(?:verdict|answer|winner)?(?: is)?\W*(A|B|C|tie)\W*\Z", re.I | re.M
)


def judge_of(settings: Settings, cache: Path | None = None) -> Judge:
    """A language model that is shown both completions, in both orders.

    The last label of an answer counts, or its last line if that is nothing but a letter; an answer
    that was cut gives no verdict. Labels within a prompt or a completion are shown in a form that
    counts for nothing. Completions that are the same tie without being shown.

    Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv
    2306.05685, section 3.4: the labels [[A]], [[B]], [[C]], and a win only if both orders say so,
    else a tie.

    With `repeats` every question is asked several times, and the verdict is the mean: what the
    judge draws by chance is in the values that the interval is made of.

    Args:
        cache: a file for the answers of the server.

    Raises:
        TbpoError: for a template without its places; later, if the server does not answer, or
            refuses every request.
    """
    template = _template(settings)
    endpoint = Endpoint(settings.endpoint, settings.concurrency, settings.timeout, cache)

    def compare(comparisons: Sequence[Comparison]) -> list[Verdict]:
        both = [(one.prompt, one.completion_a, one.completion_b) for one in comparisons]
        asked = [
            request
            for prompt, a, b in both
            if a != b
            for request in ((prompt, a, b), (prompt, b, a))
        ]
        bodies = [_body(settings, template, *request) for request in asked]
        answers = endpoint.ask(bodies, settings.repeats)
        total = len(asked) * settings.repeats
        tracked = console.track(answers, f"asking {settings.model}", total, every=total // 10 + 1)
        replies = dict(tracked)
        if asked and all(reply.refused for reply in replies.values()):
            fix = "change eval.judge.body or the template"
            raise TbpoError(replies[0].refused, endpoint.shown, "an answer", fix)
        judged = (
            _together(
                [
                    _verdict(settings, replies[start + place], replies[start + place + 1])
                    for start in range(0, total, len(asked))
                ]
            )
            for place in range(0, len(asked), 2)
        )
        return [
            next(judged) if a != b else Verdict(0.5, "the completions are the same")
            for _, a, b in both
        ]

    return Judge(settings.model, compare)


def _template(settings: Settings) -> str:
    """The text around prompt and completions. Raises TbpoError if it lacks a place for one."""
    path = Path(settings.template or TEMPLATE)
    try:
        template = path.read_text(encoding="utf-8")
        if missing := [name for name in ("{prompt}", "{a}", "{b}") if name not in template]:
            raise ValueError(f"it has no place {' or '.join(missing)}")
    except (OSError, ValueError) as error:
        expected = "a text file with {prompt}, {a} and {b} that asks for [[A]], [[B]] or [[C]]"
        what = f"the judge's template cannot be used: {error}"
        raise TbpoError(what, str(path), expected) from None
    return template


def _body(settings: Settings, template: str, prompt: Messages, a: str, b: str) -> dict[str, Any]:
    turns = [f"{message['role']}: {message['content']}" for message in prompt]
    shown = "\n\n".join(turns) if len(turns) > 1 else str(prompt[0]["content"])
    texts = {"prompt": _without_labels(shown), "a": _without_labels(a), "b": _without_labels(b)}
    content = re.sub(r"\{(prompt|a|b)\}", lambda place: texts[place[1]], template)
    return {
        "model": settings.model,
        "messages": [{"role": "user", "content": content}],
        **settings.body,
    }


def _without_labels(text: str) -> str:
    """A text whose labels are none any more, so that a judge that quotes it gives no verdict by
    that.
    """
    return VERDICT.sub(lambda label: f"[ [{label[1]}] ]", text)


def _verdict(settings: Settings, forward: Reply, backward: Reply) -> Verdict:
    """Of the answers to (a, b) and to (b, a)."""
    value = _value(forward)
    reverse = _value(backward)
    reason = f"{_shown(forward)}\n\nThe other way round: {_shown(backward)}"
    read = forward.prompt_tokens + backward.prompt_tokens
    written = forward.completion_tokens + backward.completion_tokens
    prices = settings.price_per_million
    cost = (read * prices[0] + written * prices[1]) / 1e6 if prices else None
    if value is None or reverse is None:
        return Verdict(None, f"no verdict can be read: {reason}", None, None, (read, written), cost)
    consistent = value == 1 - reverse
    return Verdict(value if consistent else 0.5, reason, None, consistent, (read, written), cost)


def _together(repeats: list[Verdict]) -> Verdict:
    """The verdict of all repeats: the mean of those that can be read."""
    read = [one for one in repeats if one.value is not None]
    if len(repeats) == 1 or not read:
        return repeats[0]
    values = tuple(float(one.value) for one in read if one.value is not None)
    costs = [one.cost for one in repeats if one.cost is not None]
    return Verdict(
        sum(values) / len(values),
        "\n\n".join(f"{place}. {one.reason}" for place, one in enumerate(repeats, 1)),
        None,
        all(one.consistent for one in read),
        (sum(one.tokens[0] for one in repeats), sum(one.tokens[1] for one in repeats)),
        sum(costs) if costs else None,
        values,
    )


def _shown(reply: Reply) -> str:
    cut = f" (cut off: {reply.finish_reason})" if reply.was_cut else ""
    return f"{reply.refused or reply.text}{cut}"


def _value(reply: Reply) -> float | None:
    """1 if the completion shown first is better, 0 if the other one is, 0.5 for a tie; None if it
    does not say.

    An answer that was cut says nothing: its last label may be one that the judge was still
    weighing.
    """
    labels = VERDICT.findall(reply.text) or LAST_LINE.findall(reply.text)
    if reply.was_cut or not labels:
        return None
    return {"A": 1.0, "B": 0.0}.get(labels[-1].upper(), 0.5)
