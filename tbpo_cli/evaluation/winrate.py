"""What the judges say, and the win rates: raw, and as if all lengths were the same.

The fit is a few of Newton's steps: the bootstrap makes a thousand fits, which a library's minimiser
is too slow for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.comparisons import comparisons_of
from tbpo_cli.evaluation.judges import judges_of
from tbpo_cli.evaluation.judges.judge import Comparison, Verdict
from tbpo_cli.evaluation.stats import Figure, figure_of, mean_of_groups, rate_figure
from tbpo_cli.runs.run_dir import RunDir

Rows = list[dict[str, Any]]
Scores = dict[tuple[str, int], float]  # of a model's completions, by prompt and sample

RIDGE = np.array(
    [0.001, 0.01]
)  # on θ and φ, which stay finite where one side always wins, or length decides all


def judge_all(
    recipe: Recipe,
    run_dir: RunDir,
    samples: Rows,
    others: list[str],
    cache_of: Callable[[str], Path],
) -> tuple[Rows, Rows, dict[str, Any]]:
    """The win rates, the lines of verdicts.jsonl, and each model's mean score by the first judge
    that scores.

    Args:
        samples: of all models, with their name as `model`; those of the sample stage have the
            prompt's `messages`.
        others: the names of the models of `eval.against`.
        cache_of: see `judges_of`.
    """
    win_rates = []
    lines = []
    scored: dict[str, Scores] = {}
    mute = set()  # who a judge has said nothing about: what is the same is no verdict there
    judges = judges_of(recipe.judge_of_eval, recipe.table_of_judge, cache_of)
    comparisons = comparisons_of(recipe, run_dir, samples, others) if judges else []
    for judge in judges if comparisons else ():
        said = judge.compare(comparisons)
        _check_that_it_says_something(judge.name, recipe.table_of_judge, said)
        judged = list(zip(comparisons, said, strict=True))
        for (model, against), group in itertools.groupby(
            judged, key=lambda pair: (pair[0].model, pair[0].against)
        ):
            of_both, verdicts = zip(*group, strict=True)
            win_rates.append(win_rate(of_both, verdicts, judge.name))
            if not win_rates[-1]["raw"]:
                mute.add((model, against, judge.name))
                reason = next(one for one in verdicts if one.value is None).reason[:300]
                console.say(f"{judge.name} gave no verdict on {model} against {against}: {reason}")
        scored = scored or _scores(judged)
        lines += [
            {
                "prompt_id": one.prompt_id,
                "sample": one.sample,
                "model": one.model,
                "against": one.against,
                "judge": judge.name,
                "verdict": None if (one.model, one.against, judge.name) in mute else said.value,
                "scores": said.scores,
                "reason": said.reason,
                "consistent": said.consistent,
                "length": one.length_a,
                "length_against": one.length_b,
            }
            for one, said in judged
        ]
    scores = {
        name: mean_of_groups([prompt_id for prompt_id, _ in of_one], [*of_one.values()])
        for name, of_one in scored.items()
    }
    return win_rates, lines, scores


def _check_that_it_says_something(judge: str, table: str, verdicts: Sequence[Verdict]) -> None:
    """Raises TbpoError if a judge was asked, and none of its answers is a verdict."""
    asked = [verdict for verdict in verdicts if verdict.asked]
    if not asked or any(verdict.value is not None for verdict in asked):
        return
    what = f"{judge} gave no verdict on any of {console.counted(len(asked), 'comparison')}"
    where = f"[{table}]; its first answer: {' '.join(asked[0].reason.split())[:300]}"
    expected = "[[A]], [[B]] or [[C]] at the end of its answers, in both orders"
    fix = f"a higher max_tokens in {table}.body, another {table}.template, or another judge"
    raise TbpoError(what, where, expected, fix)


def _scores(judged: Sequence[tuple[Comparison, Verdict]]) -> dict[str, Scores]:
    """By model, the scores of all its completions that a judge has scored in any comparison.

    Not those of one comparison: a file of answers may have few of the prompts.
    """
    scored: dict[str, Scores] = {}
    for one, said in judged:
        if said.scores is not None:
            for name, score in zip((one.model, one.against), said.scores, strict=True):
                scored.setdefault(name, {})[one.prompt_id, one.sample] = score
    return scored


def win_rate(
    comparisons: Sequence[Comparison], verdicts: Sequence[Verdict], judge: str
) -> dict[str, Any]:
    """An entry of results.json's "win_rates", for the comparisons of one model with one opponent.

    The rate counts a tie as half a win, and is the mean over prompts of the mean over their
    samples. Verdicts that cannot be read are counted, and left out; there is no rate where the
    judge was asked and none can be read, whatever is the same without asking.
    """
    read = [
        (one, verdict)
        for one, verdict in zip(comparisons, verdicts, strict=True)
        if verdict.value is not None
    ]
    was_asked = any(verdict.asked for verdict in verdicts)
    if was_asked and not any(verdict.asked for _, verdict in read):
        read = []
    values = np.array([verdict.value for _, verdict in read], np.float64)
    _, prompts = np.unique([one.prompt_id for one, _ in read], return_inverse=True)
    lengths = np.array([one.length_a - one.length_b for one, _ in read], np.float64)
    orders = [not verdict.consistent for _, verdict in read if verdict.consistent is not None]
    unlike = [_unlike(verdict.repeats) for _, verdict in read if len(verdict.repeats) > 1]
    costs = [verdict.cost for verdict in verdicts if verdict.cost is not None]
    return {
        "model": comparisons[0].model,
        "against": comparisons[0].against,
        "judge": judge,
        "raw": mean_of_groups(prompts, values, rate_figure) if read else None,
        "length_controlled": length_controlled(values, lengths, prompts) if read else None,
        "wins": int((values > 0.5).sum()),
        "ties": int((values == 0.5).sum()),
        "losses": int((values < 0.5).sum()),
        "unreadable": sum(verdict.value is None for verdict in verdicts),
        "asked": sum(verdict.asked for verdict in verdicts),
        "unread": sum(verdict.unread for verdict in verdicts),
        "inconsistent": rate_figure(orders) if orders else None,
        "unlike_repeats": rate_figure(unlike) if unlike else None,
        "prompt_tokens": sum(verdict.tokens[0] for verdict in verdicts),
        "completion_tokens": sum(verdict.tokens[1] for verdict in verdicts),
        "cost": sum(costs) if costs else None,
    }


def _unlike(repeats: Sequence[float]) -> float:
    """The share of repeats whose verdict is not the most frequent one."""
    return 1 - max(repeats.count(value) for value in repeats) / len(repeats)


def length_controlled(values: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> Figure:
    """The win rate that is left when the difference in length is taken to be zero.

    Fits P(win) = σ(θ + φ tanh(Δ/s)), Δ the difference in length and s its standard deviation, by
    maximum likelihood (a tie is half a win), and gives σ(θ). The interval is the bootstrap's over
    prompts, with a fit each. Where all verdicts are the same, length explains nothing: the rate and
    its interval are the raw ones.

    Source: Dubois et al., "Length-Controlled AlpacaEval", arXiv 2404.04475, section 3. What
    differs:
    - no term (ψ_model − ψ_baseline) γ_x: the difficulty γ_x of an instruction is known there from a
      joint fit over the verdicts of many models; from those of one model against another it cannot
      be told from chance. So the rate is that of the average prompt, and a prompt's own difficulty
      counts as noise;
    - the verdicts are 0, ½ and 1, not the probability that the judge gives its label;
    - a faint fixed penalty, RIDGE, in place of a cross-validated one;
    - lengths are in tokens, not characters.

    Args:
        values: (n,) verdicts, 0 to 1.
        lengths: (n,) length of the model's completion minus the other's.
        prompts: (n,) number of the prompt, from 0; all of a prompt's verdicts are drawn together.
    """
    if values.min() == values.max():
        return mean_of_groups(prompts, values, rate_figure)
    features = np.stack(
        [np.ones_like(lengths), np.tanh(lengths / (lengths.std() or np.inf))], axis=1
    )

    def rate(drawn: np.ndarray) -> float:
        weights = np.bincount(drawn.astype(int), minlength=prompts.max() + 1)[prompts]
        return float(1 / (1 + np.exp(-_fit(features, values, weights)[0])))

    return figure_of(rate, np.arange(prompts.max() + 1))


def _fit(features: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The coefficients of a penalised logistic regression, by Newton's method."""
    coefficients = np.zeros(features.shape[1])
    for _ in range(50):
        chances = 1 / (1 + np.exp(-features @ coefficients))
        gradient = features.T @ (weights * (values - chances)) - RIDGE * coefficients
        curvature = (features.T * (weights * chances * (1 - chances))) @ features + np.diag(RIDGE)
        step = np.linalg.solve(curvature, gradient)
        coefficients = coefficients + step * min(1.0, 2.0 / np.abs(step).max(initial=1e-12))
        if np.abs(step).max() < 1e-8:
            break
    return coefficients
