"""The metrics of a training over its steps, for curves.svg and for reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tbpo_cli.svg import Panel, Series

PANELS = (  # title, unit, the metrics in it
    ("loss", "nats", ("loss",)),
    ("reward accuracy", "share of pairs", ("accuracy", "token_accuracy")),
    ("reward", "nats", ("reward_chosen", "reward_rejected")),
    ("KL from the reference", "nats a token", ("kl",)),
    ("log-probability", "nats a token", ("logps_chosen", "logps_rejected")),
    ("entropy", "nats a token", ("entropy",)),
    ("gradient norm", "", ("grad_norm",)),
    ("learning rate", "", ("learning_rate",)),
)


def curves(lines: Sequence[dict[str, Any]]) -> list[Panel]:
    """A panel for each group of metrics in the lines: training as thin lines, evaluations as thick ones with dots."""
    return [
        Panel(title, unit, "optimizer step", _series(lines, names))
        for title, unit, names in PANELS
        if any(name in line for line in lines for name in names)
    ]


def _series(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Series]:
    series = []
    for colour, name in enumerate(names):
        train, evaluations = (
            [(line["step"], line.get(name, math.nan)) for line in lines if line["split"] == split]
            for split in ("train", "eval")
        )
        series += [Series(train, colour, name, line=1), Series(evaluations, colour, line=2.5, dots=3)]
    return series
