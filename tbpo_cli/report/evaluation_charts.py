"""The charts of an evaluation's report."""

from __future__ import annotations

from typing import Any

import numpy as np

from tbpo_cli.report.charts import Panel, Series, ends_of, histogram

Json = dict[str, Any]

IDEAL = Series([(0.5, 0.5), (1, 1)], None, line=1)
# The reference's distance from itself.
ORIGIN = {"value": 0.0, "low": 0.0, "high": 0.0}
BY_LENGTH = (
    ("accuracy", "reward accuracy", "share of pairs"),
    ("entropy", "entropy", "nats a token"),
)


def panels_of(
    results: Json, samples: list[Json], verdicts: list[Json], metrics: list[Json]
) -> list[Panel]:
    """The charts, each model in the colour of its place in results.json.

    Args:
        samples: of all models.
        verdicts: on the first comparison of the win rates.
        metrics: the lines of align/metrics.jsonl.
    """
    models = results["models"]
    pairs = [model["preference"] for model in models.values()]  # their places are the colours
    way = [
        (line["kl"], line["margin"])
        for line in metrics
        if line["split"] == "eval" and "margin" in line
    ]
    ends = [_crossing(*(of["all"].get(name, ORIGIN) for name in ("kl", "margin"))) for of in pairs]
    bins = [[(bin["predicted"], bin["observed"]) for bin in of["reliability"]] for of in pairs]
    frontier = [
        Series(way, line=1, dots=1.5),
        *(Series([end], colour, dots=4) for colour, end in enumerate(ends)),
    ]
    reliability = [Series(points, colour, line=1.5, dots=3) for colour, points in enumerate(bins)]
    panels = [
        *_win_rates(results),
        Panel("reward margin", "nats", "KL from the reference, nats a token", frontier),
        Panel("reliability", "share of pairs", "predicted by σ(|margin|)", [IDEAL, *reliability]),
    ]
    for metric, title, unit in BY_LENGTH:
        buckets = [
            [_of_bucket(b, metric) for b in of["buckets"] if metric in b["metrics"]] for of in pairs
        ]
        series = [Series(points, colour, line=1, dots=3) for colour, points in enumerate(buckets)]
        panels.append(Panel(title, unit, "tokens of the pair's longer response", series))
    lengths = [(sample["model"], len(sample["token_ids"])) for sample in samples]
    scores = [
        pair
        for v in verdicts
        for pair in zip((v["model"], v["against"]), v["scores"] or (), strict=False)
    ]
    for title, x_title, values in (
        ("length of the answers", "tokens", lengths),
        ("score of the answers", "score", scores),
    ):
        of_models = [
            np.array([value for name, value in values if name == model]) for model in models
        ]
        if any(map(len, of_models)):
            panels.append(
                histogram(
                    title, "answers", x_title, {c: of for c, of in enumerate(of_models) if len(of)}
                )
            )
    return panels


def _win_rates(results: Json) -> list[Panel]:
    """The win rates against the first opponent, by the first judge, over the KL that they cost."""
    rates = [rate for rate in results["win_rates"] if rate["raw"]]
    rates = [rate for rate in rates if _asked(rate) == _asked(rates[0])]
    if not rates:
        return []
    names = list(results["models"])
    points = {}
    for rate in rates:
        figures = results["models"][rate["model"]]["preference"]["all"]
        colour = names.index(rate["model"])
        points[colour] = _crossing(figures.get("kl", ORIGIN), rate["raw"])
    farthest = max(point[3] for point in points.values())
    half = Series([(0.0, 0.5), (farthest, 0.5)], None, line=1)
    series = [Series([point], colour, dots=4) for colour, point in points.items()]
    title = f"win rate against {rates[0]['against']}"
    return [
        Panel(title, "share of prompts", "KL from the reference, nats a token", [half, *series])
    ]


def _asked(rate: Json) -> tuple[str, str]:
    return rate["against"], rate["judge"]


def _crossing(x: Json, y: Json) -> tuple[float, ...]:
    return x["value"], y["value"], *ends_of(x), *ends_of(y)


def _of_bucket(bucket: Json, metric: str) -> tuple[float, ...]:
    low, high = bucket["shortest"], bucket["longest"]
    return _crossing(
        {"value": (low + high) / 2, "low": low, "high": high}, bucket["metrics"][metric]
    )
