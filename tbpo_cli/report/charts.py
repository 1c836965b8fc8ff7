"""Small charts: panels of lines, areas and points with error bars, which templates/charts.svg
draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

COLOURS = (  # of series: on light, on dark
    ("#1f6fb4", "#68abe8"), ("#d1602b", "#eb8f63"), ("#2f8f5b", "#5cbd88"),
    ("#8a5fb8", "#b597dd"), ("#a8820f", "#d2b04c"), ("#c0477d", "#e480aa"),
)  # fmt: skip
WIDTH, HEIGHT = 340, 220  # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 320, 36, 182  # its axes
NUM_BINS = 40
MOST_DIGITS = 4  # after the point, of a number on an axis; with more it is written with an exponent
CURVES = (  # title, unit, the metrics in it
    ("loss", "nats", ("loss",)),
    ("reward accuracy", "share of pairs", ("accuracy", "token_accuracy")),
    ("reward", "nats", ("reward_chosen", "reward_rejected")),
    ("KL from the reference", "nats a token", ("kl",)),
    ("log-probability", "nats a token", ("logps_chosen", "logps_rejected")),
    ("entropy", "nats a token", ("entropy",)),
    ("gradient norm", "", ("grad_norm",)),
    ("learning rate", "", ("learning_rate",)),
)
WORDS = {  # of metrics, in a legend
    "accuracy": "of pairs",
    "token_accuracy": "of tokens",
    "reward_chosen": "chosen",
    "reward_rejected": "rejected",
    "logps_chosen": "log p of chosen",
    "logps_rejected": "log p of rejected",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour; points that are not finite are left out.

    Args:
        points: (x, y), or (x, y, lowest x, highest x, lowest y, highest y) with error bars.
        colour: a number of COLOURS, which are used in turn; None for that of the axes.
        name: in the legend, if given.
        line: width of the line through the points, pixels; 0 for none. So is `dots`, the radius of
            the points.
        area: fills what is under the line, down to zero.
    """

    points: Sequence[tuple[float, ...]]
    colour: int | None = 0
    name: str = ""
    line: float = 0
    dots: float = 0
    area: bool = False

    @cached_property
    def finite(self) -> list[tuple[float, ...]]:
        return [point for point in self.points if all(map(math.isfinite, point))]


@dataclass(frozen=True)
class Panel:
    """A chart of some series on the same axes; `unit` is that of y. Its methods say where a value
    lies, in pixels.
    """

    title: str
    unit: str
    x_title: str
    series: Sequence[Series]

    @cached_property
    def x_ticks(self) -> list[float]:
        return _ticks(
            [value for series in self.series for p in series.finite for value in (p[0], *p[2:4])]
        )

    @cached_property
    def y_ticks(self) -> list[float]:
        """With 0, if an area reaches down to it."""
        values = [
            value for series in self.series for p in series.finite for value in (p[1], *p[4:])
        ]
        return _ticks(values + [0.0] * any(series.area for series in self.series))

    @property
    def x_labels(self) -> list[tuple[float, str]]:
        """The ticks, each with its number as text."""
        return [(tick, _label(tick, self.x_ticks)) for tick in self.x_ticks]

    @property
    def y_labels(self) -> list[tuple[float, str]]:
        """The ticks, each with its number as text."""
        return [(tick, _label(tick, self.y_ticks)) for tick in self.y_ticks]

    def x(self, value: float) -> float:
        return _place(value, self.x_ticks, LEFT, RIGHT)

    def y(self, value: float) -> float:
        return _place(value, self.y_ticks, BOTTOM, TOP)

    def path(self, series: Series) -> str:
        return " ".join(f"{self.x(point[0])},{self.y(point[1])}" for point in series.finite)


def _ticks(values: list[float]) -> list[float]:
    """Round numbers for an axis, which reaches from the first to the last of them."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-12:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    unit = 10.0 ** math.floor(math.log10(high - low)) / 10
    for step in (unit * factor for factor in (1, 2, 5, 10, 20, 50)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= 5:
            break
    return [number * step for number in range(first, last + 1)]


def _label(tick: float, ticks: list[float]) -> str:
    """A tick's number with the digits that tell it from the others, as many for all of them."""
    step = ticks[1] - ticks[0]
    if abs(tick) < step / 2:
        return "0"
    digits = -math.floor(math.log10(step) + 1e-9)
    if digits <= MOST_DIGITS:
        return f"{tick:,.{max(0, digits)}f}".replace("-", "−")
    of_mantissa = max(0, math.floor(math.log10(abs(tick)) + 1e-9) + digits)
    mantissa, _, exponent = f"{tick:.{of_mantissa}e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def _place(value: float, ticks: list[float], first: float, last: float) -> float:
    return round(first + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (last - first), 1)


def histogram(
    title: str, unit: str, x_title: str, values: dict[int, np.ndarray], names: Sequence[str] = ()
) -> Panel:
    """How many of some values, at least one a colour, lie in bins of equal width; of ints, in bins
    of whole numbers.

    Args:
        values: by colour.
        names: of the colours, for the legend.
    """
    every = np.concatenate(list(values.values()))
    low, high = every.min(), every.max()
    edges = np.linspace(low, high if high > low else low + 1, NUM_BINS + 1)
    if np.issubdtype(every.dtype, np.integer):
        width = -(-(high - low + 1) // NUM_BINS)
        edges = np.arange(low, high + width + 1, width)
    series = []
    for (colour, of_one), name in zip(values.items(), names or [""] * len(values), strict=True):
        steps = zip(
            np.repeat(edges, 2)[1:-1], np.repeat(np.histogram(of_one, edges)[0], 2), strict=True
        )
        series.append(Series(list(steps), colour, name, line=1, area=True))
    return Panel(title, unit, x_title, series)


def ends_of(figure: dict[str, Any]) -> tuple[float, float]:
    """The ends of a figure's error bar; none is seen where it has no interval."""
    if figure["low"] is None:
        return figure["value"], figure["value"]
    return figure["low"], figure["high"]


def curves(lines: Sequence[dict[str, Any]]) -> list[Panel]:
    """The metrics of a training over its steps: a panel for each group that the lines have.

    Training is drawn as thin lines, evaluations as thick ones with dots.
    """
    panels = []
    for title, unit, names in CURVES:
        series = []
        for colour, name in enumerate(names):
            train, evaluations = (
                [
                    (line["step"], line[name])
                    for line in lines
                    if line["split"] == split and name in line
                ]
                for split in ("train", "eval")
            )
            series += [
                Series(train, colour, WORDS.get(name, name), line=1),
                Series(evaluations, colour, line=2.5, dots=3),
            ]
        if any(each.points for each in series):
            panels.append(Panel(title, unit, "optimizer step", series))
    return panels
