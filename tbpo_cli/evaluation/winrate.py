"""Who is compared with whom, what the judges say, and the win rates: raw, and as if all lengths were the same.

The fit is a few of Newton's steps: the bootstrap makes a thousand fits, which a library's minimiser is too slow for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.prompts import held_out_texts
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.judge import Comparison, Verdict, judges_of
from tbpo_cli.evaluation.stats import Figure, figure, figure_of, mean_of_groups
from tbpo_cli.runs.run_dir import RunDir

Rows = list[dict[str, Any]]

RIDGE = np.array(
    [0.001, 0.01]
)  # on θ and φ, which stay finite where one side always wins, or length decides all


def judge_all(
    recipe: Recipe, run_dir: RunDir, samples: Rows, others: list[str]
) -> tuple[Rows, Rows, dict[str, Any]]:
    """The win rates, the lines of verdicts.jsonl, and each model's mean score by the first judge that scores.

    Args:
        samples: of all models, with their name as `model`; those of the sample stage have the prompt's `messages`.
        others: the names of the models of `eval.against`.
    """
    win_rates, lines = [], []
    scores: dict[str, Any] = {}
    judges = judges_of(recipe, run_dir.path / "judge-cache.jsonl")
    comparisons = _comparisons(recipe, run_dir, samples, others) if judges else []
    for judge in judges if comparisons else ():
        judged = list(zip(comparisons, judge.compare(comparisons), strict=True))
        for (model, against), group in itertools.groupby(
            judged, key=lambda pair: (pair[0].model, pair[0].against)
        ):
            of_both, verdicts = zip(*group, strict=True)
            win_rates.append(win_rate(of_both, verdicts, judge.name))
            scored = zip(
                *(verdict.scores or () for verdict in verdicts), strict=True
            )  # of the model, of the other
            for name, values in zip((model, against), scored, strict=False):
                scores.setdefault(name, mean_of_groups([one.prompt_id for one in of_both], values))
        lines += [
            {
                "prompt_id": one.prompt_id, "sample": one.sample, "model": one.model, "against": one.against,
                "judge": judge.name, "verdict": said.value, "scores": said.scores, "reason": said.reason,
                "consistent": said.consistent, "length": one.length_a, "length_against": one.length_b,
            }
            for one, said in judged
        ]  # fmt: skip
    return win_rates, lines, scores


def _comparisons(
    recipe: Recipe, run_dir: RunDir, samples: Rows, others: list[str]
) -> list[Comparison]:
    """Of the policy with its opponents and the others, and of these with the opponents."""
    opponents = recipe.eval.opponents
    said = {
        (one["model"], one["prompt_id"], one["sample"]): (one["completion"], one["token_ids"])
        for one in samples
    }
    prompts = {
        (one["prompt_id"], one["sample"]): one["messages"] for one in samples if "messages" in one
    }
    if "chosen" in opponents:
        store = PairStore(run_dir.stage("prepare") / "eval")
        texts = held_out_texts(recipe.data, {prompt_id for prompt_id, _ in prompts})
        ids = {pair.pair_id: pair.chosen_ids for pair in map(store.__getitem__, range(len(store)))}
        said |= {
            ("chosen", *key): (texts[key[0]].chosen["content"], ids[key[0]]) for key in prompts
        }
    pairings = [("policy", other) for other in (*opponents, *others)]
    pairings += [(model, other) for model in others for other in opponents]
    return [
        Comparison(
            prompt_id, messages, model, against, text, other, len(ids), len(other_ids), number
        )
        for model, against in pairings
        for (prompt_id, number), messages in prompts.items()
        for (text, ids), (other, other_ids) in [
            [said[name, prompt_id, number] for name in (model, against)]
        ]
    ]


def win_rate(
    comparisons: Sequence[Comparison], verdicts: Sequence[Verdict], judge: str
) -> dict[str, Any]:
    """An entry of results.json's "win_rates", for the comparisons of one model with one opponent.

    The rate counts a tie as half a win, and is the mean over prompts of the mean over their samples. Verdicts that
    cannot be read are counted, and left out. Raises TbpoError if none can be read.
    """
    read = [
        (one, verdict)
        for one, verdict in zip(comparisons, verdicts, strict=True)
        if verdict.value is not None
    ]
    if not read:
        what, expected = (
            f"{judge} gave no verdict: {verdicts[0].reason[:300]}",
            "an answer that ends in a verdict",
        )
        raise TbpoError(what, "[eval]", expected, "another judge or template")
    values = np.array([verdict.value for _, verdict in read])
    _, prompts = np.unique([one.prompt_id for one, _ in read], return_inverse=True)
    lengths = np.array([one.length_a - one.length_b for one, _ in read], np.float64)
    orders = [not verdict.consistent for _, verdict in read if verdict.consistent is not None]
    costs = [verdict.cost for verdict in verdicts if verdict.cost is not None]
    return {
        "model": read[0][0].model,
        "against": read[0][0].against,
        "judge": judge,
        "raw": mean_of_groups(prompts, values),
        "length_controlled": length_controlled(values, lengths, prompts),
        "wins": int((values == 1).sum()),
        "ties": int((values == 0.5).sum()),
        "losses": int((values == 0).sum()),
        "unreadable": len(verdicts) - len(read),
        "inconsistent": figure(orders) if orders else None,
        "prompt_tokens": sum(verdict.tokens[0] for verdict in verdicts),
        "completion_tokens": sum(verdict.tokens[1] for verdict in verdicts),
        "cost": sum(costs) if costs else None,
    }


def length_controlled(values: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> Figure:
    """The win rate that is left when the difference in length is taken to be zero.

    Fits P(win) = σ(θ + φ tanh(Δ/s)), Δ the difference in length and s its standard deviation, by maximum likelihood
    (a tie is half a win), and gives σ(θ). The interval is the bootstrap's over prompts, with a fit each.

    Source: Dubois et al., "Length-Controlled AlpacaEval", arXiv 2404.04475, section 3. What differs:
    - no term (ψ_model − ψ_baseline) γ_x: the difficulty γ_x of an instruction is known there from a joint fit over the
      verdicts of many models; from those of one model against another it cannot be told from chance. So the rate is
      that of the average prompt, and a prompt's own difficulty counts as noise;
    - the verdicts are 0, ½ and 1, not the probability that the judge gives its label;
    - a faint fixed penalty, RIDGE, in place of a cross-validated one;
    - lengths are in tokens, not characters.

    Args:
        values: (n,) verdicts, 0 to 1.
        lengths: (n,) length of the model's completion minus the other's.
        prompts: (n,) number of the prompt, from 0; all of a prompt's verdicts are drawn together.
    """
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
