"""The judges of [eval]: what they are asked and what they say, and those that score each completion by itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.pairs import Messages
from tbpo_cli.evaluation.measures import JUDGES

Answer = tuple[Messages, str]  # a prompt and its completion


@dataclass(frozen=True)
class Comparison:
    """Two completions of one prompt."""

    prompt_id: str  # comparisons with the same one are samples of one prompt
    prompt: Messages
    model: str  # label of what said `completion_a`
    against: str
    completion_a: str
    completion_b: str
    length_a: int  # tokens
    length_b: int
    sample: int = 0  # its number


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a comparison."""

    value: (
        float | None
    )  # 1: `completion_a` is better, 0: `completion_b` is, 0.5: a tie, None: it cannot be read
    reason: str  # for a person
    scores: tuple[float, float] | None = (
        None  # of the completions, from a judge that scores each by itself
    )
    consistent: bool | None = (
        None  # whether both orders gave the same verdict; None if they were not asked
    )
    tokens: tuple[int, int] = (0, 0)  # that a server has read and written for it
    cost: float | None = None  # of these, where prices are known


@dataclass(frozen=True)
class Judge:
    """Says which of two completions is better."""

    name: str  # what reports call it
    compare: Callable[[Sequence[Comparison]], list[Verdict]]  # the verdicts, in order


def score_judge(name: str, score: Callable[[Sequence[Answer]], Iterator[float]]) -> Judge:
    """A judge that scores each completion by itself: the higher of two scores wins."""

    def compare(comparisons: Sequence[Comparison]) -> list[Verdict]:
        answers = [
            (one.prompt, text)
            for one in comparisons
            for text in (one.completion_a, one.completion_b)
        ]
        distinct = {str(answer): answer for answer in answers}
        scored = zip(distinct, score([*distinct.values()]), strict=True)
        known = dict(console.track(scored, name, len(distinct), every=1000))
        scores = [known[str(answer)] for answer in answers]
        pairs = zip(scores[::2], scores[1::2], strict=True)
        return [
            Verdict((a > b) + (a == b) / 2, f"{a:.4g} against {b:.4g}", (a, b)) for a, b in pairs
        ]

    return Judge(name, compare)


def judges_of(recipe: Recipe, cache: Path | None = None) -> list[Judge]:
    """Every judge that [eval] names; the cache is a file for the answers of a server."""
    judges = []
    for key, file in JUDGES.items():
        if (value := getattr(recipe.eval, key)) is not None:
            judges.append(
                importlib.import_module(f"tbpo_cli.evaluation.judges.{file}").judge_of(value, cache)
            )
    return judges
