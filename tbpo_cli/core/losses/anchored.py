"""Losses that also pull the log-ratio of each single response up or down, not only the margin.

A loss of the margin alone may lower both responses. `sft_weight` is another remedy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from tbpo_cli.core.losses.base import BetaLoss, require_not_negative, sum_of
from tbpo_cli.core.types import LossOutput, PairScores


@dataclass(frozen=True)
class ApoZero(BetaLoss):
    """APO-zero: 1 − σ(β Σr^w) + σ(β Σr^l): chosen responses become likelier, rejected ones less.

    Source: arXiv 2408.06266.
    """

    when = "Chosen answers that are better than what the model writes."

    def compare(self, scores: PairScores) -> LossOutput:
        """`reads` → one number a pair, by the formula of the class."""
        chosen = self.beta * sum_of(scores.chosen, "log_ratio")
        rejected = self.beta * sum_of(scores.rejected, "log_ratio")
        return LossOutput(F.sigmoid(-chosen) + F.sigmoid(rejected))


@dataclass(frozen=True)
class ApoDown(BetaLoss):
    """APO-down: σ(β Σr^w) + 1 − σ(β (Σr^w − Σr^l)): both become less likely, most the rejected.

    Source: arXiv 2408.06266.
    """

    when = "Chosen answers that are worse than what the model writes."

    def compare(self, scores: PairScores) -> LossOutput:
        chosen = self.beta * sum_of(scores.chosen, "log_ratio")
        return LossOutput(F.sigmoid(chosen) + F.sigmoid(self.z(scores)))


@dataclass(frozen=True)
class Dpop(BetaLoss):
    """DPO-positive: softplus(−β (Σr^w − Σr^l − λ max(0, −Σr^w))).

    λ punishes a chosen response that the policy makes less likely than the reference does.

    Source: arXiv 2402.13228.
    """

    lam: float = 50.0
    when = "Pairs that differ in a few tokens: dpo makes both of their responses less likely."

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative("lam", self.lam)

    def compare(self, scores: PairScores) -> LossOutput:
        penalty = self.lam * F.relu(-sum_of(scores.chosen, "log_ratio"))
        return LossOutput(F.softplus(self.z(scores) + self.beta * penalty))
