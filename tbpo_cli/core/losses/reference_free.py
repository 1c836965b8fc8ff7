"""Losses that read the policy alone: there is no reference model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tbpo_cli.core.losses.base import (
    BetaLoss,
    Loss,
    PreferenceLoss,
    mean_of,
    require_not_negative,
    sum_of,
)
from tbpo_cli.core.types import LossOutput, PairScores


@dataclass(frozen=True)
class SimPo(BetaLoss):
    """SimPO: softplus(−(β (mean log π_θ(y^w) − mean log π_θ(y^l)) − γ)).

    Source: arXiv 2405.14734, equation 6.
    """

    beta: float = 2.0
    gamma: float = 1.6
    reads = frozenset({"logps"})
    when = "No memory for a reference; responses of very different lengths."

    def compare(self, scores: PairScores) -> LossOutput:
        """`reads` → one number a pair, by the formula of the class."""
        margin = self.beta * (mean_of(scores.chosen, "logps") - mean_of(scores.rejected, "logps"))
        return LossOutput(F.softplus(self.gamma - margin))


@dataclass(frozen=True)
class Cpo(BetaLoss):
    """CPO: softplus(−β (Σ log π_θ(y^w) − Σ log π_θ(y^l))), and fine-tuning on the chosen response.

    Source: arXiv 2401.08417; `sft_weight` is the weight of its second term.
    """

    sft_weight: float = field(default=1.0, kw_only=True)
    reads = frozenset({"logps"})
    when = "No memory for a reference; translation, for which it was made."

    def compare(self, scores: PairScores) -> LossOutput:
        margin = sum_of(scores.chosen, "logps") - sum_of(scores.rejected, "logps")
        return LossOutput(F.softplus(-self.beta * margin))


@dataclass(frozen=True)
class Orpo(PreferenceLoss):
    """ORPO: −mean log π_θ(y^w) + λ softplus(−log-odds-ratio) of length-normalised probabilities.

    Source: arXiv 2403.07691, equations 6 and 7.
    """

    lam: float = 0.1
    reads = frozenset({"logps"})
    when = "Fine-tuning and preferences in one stage, from a base model, without a reference."

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative("lam", self.lam)

    def compare(self, scores: PairScores) -> LossOutput:
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
    when = "Demonstrations; or before a preference loss, so that the policy can answer at all."

    def __call__(self, scores: PairScores) -> LossOutput:
        return LossOutput(-mean_of(scores.chosen, "logps"))
