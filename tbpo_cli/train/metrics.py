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
from tbpo_cli.core.types import LossOutput, PairScores, sums_over_response
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import write_whole
from tbpo_cli.train.group import Group

Totals = dict[
    str, tuple[Tensor | float, Tensor | float]
]  # name → (sum, number of pairs or tokens it is a mean over)


DIFFERS = " differs"  # after a metric's name: of how many pairs or tokens it says something


def measure(scores: PairScores, output: LossOutput, loss: Loss) -> Totals:
    """Sums and counts of every metric that the scores allow, still on their device.

    All but `num_clipped` are means over pairs, or over their tokens, in which each pair has its
    weight.

    - loss: nats, per pair or per chosen token, as the loss says.
    - reward_chosen, reward_rejected: β Σ r. margin: their difference. accuracy: pairs with a margin
      above 0.
    - token_accuracy: aligned tokens with log R_t < 0.
      Neither accuracy is given where the two sides of no pair, or no token, differ in it at all,
      as before the first step: nothing is preferred then.
    - kl = KL(π_ref ‖ π_θ), reverse_kl = KL(π_θ ‖ π_ref), entropy: per response token of both sides.
    - logps_chosen, logps_rejected: per token.
    - num_clipped: values of log R outside ±30.
    """
    chosen, rejected = sums_over_response(scores.chosen), sums_over_response(scores.rejected)
    aligned = scores.aligned_mask
    of_pair = _weights_of_pairs(scores)
    of_loss = pair_weights(scores, loss)

    def mean(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return (sums * of_pair).sum(), (counts * of_pair).sum()

    totals: Totals = {"loss": ((output.per_pair.detach() * of_loss).sum(), of_loss.sum())}
    if "logps" in chosen:
        totals["logps_chosen"] = mean(chosen["logps"], chosen["tokens"])
        totals["logps_rejected"] = mean(rejected["logps"], rejected["tokens"])
    for name in ("kl", "reverse_kl", "entropy"):
        if name in chosen:
            num_tokens = chosen["tokens"] + rejected["tokens"]
            totals[name] = mean(chosen[name] + rejected[name], num_tokens)
    if "log_ratio" in chosen and scores.rejected.mask.shape[1]:
        beta = getattr(loss, "beta", 1.0)
        reward_chosen, reward_rejected = beta * chosen["log_ratio"], beta * rejected["log_ratio"]
        of_pairs = {"reward_chosen": reward_chosen, "reward_rejected": reward_rejected}
        of_pairs |= {
            "margin": reward_chosen - reward_rejected,
            "accuracy": reward_chosen > reward_rejected,
        }
        one = torch.ones_like(of_pair)
        totals |= {name: mean(values, one) for name, values in of_pairs.items()}
        totals["accuracy" + DIFFERS] = ((reward_chosen != reward_rejected).sum(), 1)
    log_ratio = output.log_ratio_aligned
    if (
        log_ratio is None
        and scores.chosen.log_ratio is not None
        and scores.rejected.log_ratio is not None
    ):
        # For losses of whole responses: log R_t up to a positive factor, with log w = 0.
        length = aligned.shape[1]
        log_ratio = scores.rejected.log_ratio[:, :length] - scores.chosen.log_ratio[:, :length]
    if log_ratio is not None:
        num_right = ((log_ratio < 0) & aligned).sum(dim=1)
        totals["token_accuracy"] = mean(num_right, aligned.sum(dim=1))
        totals["token_accuracy" + DIFFERS] = (((log_ratio != 0) & aligned).sum(), 1)
    if output.num_clipped is not None:
        totals["num_clipped"] = (output.num_clipped, 1)
    return totals


def _weights_of_pairs(scores: PairScores) -> Tensor:
    """(B,), 1 for each pair if none has a weight of its own."""
    if scores.weights is not None:
        return scores.weights
    mask = scores.chosen.mask
    return torch.ones(mask.shape[0], device=mask.device)


def pair_weights(scores: PairScores, loss: Loss) -> Tensor:
    """What the loss of each pair counts for in that of the step, (B,).

    It is the weight of the pair, times its number of chosen tokens if `loss.mean_over` says so.
    """
    weights = _weights_of_pairs(scores)
    if loss.mean_over == "chosen_tokens":
        return weights * scores.chosen.mask.sum(dim=1)
    return weights


def average(parts: Sequence[Totals], group: Group) -> dict[str, float]:
    """The means over the batches of all processes; counts, whose names begin with num_, are summed.

    The host waits for the device once.
    """
    summed = _add_up(group.gather(_add_up(parts)))
    saying = {name.removesuffix(DIFFERS): n for name, (n, _) in summed.items() if DIFFERS in name}
    return {
        name: total if name.startswith("num_") else total / count
        for name, (total, count) in summed.items()
        if count and DIFFERS not in name and saying.get(name, 1)
    }


def _add_up(
    parts: Sequence[Mapping[str, tuple[Tensor | float, Tensor | float]]],
) -> dict[str, tuple[float, float]]:
    tensors = [
        value
        for part in parts
        for pair in part.values()
        for value in pair
        if isinstance(value, Tensor)
    ]
    numbers = iter(torch.stack([tensor.float() for tensor in tensors]).tolist() if tensors else ())
    summed: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, pair in part.items():
            total, count = (next(numbers) if isinstance(value, Tensor) else value for value in pair)
            before = summed.get(name, (0.0, 0.0))
            summed[name] = (before[0] + total, before[1] + count)
    return summed


class MetricsLog:
    """metrics.jsonl: a line for each step and each evaluation.

    It is {"split": "train" | "eval", "step": …, metric: value, …}. Accelerate's trackers neither
    have a line on the disk before the next step nor drop those after the checkpoint on resuming.
    """

    def __init__(self, path: Path, upto_step: int, writes: bool = True) -> None:
        """Opens the log, and drops the lines after the checkpoint that a run goes on from."""
        self.path = path
        self._writes = writes
        self.lines = [line for line in read_metrics(path) if line["step"] <= upto_step]
        if writes:
            write_whole(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def append(self, split: str, step: int, values: dict[str, Any]) -> None:
        """Adds a line; it is on the disk when this returns."""
        line = {"split": split, "step": step, **values}
        self.lines.append(line)
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut short is left out."""
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1):
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"]), "split": str(line["split"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            what = "a line of the metrics is damaged"
            expected = '{"split": …, "step": …, …}, as tbpo wrote it'
            raise TbpoError(what, f"{path}, line {number}", expected, "remove that line") from None
    return lines
