"""What is reported of a batch, on the same definitions for every loss, and metrics.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbpo_cli.core.losses import Loss
from tbpo_cli.core.types import LossOutput, PairScores, SideScores, sum_over_response
from tbpo_cli.errors import TbpoError
from tbpo_cli.files import write_whole
from tbpo_cli.train.group import Group

Totals = dict[str, tuple[Tensor | float, Tensor | float]]  # name → (sum, number of pairs or tokens it is a mean over)


def measure(scores: PairScores, output: LossOutput, loss: Loss) -> Totals:
    """Sums and counts of every metric that the scores allow, still on their device.

    loss (nats, per pair or per chosen token, as the loss says); reward_chosen, reward_rejected = β Σ r; margin, their
    difference; accuracy, the share of pairs with margin > 0; token_accuracy, the share of aligned tokens with
    log R_t < 0; kl = KL(π_ref ‖ π_θ), reverse_kl = KL(π_θ ‖ π_ref) and entropy, per response token of both sides;
    logps_chosen, logps_rejected, per token; num_clipped, values of log R outside ±30.
    """
    chosen, rejected = scores.chosen, scores.rejected
    num_pairs, weights = len(output.per_pair), pair_weights(scores, loss)
    totals: Totals = {"loss": ((output.per_pair.detach() * weights).sum(), weights.sum())}
    per_token: dict[str, tuple[str, tuple[SideScores, ...]]] = {
        "logps_chosen": ("logps", (chosen,)),
        "logps_rejected": ("logps", (rejected,)),
    }
    per_token |= {name: (name, (chosen, rejected)) for name in ("kl", "reverse_kl", "entropy")}
    for metric, (name, sides) in per_token.items():
        if getattr(chosen, name) is not None:
            sums = [sum_over_response(getattr(side, name).detach(), side.mask).sum() for side in sides]
            totals[metric] = (sum(sums), sum(side.mask.sum() for side in sides))
    if chosen.log_ratio is not None and rejected.mask.shape[1]:
        beta = getattr(loss, "beta", 1.0)
        reward_chosen, reward_rejected = (_reward(side, beta) for side in (chosen, rejected))
        totals["reward_chosen"] = (reward_chosen.sum(), num_pairs)
        totals["reward_rejected"] = (reward_rejected.sum(), num_pairs)
        totals["margin"] = ((reward_chosen - reward_rejected).sum(), num_pairs)
        totals["accuracy"] = ((reward_chosen > reward_rejected).sum(), num_pairs)
    if (log_ratio := _aligned_log_ratio(scores, output)) is not None:
        aligned = scores.aligned_mask
        totals["token_accuracy"] = (((log_ratio < 0) & aligned).sum(), aligned.sum())
    if output.num_clipped is not None:
        totals["num_clipped"] = (output.num_clipped, 1)
    return totals


def pair_weights(scores: PairScores, loss: Loss) -> Tensor:
    """What each pair counts for in a step's loss, (B,): 1, or its number of chosen tokens, as `loss.mean_over` says."""
    num_chosen = scores.chosen.mask.sum(dim=1)
    return num_chosen if loss.mean_over == "chosen_tokens" else torch.ones_like(num_chosen)


def _reward(side: SideScores, beta: float) -> Tensor:
    assert side.log_ratio is not None
    return beta * sum_over_response(side.log_ratio.detach(), side.mask)


def _aligned_log_ratio(scores: PairScores, output: LossOutput) -> Tensor | None:
    """log R_t up to a positive factor; for losses of whole responses, with log w = 0."""
    if output.log_ratio_aligned is not None:
        return output.log_ratio_aligned
    if scores.chosen.log_ratio is None or scores.rejected.log_ratio is None:
        return None
    length = scores.aligned_mask.shape[1]
    return (scores.rejected.log_ratio[:, :length] - scores.chosen.log_ratio[:, :length]).detach()


def average(parts: Sequence[Totals], group: Group) -> dict[str, float]:
    """The means over several batches of all processes; counts (num_…) are added up. Waits for the device, once."""
    summed = _add_up(group.gather(_add_up(parts)))
    return {
        name: total if name.startswith("num_") else total / count for name, (total, count) in summed.items() if count
    }


def _add_up(parts: Sequence[Mapping[str, tuple[Tensor | float, Tensor | float]]]) -> dict[str, tuple[float, float]]:
    tensors = [value for part in parts for pair in part.values() for value in pair if isinstance(value, Tensor)]
    numbers = iter(torch.stack([tensor.float() for tensor in tensors]).tolist() if tensors else ())
    summed: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, pair in part.items():
            total, count = (next(numbers) if isinstance(value, Tensor) else value for value in pair)
            before = summed.get(name, (0.0, 0.0))
            summed[name] = (before[0] + total, before[1] + count)
    return summed


class MetricsLog:
    """metrics.jsonl: one line a step and one an evaluation, {"split": "train" | "eval", "step": …, …}."""

    def __init__(self, path: Path, upto_step: int, writes: bool = True) -> None:
        """Opens the log, dropping what an interrupted run wrote after the checkpoint it goes on from.

        Args:
            writes: whether this process is the one that does.
        """
        self.path, self._writes = path, writes
        self.lines = [line for line in read_metrics(path) if line["step"] <= upto_step]
        if writes:
            write_whole(path, "".join(_encode(line) for line in self.lines))

    def append(self, split: str, step: int, values: dict[str, Any]) -> None:
        """Adds a line, to the disk before it returns."""
        line = {"split": split, "step": step, **values}
        self.lines.append(line)
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_encode(line))
            file.flush()
            os.fsync(file.fileno())

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The evaluation at a step, if it was made."""
        return next((line for line in self.lines if line["split"] == "eval" and line["step"] == step), None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
            lines += [] if line is None else [line | {"step": int(line["step"]), "split": str(line["split"])}]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise TbpoError(
                "a line of the metrics is damaged",
                f"{path}, line {number}",
                '{"split": …, "step": …, …}, as tbpo wrote it',
                "remove that line",
            ) from None
    return lines


def _encode(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
