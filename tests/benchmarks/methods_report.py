"""results/methods.md and methods.svg, from the runs of methods.py, however many there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

import methods
import search
from common import RESULTS, write_table
from methods import BASE, KL_TARGETS, METHODS, Key, Method
from search import Point

MARGIN = 0.03
COMPARED_WITH = "tbpo_a"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # by the seeds
COLUMNS = {  # of the table: figure of a test run, what a person reads, how it is written
    "win_rate": ("win rate", "{:.3f}"),
    "right": ("right", "{:.3f}"),
    "rude": ("rude", "{:.3f}"),
    "kl": ("KL", "{:.3f}"),
    "entropy": ("entropy", "{:.3f}"),
    "self_bleu": ("self-BLEU", "{:.1f}"),
    "length": ("length", "{:.1f}"),
}
COLOURS = {  # a dark one each, that colour-blind people tell apart as far as eight can be
    "tbpo_a": "#0072b2",
    "tbpo_q": "#009e73",
    "dpo": "#d55e00",
    "tdpo 2": "#cc79a7",
    "ipo": "#56b4e9",
    "simpo": "#e69f00",
    "dpo_norm": "#000000",
    "apo_zero": "#8c6d31",
}


@dataclass(frozen=True)
class Search:
    """What the runs of one loss say."""

    name: str
    runs: dict[Key, dict]

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @cached_property
    def scores(self) -> dict[tuple[Point, int], float]:
        return methods.scores_of(self.runs, self.name)

    @cached_property
    def step(self) -> search.Step:
        return search.next_step(self.method.grid, self.scores)

    @cached_property
    def places(self) -> dict[Point, tuple[float, float]]:
        return methods.places_of(self.runs, self.name)

    @cached_property
    def tests(self) -> dict[int, dict]:
        """The test runs of the best setting, by seed."""
        keys = ((self.name, *(self.step.best or ()), seed, "new") for seed in methods.TEST_SEEDS)
        return {key[-2]: self.runs[key] for key in keys if key in self.runs}

    @property
    def best(self) -> Point | None:
        """The search's result; while it goes on, the best mean of the points that lead it."""
        if self.step.best is not None:
            return self.step.best
        scored = {point for point, _ in self.scores}
        return max(scored, key=self.validation, default=None)

    def seeds_of(self, point: Point) -> list[int]:
        return sorted(seed for scored, seed in self.scores if scored == point)

    def validation(self, point: Point) -> float:
        return search.mean_score(self.scores, point, self.seeds_of(point))

    @property
    def num_made(self) -> int:
        return len(self.scores) + len(self.tests)

    @property
    def num_planned(self) -> int:
        """Of its present grid; a wider one takes more."""
        return search.num_runs(self.step.grid) + len(methods.TEST_SEEDS)

    def stands(self) -> str:
        """How far the search is, as a cell of the table."""
        if self.step.due:
            level = f"level {self.step.level + 1} of {len(search.LEVELS)}"
            return f"{level}, {len(self.step.due)} runs to go"
        limits = f", {' and '.join(self.step.at_limit)} at the limit" if self.step.at_limit else ""
        return f"done{limits}"

    @cached_property
    def first_points(self) -> list[Point]:
        """The first 5 × 4 grid, without a floor; nothing while it is not complete."""
        points = [point for point in search.points_of(self.method.grid) if point[0] == 0.0]
        is_complete = all((point, search.SEEDS[0]) in self.scores for point in points)
        return points if is_complete else []

    def forgiving(self) -> str:
        """The share of the first grid near the best of all settings with the same seed."""
        if not self.first_points:
            return ""
        best = max(score for (_, seed), score in self.scores.items() if seed == search.SEEDS[0])
        return f"{search.share_within(self.scores, self.first_points, best, MARGIN):.0%}"

    def at_kl(self, kl: float) -> str:
        """The score at a KL."""
        if not self.first_points:
            return ""
        base = methods.base_score(self.runs, "validation")
        return f"{search.score_at(self.places, base, kl):.3f}"


def report(runs: dict[Key, dict]) -> None:
    """Writes results/methods.md and its plot."""
    searches = {name: Search(name, runs) for name in METHODS}
    lines = [*_heading(searches, runs), "", "![True score against KL](methods.svg)", ""]
    lines += table([one for one in searches.values() if not one.method.is_variant], searches)
    variants = [one for one in searches.values() if one.method.is_variant]
    if any(one.scores for one in variants):
        lines += ["", "Variants of TBPO-A and TDPO 2 (tests/benchmarks/variants.py):", ""]
        lines += table(variants, searches)
    print("\n".join(lines))
    write_table("methods", "Losses on the quickstart's world, each at its best", "\n".join(lines))
    plot(searches, methods.base_score(runs, "validation"))


