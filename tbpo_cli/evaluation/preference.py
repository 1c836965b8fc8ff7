"""Held-out pairs: does the model prefer what was preferred, how surely, and how far did it move?"""

from __future__ import annotations

from typing import Any

import numpy as np

from tbpo_cli.batch.layouts import PairBatch
from tbpo_cli.core.head import DIAGNOSTICS, REFERENCE_FREE
from tbpo_cli.core.types import sums_over_response
from tbpo_cli.evaluation.measures import MEASURES
from tbpo_cli.evaluation.stats import Figure, figure, figure_of, rate_figure, ratio_figure
from tbpo_cli.model.policy import REFERENCE
from tbpo_cli.model.scoring import Scorer

Columns = dict[str, np.ndarray]  # (n,) each, one entry a pair

NUM_BUCKETS = 4
NUM_BINS = 10
# Metric, and the column of its sums: the column of the number of tokens that it is a mean over.
MEANS = {
    **dict.fromkeys(("kl", "reverse_kl", "entropy"), "tokens"),
    **{
        "token_accuracy": "aligned",
        "logps_chosen": "chosen_tokens",
        "logps_rejected": "rejected_tokens",
    },
}


def pair_rows(scorer: Scorer, view: str, batch: PairBatch) -> list[dict[str, Any]]:
    """What each pair adds to the metrics: sums over its tokens, exact over the full vocabulary.

    Args:
        view: of the scorer's policy, whose scores these are; those of the reference compare it with
            nothing.
        batch: whole responses of pairs of one store.
    """
    needs = DIAGNOSTICS & REFERENCE_FREE if view == REFERENCE else DIAGNOSTICS
    scores = scorer.measure(batch, needs, view)
    sides = (scores.chosen, scores.rejected)
    aligned = scores.aligned_mask
    chosen, rejected = map(sums_over_response, sides)
    columns = {"chosen_tokens": chosen["tokens"], "rejected_tokens": rejected["tokens"]}
    columns |= {"logps_chosen": chosen["logps"], "logps_rejected": rejected["logps"]}
    columns |= {name: chosen[name] + rejected[name] for name in ("tokens", "entropy")}
    if scores.chosen.advantage is not None:
        gains = [
            side.advantage[:, : aligned.shape[1]] for side in sides if side.advantage is not None
        ]
        columns |= {name: chosen[name] + rejected[name] for name in ("kl", "reverse_kl")}
        columns |= {
            "token_accuracy": ((gains[0] > gains[1]) & aligned).sum(dim=1),
            "aligned": aligned.sum(dim=1),
        }
        columns["log_ratio"] = chosen["log_ratio"] - rejected["log_ratio"]
    rows = zip(batch.indices, *(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(("pair", *columns), row, strict=True)) for row in rows]


def summarise(rows: list[dict[str, Any]], beta: float) -> dict[str, Any]:
    """{"all": figures, "buckets": the same by length, "reliability": the curve of σ(margin)}.

    `kl` = KL(π_ref ‖ π), `reverse_kl` = KL(π ‖ π_ref) and `entropy` are means over the response
    tokens of both sides; `margin` = β (Σ r^w − Σ r^l); `token_accuracy` is the share of aligned
    positions with A^w > A^l, for models of all losses alike. Buckets are quartiles of the length of
    a pair's longer response.

    Args:
        rows: of all pairs, from `pair_rows`.
        beta: of the loss that the model was trained with.
    """
    rows = sorted(rows, key=lambda row: row["pair"])  # as one process would give them
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    lengths = np.maximum(columns["chosen_tokens"], columns["rejected_tokens"])
    edges = np.unique(np.quantile(lengths, np.arange(1, NUM_BUCKETS) / NUM_BUCKETS))
    bucket_of = np.searchsorted(edges, lengths)
    buckets = []
    for bucket in np.unique(bucket_of):
        inside = bucket_of == bucket
        metrics = _metrics({name: values[inside] for name, values in columns.items()}, beta)
        shortest, longest = int(lengths[inside].min()), int(lengths[inside].max())
        buckets.append({"shortest": shortest, "longest": longest, "metrics": metrics})
    curve = reliability(beta * columns["log_ratio"]) if "log_ratio" in columns else []
    return {"all": _metrics(columns, beta), "buckets": buckets, "reliability": curve}


def _metrics(columns: Columns, beta: float) -> dict[str, Figure]:
    figures = {
        name: ratio_figure(columns[name], columns[over])
        for name, over in MEANS.items()
        if name in columns
    }
    if "log_ratio" in columns:
        margins = beta * columns["log_ratio"]
        figures |= {"accuracy": rate_figure(margins > 0), "margin": figure(margins)}
        figures["ece"] = figure_of(calibration_error, margins)
    return {name: figures[name] for name in MEASURES if name in figures}


def reliability(margins: np.ndarray) -> list[dict[str, float]]:
    """The reliability curve of σ(|margin|), the model's confidence in the side that it prefers.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), for the curve and for the
    expected calibration error: 10 bins of equal width, from a half to 1. Equal scores of both sides
    are right half of the time.

    Returns:
        of each bin that is not empty: `predicted`, the mean confidence, `observed`, how often the
        preferred side is the chosen one, and `n` pairs.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (np.sign(margins) + 1) / 2
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    _, places, counts = np.unique(bins, return_inverse=True, return_counts=True)
    predicted, observed = (np.bincount(places, values) / counts for values in (confidence, right))
    rows = zip(predicted.tolist(), observed.tolist(), counts.tolist(), strict=True)
    return [dict(zip(("predicted", "observed", "n"), row, strict=True)) for row in rows]


def calibration_error(margins: np.ndarray) -> float:
    """The expected calibration error: the mean over pairs of |observed − predicted| in their bin of
    the curve.
    """
    return sum(
        bin["n"] * abs(bin["observed"] - bin["predicted"]) for bin in reliability(margins)
    ) / len(margins)
