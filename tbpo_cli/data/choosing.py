"""Several answers to a prompt and their marks → their pairs, or the reason why there is none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tbpo_cli.config.choosing import Choose
from tbpo_cli.data.pairs import Noted, draw


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer to a prompt, and what a judge thinks of it.

    Args:
        text: of the answer; answers with the same text are the same.
        mark: the higher, the better; None or a number that is not finite if there is no mark.
        num_tokens: the length of the answer as it is trained on: the end of its turn counts, which
            an answer that is cut has not. Only `choose.max_length_difference` reads it.
        is_cut: whether the answer stops at a limit, and not where the model ended it.
    """

    text: str
    mark: float | None
    num_tokens: int = 0
    is_cut: bool = False


@dataclass(frozen=True)
class Choice:
    """What is made of the answers to one prompt.

    Args:
        pairs: (chosen, rejected), each the place of an answer among those that were given.
        noted: numbers of answers: "no_mark" and "same_answer" are left out, "cut_answer" are never
            chosen.
        reason: why there is no pair, a stable code; "" if there is one.
        detail: the same in words.
    """

    pairs: tuple[tuple[int, int], ...]
    noted: Noted = field(default_factory=Noted)
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Chooser:
    """How the answers of a row become pairs.

    Args:
        settings: [choose] of the recipe.
        seed: `run.seed`.
        count_tokens: counts the tokens of texts, for rows without `num_tokens`; only
            `max_length_difference` needs it.
    """

    settings: Choose = field(default_factory=Choose)
    seed: int = 0
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None


# Makes every pair that any choice makes, to find one of them again by its id.
EVERY_PAIR = Chooser(Choose("all"))


@dataclass(frozen=True)
class _Place:
    """An answer and where it stands."""

    place: int
    mark: float
    num_tokens: int
    is_cut: bool


# (answers with a lower mark than the chosen one, from the best to the worst; the mark two standard
# deviations below the mean; a random number in [0, 1)) → those that are rejected.
Rule = Callable[[list[_Place], float, float], list[_Place]]


RULES: dict[str, Rule] = {
    "best_worst": lambda lower, target, drawn: lower[-1:],
    "best_two_sigma": lambda lower, target, drawn: [
        min(reversed(lower), key=lambda one: abs(one.mark - target))
    ],
    "best_random": lambda lower, target, drawn: [lower[int(drawn * len(lower))]],
    "best_each": lambda lower, target, drawn: lower,
    "all": lambda lower, target, drawn: lower,
}


def choose(answers: Sequence[MarkedAnswer], settings: Choose, seed: int, prompt: str) -> Choice:
    """The pairs of the answers to one prompt.

    1. Answers without a mark are left out, and all but one of those with the same text: the first
       that is not cut, or the first.
    2. The chosen answer is the best one that is not cut (the first of equal ones); with "all", each
       of these in its turn.
    3. An answer may be rejected if its mark is lower by `min_margin` at least, and its length
       differs by `max_length_difference` at most. A cut one may be.
    4. RULES says which of these are rejected.

    Source: arXiv 2502.16825, for "best_two_sigma": the mean μ and the standard deviation σ of all
    marks of the prompt, and the answer nearest to μ − 2σ. σ is that of the marks themselves (their
    number is the denominator), so that no mark of n is lower than μ − σ √(n − 1): with up to five
    answers, the worst is always the nearest.

    Args:
        answers: to one prompt, in the order in which they were given.
        seed: with `prompt`, it decides what "best_random" takes.
        prompt: anything that names the prompt.

    Returns:
        Their pairs, from the best chosen to the worst rejected one.
    """
    marked = [
        (place, one) for place, one in enumerate(answers) if _has_mark(one)
    ]  # also of the answers that are the same: all of them are draws from the policy
    kept = _distinct(marked)
    noted = Noted(
        no_mark=len(answers) - len(marked),
        same_answer=len(marked) - len(kept),
        cut_answer=sum(one.is_cut for one in kept),
    )
    noted = +noted  # without those that are 0
    if fault := _fault(len(marked), kept, noted):
        return Choice((), noted, *fault)
    by_mark = sorted(kept, key=lambda one: -one.mark)
    whole = [one for one in by_mark if not one.is_cut]
    if not whole or whole[0].mark == by_mark[-1].mark:
        return Choice((), noted, "all_cut", "no answer that is whole is better than another one")
    marks = [float(one.mark or 0.0) for _, one in marked]
    target = statistics.fmean(marks) - 2 * statistics.pstdev(marks)
    drawn = draw(seed, f"rejected {prompt}")
    pairs = []
    for chosen in whole if settings.pairs == "all" else whole[:1]:
        lower = [one for one in by_mark if _is_pair(chosen, one, settings)]
        rejected = RULES[settings.pairs](lower, target, drawn) if lower else []
        pairs += [(chosen.place, one.place) for one in rejected]
    if not pairs:
        return Choice((), noted, *_limit(whole[0], by_mark, settings))
    return Choice(tuple(pairs), noted)


def _has_mark(answer: MarkedAnswer) -> bool:
    return answer.mark is not None and math.isfinite(answer.mark)


def _distinct(marked: Sequence[tuple[int, MarkedAnswer]]) -> list[_Place]:
    """Each text once, in order."""
    first: dict[str, tuple[int, MarkedAnswer]] = {}
    for place, one in marked:
        if one.text not in first or (first[one.text][1].is_cut and not one.is_cut):
            first[one.text] = (place, one)
    return [
        _Place(place, float(one.mark or 0.0), one.num_tokens, one.is_cut)
        for place, one in sorted(first.values(), key=lambda item: item[0])
    ]


def _fault(num_marked: int, kept: Sequence[_Place], noted: Noted) -> tuple[str, str] | None:
    """Why no two answers can be compared, as a code and in words; None if some can."""
    if num_marked < 2:
        return "no_mark", f"{num_marked} answers have a mark, and {noted['no_mark']} have none"
    if len(kept) < 2:
        return "identical", f"all {num_marked} answers with a mark are the same"
    if len({one.mark for one in kept}) == 1:
        return "no_preference", f"all {len(kept)} answers have the mark {kept[0].mark:g}"
    return None


def _is_pair(chosen: _Place, other: _Place, settings: Choose) -> bool:
    """Whether the second answer may be rejected where the first one is chosen."""
    longest = settings.max_length_difference
    return _is_better(chosen, other, settings.min_margin) and (
        longest is None or abs(chosen.num_tokens - other.num_tokens) <= longest
    )


def _is_better(one: _Place, other: _Place, min_margin: float) -> bool:
    """Whether a mark is higher, and by the least margin; 0.3 is 0.1 more than 0.2, not less."""
    margin = one.mark - other.mark
    return margin > 0 and (margin >= min_margin or math.isclose(margin, min_margin))


def _limit(best: _Place, by_mark: Sequence[_Place], settings: Choose) -> tuple[str, str]:
    """Which limit leaves no pair, as a code and in words."""
    lower = [one for one in by_mark if _is_better(best, one, settings.min_margin)]
    if not lower:
        return "small_margin", f"the largest margin is {best.mark - by_mark[-1].mark:g}"
    least = min(abs(best.num_tokens - one.num_tokens) for one in lower)
    return "length_difference", f"{least:,} tokens, to the answer that is nearest in length"