def _heading(searches: dict[str, Search], runs: dict[Key, dict]) -> list[str]:
    made = sum(one.num_made for one in searches.values())
    planned = sum(one.num_planned for one in searches.values())
    first = sum(one.num_made for one in searches.values() if not one.method.is_variant)
    of_first = sum(one.num_planned for one in searches.values() if not one.method.is_variant)
    going = [name for name, one in searches.items() if one.step.due]
    state = (
        f"**Not finished**: {made} of at least {planned} runs are made ({first} of at least "
        f"{of_first} for the first table); {len(going)} of {len(searches)} searches go on."
        if going
        else f"{made} runs."
    )
    validation, new = (runs[(BASE, 0.0, 0.0, 0.0, 0, name)] for name in ("validation", "new"))
    return [
        state,
        "",
        "Half an epoch (61 steps of 32 pairs), LoRA r 16 on the quickstart's base of 1.9 M "
        "weights. A score is the mean true score of one answer to each of 400 prompts; the base "
        f"has {validation['true_score']:.3f} on the validation prompts and "
        f"{new['true_score']:.3f} on the new ones.",
        "",
        "- search: 5 learning rates × 4 β, and for losses that match ratios without saturating "
        "also × 2 `min_ratio`. All settings run with one seed, the better half with two, the "
        "better quarter with four. A grid whose best stands at an edge is widened there, down to "
        "0.03 × β, which is then called the limit.",
        "- best so far: the setting and its mean over its seeds (their number in brackets) on the "
        "validation prompts: the best of many, thus too high.",
        "- new prompts: the best setting of a search that is done, 8 other seeds, means ± 95 % "
        f"intervals (Student's t); the difference to {COMPARED_WITH} is paired by seed.",
        "- at KL: the score at that KL(reference ‖ policy), nats a token of held-out pairs, linear "
        "between neighbours on the upper envelope of all settings tried and the base; past its "
        "end, the score there. Validation prompts; the best of many, thus too high, but for all "
        "losses alike. The points that decide it have four seeds; of the variants some have two.",
        f"- within {MARGIN}: the share of the first 5 × 4 settings, without a floor, that come "
        f"that close to the loss's best, all with the same one seed: how forgiving it is.",
    ]


def table(rows: list[Search], searches: dict[str, Search]) -> list[str]:
    """The best score on new prompts first; those that have none follow by validation."""
    names = ["loss", "search", "rate, × β, floor", "best so far", "new prompts"]
    names += [f"less {COMPARED_WITH}", *(name for name, _ in COLUMNS.values())]
    names += [f"at KL {kl:g}" for kl in KL_TARGETS] + [f"within {MARGIN}"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    rows = [one for one in rows if one.best is not None]
    for one in sorted(rows, key=_rank):
        lines.append(f"| {' | '.join(_cells(one, searches[COMPARED_WITH]))} |")
    return lines


def _rank(one: Search) -> tuple[bool, float]:
    finished = [row["true_score"] for row in one.tests.values()]
    return not finished, -(fmean(finished) if finished else one.validation(one.best))


def _cells(one: Search, other: Search) -> list[str]:
    floor, rate, multiple = one.best
    seeds = len(one.seeds_of(one.best))
    cells = [one.name, one.stands(), f"{rate:g}, {multiple:g}, {floor:g}"]
    cells.append(f"{one.validation(one.best):.3f} ({seeds})")
    finished = {seed: row for seed, row in one.tests.items() if not row["diverged"]}
    lost = len(one.tests) - len(finished)
    score = interval([row["true_score"] for row in finished.values()], "{:.3f}")
    cells.append(f"{score} ({lost} diverged)" if lost else score)
    differences = [
        row["true_score"] - other.tests[seed]["true_score"]
        for seed, row in finished.items()
        if seed in other.tests and not other.tests[seed]["diverged"] and one.name != other.name
    ]
    cells.append(interval(differences, "{:+.3f}"))
    cells += [
        interval([row[name] for row in finished.values()], form)
        for name, (_, form) in COLUMNS.items()
    ]
    return [*cells, *(one.at_kl(kl) for kl in KL_TARGETS), one.forgiving()]


def interval(values: list[float], form: str) -> str:
    """The mean, and the half width of its 95 % interval by Student's t, over the seeds."""
    if not values:
        return ""
    mean = form.format(fmean(values))
    if len(values) == 1:
        return mean
    half = T_95[len(values)] * stdev(values) / len(values) ** 0.5
    return f"{mean} ± {form.replace('+', '').format(half)}"


def plot(searches: dict[str, Search], base: float) -> None:
    """Score against KL: every setting faint, the best of each loss named at the side."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": "tbpo"})
    figure, panel = plt.subplots(figsize=(8.5, 5))
    shown = {name: searches[name] for name in COLOURS if searches[name].places}
    for name, one in shown.items():
        kl, score = zip(*one.places.values(), strict=True)
        panel.scatter(kl, score, s=16, color=COLOURS[name], alpha=0.35, linewidths=0)
    best = {name: one.places[one.best] for name, one in shown.items() if one.best in one.places}
    low, high = panel.get_ylim()
    step = 0.065 * (high - low)
    by_score = sorted(best, key=lambda name: -best[name][1])
    for place, name in enumerate(by_score, 1):
        kl, score = best[name]
        panel.scatter(kl, score, s=60, color=COLOURS[name], edgecolors="white", zorder=3)
        panel.annotate(
            f" {name}  {score:.2f}",
            (kl, score),
            (1.05, high - place * step),
            textcoords=panel.get_yaxis_transform(),
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS[name],
                "linewidth": 1.0,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "zorder": 1,
            },
        )
    panel.axhline(base, color="gray", linewidth=0.8, linestyle=":")
    panel.annotate(
        "the base",
        (1, base),
        (-2, 3),
        xycoords=panel.get_yaxis_transform(),
        textcoords="offset points",
        color="dimgray",
        ha="right",
    )
    panel.set(
        xscale="log",
        xlabel="KL(reference ‖ policy), nats a token of held-out pairs (log scale)",
        ylabel="true score on validation prompts",
        title="Every setting tried (faint), and the best of each loss",
    )
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "methods.svg", metadata={"Date": None})
