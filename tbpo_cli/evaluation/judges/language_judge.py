"""The judge that is a language model on a server: `judge.endpoint`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.judging import Judge as Settings
from tbpo_cli.data.pairs import Messages
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.endpoint import Endpoint
from tbpo_cli.evaluation.judges.judge import (
    Answer,
    Comparison,
    Judge,
    Mark,
    Verdict,
    say_failures,
    text_of,
)
from tbpo_cli.evaluation.judges.own_words import after_thinking, ends_with_question, own_labels
from tbpo_cli.evaluation.judges.reply import Reply

TEMPLATE = Path(__file__).parent / "judge.txt"
MARK_TEMPLATE = Path(__file__).parent / "mark.txt"
PLACES, LABELS = ("{prompt}", "{a}", "{b}"), "[[A]], [[B]] or [[C]]"
MARK_PLACES = ("{prompt}", "{answer}")
VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
MARK = re.compile(r"\[\[\s*([-+]?\d+(?:\.\d+)?)\s*\]\]")
LAST_LINE = re.compile(
    r"^\W*(?:final )?(?:verdict|answer|winner)?(?: is)?\W*(A|B|C|tie)\W*\Z", re.I | re.M
)


def judge_of(settings: Settings, table: str, cache: Path | None = None) -> Judge:
    """A language model that compares two completions, or marks one.

    To compare, it is shown both, in both orders. The last label of an answer counts, or its last
    line if that is nothing but a letter; an answer that was cut gives no verdict. Labels within its
    thinking, or within a text of the question that it repeats, do not count; those within a prompt
    or a completion are shown in a form that counts for nothing. Completions that are the same tie
    without being shown.

    Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv
    2306.05685, section 3.4: the labels [[A]], [[B]], [[C]], and a win only if both orders say so,
    else a tie; section 3.1: the grading of a single answer, [[7]].

    A mark is the last number in double brackets. A number outside `scale` does not count, nor does
    that of an answer that was cut.

    With `repeats` every question is asked several times, and verdict and mark are the means: what
    the judge draws by chance is in the values that the interval is made of.

    Args:
        table: "judge" or "eval.judge", for messages.
        cache: a file for the answers of the server.

    Raises:
        TbpoError: for a template without its places; later, if the server does not answer, refuses
            every request, or gives no mark to any answer.
    """
    assert settings.endpoint is not None and settings.model is not None
    judge = _LanguageJudge(
        settings,
        table,
        Endpoint(settings.endpoint, settings.concurrency, settings.timeout, cache),
        _template(settings.template or TEMPLATE, PLACES, LABELS),
        _template(settings.mark_template or MARK_TEMPLATE, MARK_PLACES, "a mark as [[7]]"),
    )
    return Judge(settings.model, judge.compare, judge.mark)


@dataclass(frozen=True)
class _Said:
    """A reply, and the question that it answers."""

    reply: Reply
    question: str

    def last(self, pattern: re.Pattern[str]) -> str | None:
        """The last label of the judge's own; None if it has none.

        A reply that was cut has none: its last label may be one that the judge was still weighing.
        """
        if self.reply.was_cut:
            return None
        labels = own_labels(pattern, after_thinking(self.reply.text), self.question)
        return labels[-1] if labels else None


@dataclass(frozen=True)
class _LanguageJudge:
    """The two things that a language model is asked for.

    Args:
        template: text around two completions.
        mark_template: text around one.
    """

    settings: Settings
    table: str
    endpoint: Endpoint
    template: str
    mark_template: str

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Verdicts, each of the replies to both orders."""
        both = [(_with_tools(one), one.completion_a, one.completion_b) for one in comparisons]
        bodies = [
            _body(self.settings, self.template, prompt, {"a": first, "b": second}, VERDICT)
            for prompt, a, b in both
            if a != b
            for first, second in ((a, b), (b, a))
        ]
        replies = self._replies(bodies, "", "template")
        said = [
            [_Said(reply, _question(body)) for reply in of_one]
            for body, of_one in zip(bodies, replies, strict=True)
        ]
        judged = (
            _together(
                [_verdict(self.settings, *pair) for pair in zip(forward, backward, strict=True)]
            )
            for forward, backward in zip(said[::2], said[1::2], strict=True)
        )
        return [
            next(judged) if a != b else Verdict(0.5, "the completions are the same", asked=0)
            for _, a, b in both
        ]

    def mark(self, answers: Sequence[Answer]) -> list[Mark]:
        """Marks, each of the replies to one answer."""
        low, high = (f"{end:g}" for end in self.settings.scale)
        ends = {"low": low, "high": high}
        bodies = [
            _body(self.settings, self.mark_template, prompt, {"answer": text, **ends}, MARK)
            for prompt, text in answers
        ]
        replies = self._replies(bodies, " for marks", "mark_template")
        marks = [
            _mark(self.settings, [_Said(reply, _question(body)) for reply in of_one])
            for body, of_one in zip(bodies, replies, strict=True)
        ]
        expected = f"a mark as [[{high}]]"
        fix = f"change {self.table}.mark_template"
        failed = [
            TbpoError(one.reason, self.endpoint.shown, expected, fix)
            for one in marks
            if one.value is None
        ]
        if failed:
            say_failures(str(self.settings.model), failed, len(marks))
        return marks

    def _replies(self, bodies: list[dict[str, Any]], what: str, template: str) -> list[list[Reply]]:
        """For each body, the replies of all repeats. Raises TbpoError if all are refused."""
        asked = self.endpoint.ask(bodies, self.settings.repeats)
        total = len(bodies) * self.settings.repeats
        doing = f"asking {self.settings.model}{what}"
        replies = dict(console.track(asked, doing, total, every=total // 10 + 1))
        if bodies and all(reply.refused for reply in replies.values()):
            fix = f"change {self.table}.body or {self.table}.{template}"
            raise TbpoError(replies[0].refused, self.endpoint.shown, "an answer", fix)
        return [
            [replies[start + place] for start in range(0, total, len(bodies))]
            for place in range(len(bodies))
        ]


def _template(file: str | Path, places: tuple[str, ...], labels: str) -> str:
    """The text around prompt and completions.

    Args:
        places: what it must contain.
        labels: what it is to ask for, for messages.

    Raises:
        TbpoError: if it lacks a place.
    """
    path = Path(file)
    try:
        template = path.read_text(encoding="utf-8")
        if missing := [name for name in places if name not in template]:
            raise ValueError(f"it has no place {' or '.join(missing)}")
    except (OSError, ValueError) as error:
        expected = f"a text file with {', '.join(places)} that asks for {labels}"
        what = f"the judge's template cannot be used: {error}"
        raise TbpoError(what, str(path), expected) from None
    return template


def _body(
    settings: Settings,
    template: str,
    prompt: Messages,
    texts: dict[str, str],
    labels: re.Pattern[str],
) -> dict[str, Any]:
    """A request.

    Args:
        texts: what stands in the template's places, beside the prompt.
        labels: those that the judge is asked for. Within prompt and texts they are shown in another
            form, so that a judge that quotes one says nothing by that.
    """
    turns = [f"{message['role']}: {text_of(message)}" for message in prompt]
    shown = "\n\n".join(turns) if len(turns) > 1 else text_of(prompt[0])
    filled = {
        name: labels.sub(lambda label: f"[ [{label[1]}] ]", text)
        for name, text in {"prompt": shown, **texts}.items()
    }
    places = "|".join(filled)
    content = re.sub(rf"\{{({places})\}}", lambda place: filled[place[1]], template)
    return {
        "model": settings.model,
        "messages": [{"role": "user", "content": content}],
        **settings.body,
    }


def _question(body: dict[str, Any]) -> str:
    """The text of a request, as the judge is shown it."""
    return str(body["messages"][0]["content"])


def _with_tools(one: Comparison) -> Messages:
    """The prompt of a comparison, after the functions that an answer may call."""
    if not one.tools:
        return one.prompt
    tools = json.dumps(one.tools, ensure_ascii=False)
    return ({"role": "functions that may be called", "content": tools}, *one.prompt)


def _mark(settings: Settings, said: Sequence[_Said]) -> Mark:
    """The mean of the marks that can be read in the replies of all repeats."""
    marks = [value for one in said if (value := _mark_in(settings, one)) is not None]
    value = sum(marks) / len(marks) if marks else None
    replies = [one.reply for one in said]
    reason = "\n\n".join(map(_shown, replies))
    if value is None:
        low, high = settings.scale
        reason = f"no mark from {low:g} to {high:g} can be read: {reason:.300}"
    return Mark(value, reason, *_spent(settings, replies))


def _mark_in(settings: Settings, said: _Said) -> float | None:
    """The last number in double brackets; None if there is none, or it is not on the scale."""
    found = said.last(MARK)
    low, high = settings.scale
    return float(found) if found is not None and low <= float(found) <= high else None


def _spent(settings: Settings, replies: Sequence[Reply]) -> tuple[tuple[int, int], float | None]:
    """Tokens that the server has read and written, and what they cost."""
    read = sum(reply.prompt_tokens for reply in replies)
    written = sum(reply.completion_tokens for reply in replies)
    prices = settings.price_per_million
    return (read, written), (read * prices[0] + written * prices[1]) / 1e6 if prices else None


def _verdict(settings: Settings, forward: _Said, backward: _Said) -> Verdict:
    """Of the answers to (a, b) and to (b, a)."""
    value = _value(forward)
    reverse = _value(backward)
    reason = f"{_shown(forward.reply)}\n\nThe other way round: {_shown(backward.reply)}"
    spent = _spent(settings, (forward.reply, backward.reply))
    if value is None or reverse is None:
        unread = (value is None) + (reverse is None)
        what = f"no verdict can be read: {reason}"
        return Verdict(None, what, None, None, *spent, asked=2, unread=unread)
    consistent = value == 1 - reverse
    return Verdict(value if consistent else 0.5, reason, None, consistent, *spent, asked=2)


def _together(repeats: list[Verdict]) -> Verdict:
    """The verdict of all repeats: the mean of those that can be read. Each has its cost."""
    if len(repeats) == 1:
        return repeats[0]
    read = [one for one in repeats if one.value is not None]
    values = tuple(float(one.value) for one in read if one.value is not None)
    costs = [one.cost for one in repeats if one.cost is not None]
    return Verdict(
        sum(values) / len(values) if values else None,
        "\n\n".join(f"{place}. {one.reason}" for place, one in enumerate(repeats, 1)),
        None,
        all(one.consistent for one in read) if read else None,
        (sum(one.tokens[0] for one in repeats), sum(one.tokens[1] for one in repeats)),
        sum(costs) if costs else None,
        values,
        sum(one.asked for one in repeats),
        sum(one.unread for one in repeats),
    )


def _shown(reply: Reply) -> str:
    cut = f" (cut off: {reply.finish_reason})" if reply.was_cut else ""
    return f"{reply.refused or reply.text}{cut}"


def _value(said: _Said) -> float | None:
    """1 if the completion shown first is better, 0 if the other one is, 0.5 for a tie; None if it
    does not say.
    """
    label = said.last(VERDICT)
    if label is None and not ends_with_question(said.reply.text, said.question):
        label = said.last(LAST_LINE)
    return None if label is None else {"A": 1.0, "B": 0.0}.get(label.upper(), 0.5)
