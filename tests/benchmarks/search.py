"""A search over a grid by successive halving over seeds, and what its scores say: pure functions.

`next_step` says which runs are due, from the scores of those that are made. It is asked again after
every run, so that a search goes on wherever it was stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

Point = tuple[float, ...]  # a value of each axis
Scores = Mapping[tuple[Point, int], float]  # by point and seed; the higher the better
LEVELS = (  # share of the grid that a level keeps, and the seeds that it adds
    (1.0, (101,)),
    (0.5, (102,)),
    (0.25, (103, 104)),
)
SEEDS = tuple(seed for _, seeds in LEVELS for seed in seeds)


@dataclass(frozen=True)
class Axis:
    """The values first..last of a ladder, which are searched; the rest is for widening.

    Args:
        name: what the values are of.
        ladder: all values that the axis may ever have, in order.
        first, last: the places in it of the smallest and the largest value that are searched.
        open_below: whether a best point at the smallest value asks for a smaller one.
    """

    name: str
    ladder: tuple[float, ...]
    first: int
    last: int
    open_below: bool = True

    @property
    def values(self) -> tuple[float, ...]:
        return self.ladder[self.first : self.last + 1]

    def edge(self, value: float) -> str:
        """ "below" or "above", if the value is the outermost there; otherwise ""."""
        if len(self.values) == 1:
            return ""
        if value == self.values[0] and self.open_below:
            return "below"
        return "above" if value == self.values[-1] else ""

    def widened(self, side: str) -> Axis:
        """One more value on that side; the axis itself at the ladder's end."""
        if side == "below":
            return replace(self, first=max(0, self.first - 1))
        return replace(self, last=min(len(self.ladder) - 1, self.last + 1))


Grid = tuple[Axis, ...]


@dataclass(frozen=True)
class Step:
    """Where a search stands.

    Args:
        grid: as widened so far.
        level: of the runs that are due; the number of levels if none is.
        due: the runs to make, as (point, seed).
        best: the point with the best mean of those that have got furthest; None before any score.
        at_limit: names of the axes whose best value is the last of its ladder.
    """

    grid: Grid
    level: int
    due: tuple[tuple[Point, int], ...]
    best: Point | None
    at_limit: tuple[str, ...] = ()


def points_of(grid: Grid) -> list[Point]:
    return list(itertools.product(*(axis.values for axis in grid)))


def num_kept(count: int, level: int) -> int:
    """How many of `count` points a level keeps."""
    return math.ceil(count * LEVELS[level][0])


def num_runs(grid: Grid) -> int:
    """The runs of a search of this grid, if it is not widened."""
    count = len(points_of(grid))
    return sum(num_kept(count, level) * len(LEVELS[level][1]) for level in range(len(LEVELS)))


def mean_score(scores: Scores, point: Point, seeds: Sequence[int]) -> float:
    return fmean(scores[point, seed] for seed in seeds)


def next_step(grid: Grid, scores: Scores) -> Step:
    """Which runs are due.

    1. All points are run with the first seed, the better half with a second, the better quarter
       with two more; a level begins when the one before is complete, and ranks the points by the
       mean over the seeds of all levels before.
    2. If the best of the last level is at the edge of an axis, the axis gets one more value there,
       and 1 begins again with the larger grid; runs that are made count.
    3. An axis that is at its ladder's end stays as it is, and is named.
    """
    while True:
        ranked, seeds, best = points_of(grid), (), None
        count = len(ranked)
        for level, (_, added) in enumerate(LEVELS):
            ranked = ranked[: num_kept(count, level)]
            due = tuple(
                (point, seed) for seed in added for point in ranked if (point, seed) not in scores
            )
            if due:
                return Step(grid, level, due, best)
            seeds = (*seeds, *added)
            ranked.sort(key=lambda point: -mean_score(scores, point, seeds))
            best = ranked[0]
        wider = tuple(
            axis.widened(axis.edge(value)) if axis.edge(value) else axis
            for axis, value in zip(grid, ranked[0], strict=True)
        )
        if wider == grid:
            stuck = [
                axis.name for axis, value in zip(grid, ranked[0], strict=True) if axis.edge(value)
            ]
            return Step(grid, len(LEVELS), (), best, tuple(stuck))
        grid = wider


def pareto(points: Mapping[Point, tuple[float, float]]) -> list[tuple[float, float, Point | None]]:
    """(KL, score, point) of the points that no point with less or equal KL beats, by KL."""
    found: list[tuple[float, float, Point | None]] = []
    for point, (kl, score) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not found or score > found[-1][1]:
            found.append((kl, score, point))
    return found


def brackets(
    points: Mapping[Point, tuple[float, float]], base: float, kl: float
) -> list[tuple[float, float, Point | None]]:
    """The neighbours on the upper envelope of a KL: one or two (KL, score, point).

    The base, of KL 0, is a point of the envelope, with None as its point.
    """
    envelope = [(0.0, base, None), *(each for each in pareto(points) if each[1] > base)]
    below = [each for each in envelope if each[0] <= kl]
    above = [each for each in envelope if each[0] > kl]
    return [below[-1], *above[:1]]


def score_at(points: Mapping[Point, tuple[float, float]], base: float, kl: float) -> float:
    """The score at a KL: linear between the neighbours on the upper envelope of (KL, score).

    Past the envelope's end it is the score there: as much is reached with less KL.
    """
    lower, *upper = brackets(points, base, kl)
    if not upper:
        return lower[1]
    share = (kl - lower[0]) / (upper[0][0] - lower[0])
    return lower[1] + share * (upper[0][1] - lower[1])


def due_of_envelope(
    points: Mapping[Point, tuple[float, float]], base: float, targets: Sequence[float], made: Scores
) -> Iterator[tuple[Point, int]]:
    """The runs that points lack which decide the score at one of the KLs: one chance draw less."""
    wanted = {
        point: None
        for kl in targets
        for _, _, point in brackets(points, base, kl)
        if point is not None
    }
    yield from ((point, seed) for point in wanted for seed in SEEDS if (point, seed) not in made)


def share_within(scores: Scores, points: Sequence[Point], best: float, margin: float) -> float:
    """The share of the points whose score with the first seed is at most `margin` below `best`."""
    near = [scores.get((point, SEEDS[0]), -math.inf) >= best - margin for point in points]
    return sum(near) / len(near)
