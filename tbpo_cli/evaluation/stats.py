"""Figures: a value, its 95 % interval, and the number of what it was resampled over.

scipy's `bootstrap` is no shorter for statistics of rows, and is not among what is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Figure = dict[str, Any]  # value, low, high, n

RESAMPLES = 1000
Z = 1.959964  # a normal distribution has 95 % within so many standard deviations


def figure(values: Sequence[float] | np.ndarray) -> Figure:
    """The mean of some values, one a pair or a prompt."""
    return figure_of(np.mean, values)


def mean_of_groups(
    groups: Sequence[Any] | np.ndarray, values: Sequence[float] | np.ndarray
) -> Figure:
    """The mean over groups, as prompts, of the mean of each; groups are what is resampled."""
    _, places = np.unique(groups, return_inverse=True)
    return figure(np.bincount(places, values) / np.bincount(places))


def ratio_figure(sums: np.ndarray, counts: np.ndarray) -> Figure:
    """A mean over tokens, from their sum and number in each pair; pairs are what is resampled."""
    return figure_of(
        lambda rows: rows[:, 0].sum() / max(rows[:, 1].sum(), 1), np.stack([sums, counts], axis=1)
    )


def figure_of(statistic: Callable[[np.ndarray], Any], rows: Sequence[Any] | np.ndarray) -> Figure:
    """A statistic of n ≥ 1 independent rows, with its interval by the percentile bootstrap.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    rows = np.asarray(rows, dtype=np.float64)
    generator = np.random.default_rng(0)
    draws = [
        statistic(rows[generator.integers(len(rows), size=len(rows))]) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(statistic(rows)), "low": float(low), "high": float(high), "n": len(rows)}


def jackknife_figure(value: float, left_out: Sequence[float]) -> Figure:
    """A statistic that counts repetitions, where drawing a row twice would be one, with the
    jackknife's error.

    Source: Efron and Tibshirani (1993), equation 11.5.

    Args:
        left_out: the statistic without the i-th of the n rows.
    """
    return normal_figure(value, float(np.std(left_out)) * (len(left_out) - 1) ** 0.5, len(left_out))


def normal_figure(value: float, standard_error: float | None, count: int) -> Figure:
    """A value ± 1.96 of its standard errors; without an interval where the error is not known."""
    if standard_error is None:
        return {"value": value, "low": None, "high": None, "n": count}
    return {
        "value": value,
        "low": value - Z * standard_error,
        "high": value + Z * standard_error,
        "n": count,
    }
