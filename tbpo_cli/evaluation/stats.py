"""Figures: a value, its 95 % interval, and the number of what it was resampled over.

scipy's `bootstrap` is no shorter for statistics of rows, and is not among what is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Figure = dict[str, Any]  # value, low, high, n

RESAMPLES = 1000
# Rows that the bootstrap needs: even the whole range of n values misses their median with the
# probability 2^(1 - n), which is above 5 % for fewer.
LEAST_ROWS = 6
Z = 1.959964  # a normal distribution has 95 % within so many standard deviations


def figure(values: Sequence[float] | np.ndarray) -> Figure:
    """The mean of some values, one a pair or a prompt."""
    return figure_of(np.mean, values)


def rate_figure(
    values: Sequence[float] | np.ndarray, low: float = 0.0, high: float = 1.0
) -> Figure:
    """Mean of n ≥ 1 values between `low` and `high`, with Wilson's interval, never an empty one.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    What differs: with values between the ends, as of ties, n is the effective number of Korn and
    Graubard (1998), n m (1 − m) / s², where that is larger: m is the mean and s² the variance of
    the values on the scale from 0 to 1.

    Args:
        low: the lowest possible value, as −1 for the difference of two rates.
        high: the highest one.
    """
    rows = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    count = len(rows)
    mean = float(rows.mean())
    effective: float = count
    if count >= LEAST_ROWS and (variance := float(rows.var(ddof=1))) > 0:
        effective = max(effective, count * mean * (1 - mean) / variance)
    ends = [low + (high - low) * end for end in wilson(mean, effective)]
    value = float(np.mean(values))
    return {"value": value, "low": min(ends[0], value), "high": max(ends[1], value), "n": count}


def wilson(rate: float, count: float) -> tuple[float, float]:
    """Wilson's interval of a rate from `count` independent trials, equation 4 of Brown, Cai and
    DasGupta, "Interval Estimation for a Binomial Proportion" (2001).
    """
    weight = Z**2 / count
    middle = (rate + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * (rate * (1 - rate) / count + weight / count / 4) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of_groups(
    groups: Sequence[Any] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    figure_of_means: Callable[[np.ndarray], Figure] = figure,
) -> Figure:
    """The mean over groups, as prompts, of the mean of each; groups are what is resampled.

    Args:
        figure_of_means: `rate_figure` for values between 0 and 1.
    """
    _, places = np.unique(groups, return_inverse=True)
    return figure_of_means(np.bincount(places, values) / np.bincount(places))


def ratio_figure(sums: np.ndarray, counts: np.ndarray) -> Figure:
    """A mean over tokens, from their sum and number in each pair; pairs are what is resampled."""
    return figure_of(
        lambda rows: rows[:, 0].sum() / max(rows[:, 1].sum(), 1), np.stack([sums, counts], axis=1)
    )


def figure_of(statistic: Callable[[np.ndarray], Any], rows: Sequence[Any] | np.ndarray) -> Figure:
    """A statistic of n ≥ 1 independent rows, with its interval by the percentile bootstrap.

    There is none of fewer than LEAST_ROWS rows, nor where every resample has the same statistic:
    such rows do not say how far it would vary.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    rows = np.asarray(rows, dtype=np.float64)
    value = float(statistic(rows))
    count = len(rows)
    if count < LEAST_ROWS:
        return without_interval(value, count)
    generator = np.random.default_rng(0)
    draws = [statistic(rows[generator.integers(count, size=count)]) for _ in range(RESAMPLES)]
    low, high = (float(end) for end in np.percentile(draws, [2.5, 97.5]))
    if low == high:
        return without_interval(value, count)
    return {"value": value, "low": low, "high": high, "n": count}


def without_interval(value: float, count: int) -> Figure:
    """A value of which is not known how far it would vary."""
    return {"value": value, "low": None, "high": None, "n": count}


def jackknife_figure(value: float, left_out: Sequence[float]) -> Figure:
    """A statistic that counts repetitions, where drawing a row twice would be one, with the
    jackknife's error; without an interval of fewer than LEAST_ROWS rows.

    Source: Efron and Tibshirani (1993), equation 11.5.

    Args:
        left_out: the statistic without the i-th of the n rows.
    """
    count = len(left_out)
    if count < LEAST_ROWS:
        return without_interval(value, count)
    return normal_figure(value, float(np.std(left_out)) * (count - 1) ** 0.5, count)


def normal_figure(value: float, standard_error: float | None, count: int) -> Figure:
    """A value ± 1.96 of its standard errors; without an interval where the error is not known, or
    is 0 since all of what was counted is the same.
    """
    if not standard_error:
        return without_interval(value, count)
    half = Z * standard_error
    return {"value": value, "low": value - half, "high": value + half, "n": count}
