"""Losses that read the policy alone: there is no reference model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tbpo_cli.core.losses.base import BetaLoss, Loss, mean_of, require
from tbpo_cli.core.types import LossOutput, PairScores


@dataclass(frozen=True)
class SimPo(BetaLoss):
    """SimPO: softplus(−(β (mean log π_θ(y^w) − mean log π_θ(y^l)) − γ)).

    Source: arXiv 2405.14734, equation 6.
    """

    beta: float = 2.0
    gamma: float = 1.6
    needs = frozenset({"logps"})

    def __call__(self, scores: PairScores) -> LossOutput:
        margin = self.beta * (mean_of(scores.chosen, "logps") - mean_of(scores.rejected, "logps"))
        return LossOutput(F.softplus(self.gamma - margin))


@dataclass(frozen=True)
class Orpo(Loss):
    """ORPO: −mean log π_θ(y^w) + λ softplus(−log-odds-ratio) of length-normalised probabilities.

    Source: arXiv 2403.07691, equations 6 and 7.
    """

    lam: float = 0.1
    needs = frozenset({"logps"})

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.lam) and self.lam >= 0, f"lam must not be negative, got {self.lam}"
        )

    def __call__(self, scores: PairScores) -> LossOutput:
        chosen = mean_of(scores.chosen, "logps")
        rejected = mean_of(scores.rejected, "logps")
        log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
        return LossOutput(-chosen + self.lam * F.softplus(-log_odds_ratio))


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 − p)) for p = exp(mean_logps), kept finite where p rounds to 1."""
    mean_logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return mean_logps - (-torch.expm1(mean_logps)).log()


@dataclass(frozen=True)
class Sft(Loss):
    """Supervised fine-tuning: −mean over the chosen response's tokens of log π_θ.

    A step's loss is the mean over its chosen tokens.
    """

    needs = frozenset({"logps"})
    span = "chosen"
    mean_over = "chosen_tokens"

    def __call__(self, scores: PairScores) -> LossOutput:
        return LossOutput(-mean_of(scores.chosen, "logps"))
