"""Tests of two models on the same prompts or pairs, corrected for how many of them there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tbpo_cli.evaluation.stats import rate_figure

Rows = list[dict[str, Any]]
Test = dict[str, Any]  # model, against, measure, difference (a figure), p, p_holm

FLIPS = 10_000


def paired_tests(pairs: dict[str, Rows], verdicts: Rows) -> list[Test]:
    """Every comparison of two models, with its p-value.

    Args:
        pairs: the rows of the held-out pairs, by model, of models that are compared with a
            reference; the first model is compared with each other one by the reward accuracy.
        verdicts: the lines of verdicts.jsonl; each model and opponent is tested for a win rate of
            other than a half.

    Returns:
        The tests, `p_holm` being the p-value for all of them together.
    """
    first, *others = pairs
    right = {
        name: np.array([row["log_ratio"] > 0 for row in sorted(rows, key=lambda row: row["pair"])])
        for name, rows in pairs.items()
    }
    found = [
        _test(first, other, "accuracy", right[first].astype(float) - right[other], 1.0)
        for other in others
    ]
    wins: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for line in verdicts:
        if line["verdict"] is not None:
            key = (line["model"], line["against"], line["judge"])
            wins.setdefault(key, {}).setdefault(line["prompt_id"], []).append(line["verdict"])
    for (model, against, judge), of_prompts in wins.items():
        means = np.array([np.mean(values) for values in of_prompts.values()])
        found.append(_test(model, against, f"win rate, by {judge}", means - 0.5, 0.5))
    corrected = holm([test["p"] for test in found])
    return [test | {"p_holm": p} for test, p in zip(found, corrected, strict=True)]


def sign_flip_p(differences: np.ndarray) -> float:
    """The two-sided p-value of a mean difference: of each one, the sign could as well be the other.

    Source: Fisher's randomisation test (Good, "Permutation Tests", 2000, section 3.1), by 10,000
    draws of the signs; the draw that was observed counts as one.

    Args:
        differences: (n,), one a prompt or a pair.
    """
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(FLIPS, len(differences)))
    means = np.abs(signs @ differences) / len(differences)
    observed = abs(differences.mean())
    return float((1 + (means >= observed - 1e-12).sum()) / (1 + FLIPS))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values for all hypotheses together.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def _test(model: str, against: str, measure: str, differences: np.ndarray, largest: float) -> Test:
    """A test of differences that lie between −largest and largest."""
    return {
        "model": model,
        "against": against,
        "measure": measure,
        "difference": rate_figure(differences, -largest, largest),
        "p": sign_flip_p(differences),
    }
