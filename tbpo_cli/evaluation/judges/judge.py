"""What a judge is asked and what it says; and judges that score each completion alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from tbpo_cli import console
from tbpo_cli.data.pairs import Message, Messages, Tools
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.said import lines_of
from tbpo_cli.runs.files import sealed_line, write_whole

Answer = tuple[Messages, str]  # a prompt and its completion

MAX_SCORE = 1e100  # means and variances of scores up to it are finite


@dataclass(frozen=True)
class Comparison:
    """Two completions of one prompt.

    Args:
        prompt_id: comparisons with the same one are samples of one prompt.
        prompt: the messages before the completion.
        model: the name of the model that wrote `completion_a`.
        against: the name of the one that wrote `completion_b`.
        completion_a: without its thinking part, as is `completion_b`.
        length_a: tokens of `completion_a`.
        length_b: tokens of `completion_b`.
        sample: its number among the samples of the prompt.
        tools: the JSON schemas of the functions that an answer may call.
    """

    prompt_id: str
    prompt: Messages
    model: str
    against: str
    completion_a: str
    completion_b: str
    length_a: int
    length_b: int
    sample: int = 0
    tools: Tools = ()


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a comparison.

    Args:
        value: 1 if `completion_a` is better, 0 if `completion_b` is, 0.5 for a tie; None if it
            cannot be read.
        reason: for a person.
        scores: of the two completions, from a judge that scores each by itself.
        consistent: whether both orders gave the same verdict; None if they were not asked.
        tokens: that a server has read and written for it.
        cost: of these tokens; None where prices are not known.
        repeats: the values of all repeats that can be read, of which `value` is the mean.
        asked: questions that the judge was asked for it: none where the completions are the same,
            and a language model is asked in both orders, in each repeat.
        unread: those of them whose answer says nothing that can be read.
    """

    value: float | None
    reason: str
    scores: tuple[float, float] | None = None
    consistent: bool | None = None
    tokens: tuple[int, int] = (0, 0)
    cost: float | None = None
    repeats: tuple[float, ...] = ()
    asked: int = 1
    unread: int = 0


@dataclass(frozen=True)
class Mark:
    """What a judge thinks of an answer.

    Args:
        value: the higher, the better; None if the judge gives none, or it cannot be read.
        reason: for a person.
        tokens: that a server has read and written for it.
        cost: of these tokens; None where prices are not known.
    """

    value: float | None
    reason: str = ""
    tokens: tuple[int, int] = (0, 0)
    cost: float | None = None


@dataclass(frozen=True)
class Judge:
    """Says which of two completions is better, and how good one is.

    Args:
        name: what reports call it.
        compare: gives the verdicts on some comparisons, in their order.
        mark: gives the marks of some answers, in their order. It raises TbpoError if no answer gets
            one.
    """

    name: str
    compare: Callable[[Sequence[Comparison]], list[Verdict]]
    mark: Callable[[Sequence[Answer]], list[Mark]]


def text_of(message: Message) -> str:
    """What a person, or a judge, reads of a message: its text, and the calls of functions in it."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    said = [json.dumps({"tool_call": call}, ensure_ascii=False) for call in calls]
    return "\n".join(part for part in (message["content"] or "", *said) if part)


def score_judge(
    name: str,
    score: Callable[[Sequence[Answer]], Iterator[float | TbpoError]],
    cache: Path | None = None,
) -> Judge:
    """A judge that scores each completion by itself: the higher of two scores wins.

    Args:
        score: gives the scores of some answers, in their order; in place of one, why there is none.
        cache: a file with a score a line, which is added to, and put in the order of its keys once
            all are scored; None: nothing is kept.
    """

    def mark(answers: Sequence[Answer]) -> list[Mark]:
        known = _scores_of(cache)
        keys = [_key(answer) for answer in answers]
        new = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in known}
        scored = zip(new, score([*new.values()]), strict=True) if new else ()
        failed: dict[str, TbpoError] = {}
        # Not buffered: what is scored is kept, however the process ends.
        with nullcontext() if cache is None else cache.open("ab", buffering=0) as file:
            for key, value in console.track(scored, name, len(new), every=1000):
                if isinstance(value, TbpoError) or not abs(value) <= MAX_SCORE:
                    failed[key] = _no_score(name, value)
                    continue
                known[key] = value
                if file is not None:
                    file.write(_line(key, value))
        if cache is not None:
            write_whole(cache, "".join(_line(*each).decode() for each in sorted(known.items())))
        if failed:
            say_failures(name, list(failed.values()), len({*keys}))
        return [Mark(known[key]) if key in known else Mark(None, failed[key].what) for key in keys]

    def compare(comparisons: Sequence[Comparison]) -> list[Verdict]:
        answers = [
            (one.prompt, text)
            for one in comparisons
            for text in (one.completion_a, one.completion_b)
        ]
        marks = mark(answers)
        return [_verdict(*both) for both in zip(marks[::2], marks[1::2], strict=True)]

    return Judge(name, compare, mark)


def say_failures(name: str, failed: Sequence[TbpoError], num_answers: int) -> None:
    """Says how many of some answers have no mark. Raises the first failure if none has one."""
    if len(failed) == num_answers:
        raise failed[0]
    counted = f"{len(failed):,} of {num_answers:,} answers"
    first = f"{failed[0].what} ({failed[0].where})"
    console.say(f"WARNING: {name} gives no mark to {counted}; the first of them: {first}")


def _no_score(name: str, value: float | TbpoError) -> TbpoError:
    """Why there is no score."""
    if isinstance(value, TbpoError):
        return value
    fix = "name another judge"
    expected = f"a finite number, from -{MAX_SCORE:g} to {MAX_SCORE:g}"
    return TbpoError(f"{name} gives the score {value}", name, expected, fix)


def _verdict(a: Mark, b: Mark) -> Verdict:
    """Of the marks of two completions."""
    if a.value is None or b.value is None:
        return Verdict(None, f"no verdict: {a.reason or b.reason}", unread=1)
    value = (a.value > b.value) + (a.value == b.value) / 2
    return Verdict(value, f"{a.value:.4g} against {b.value:.4g}", (a.value, b.value))


def _key(answer: Answer) -> str:
    return hashlib.sha256(json.dumps(answer).encode()).hexdigest()


def _line(key: str, score: float) -> bytes:
    """A line of a cache."""
    return sealed_line({"key": key, "score": score})


def _scores_of(cache: Path | None) -> dict[str, float]:
    """The scores in a cache by the keys of their answers; a line that holds none is left out."""
    known = {}
    if cache is not None and cache.exists():
        for line in lines_of(cache):
            with suppress(TypeError, ValueError, LookupError):
                if abs(line["score"]) <= MAX_SCORE:
                    known[line["key"]] = float(line["score"])
    return known
