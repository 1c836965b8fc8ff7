"""Losses that compare whole responses, by the policy's log-ratio to a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from tbpo_cli.core.generators import Generator, Sba
from tbpo_cli.core.losses.base import (
    BetaLoss,
    RatioMatching,
    check_smoothing,
    mean_of,
    num_clipped,
    require,
    sum_of,
)
from tbpo_cli.core.types import LossOutput, PairScores, SideScores


@dataclass(frozen=True)
class Dpo(BetaLoss):
    """DPO: softplus(z), z = β (Σr^l − Σr^w); smoothed, (1−ε) softplus(z) + ε softplus(−z).

    Source: arXiv 2305.18290, equation 7; the smoothing is that of conservative DPO (cDPO).
    """

    label_smoothing: float = 0.0
    when = "The common choice, for results that are compared with those of others."

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing)

    def compare(self, scores: PairScores) -> LossOutput:
        """`reads` → one number a pair, by the formula of the class."""
        z = self.z(scores)
        epsilon = self.label_smoothing
        return LossOutput((1 - epsilon) * F.softplus(z) + epsilon * F.softplus(-z))


@dataclass(frozen=True)
class Robust(BetaLoss):
    """Robust DPO: [(1−ε) softplus(z) − ε softplus(−z)] / (1 − 2ε), z = β (Σr^l − Σr^w).

    Its mean over labels that were flipped with probability ε is DPO's loss over the true ones. It
    is unbounded below.

    Source: arXiv 2403.00409.
    """

    label_smoothing: float = 0.1
    when = "Noisy labels: about the share label_smoothing of them is wrong."

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing)

    def compare(self, scores: PairScores) -> LossOutput:
        z = self.z(scores)
        epsilon = self.label_smoothing
        corrected = (1 - epsilon) * F.softplus(z) - epsilon * F.softplus(-z)
        return LossOutput(corrected / (1 - 2 * epsilon))


@dataclass(frozen=True)
class DpoNorm(BetaLoss):
    """Length-normalised DPO: softplus(β (mean r^l − mean r^w)).

    Source: arXiv 2411.15124 (Tülu 3).
    """

    beta: float = 5.0
    when = "As dpo, where longer answers shall not win by their length."

    def compare(self, scores: PairScores) -> LossOutput:
        difference = mean_of(scores.rejected, "log_ratio") - mean_of(scores.chosen, "log_ratio")
        return LossOutput(F.softplus(self.beta * difference))


@dataclass(frozen=True)
class Wpo(BetaLoss):
    """WPO: DPO's softplus(z), each pair weighed by how likely the policy itself is to write it.

    The weight is min(1, exp(m^w + m^l)), without a gradient; m is the mean over a response's tokens
    of log π_θ(y_t) − log Σ_v π_θ(v)². It is 0 where a token is as likely as a sample of the policy.

    Source: arXiv 2406.11827, equation 2 ("sampled alignment"), as its released code has it.
    """

    reads = frozenset({"log_ratio", "logps", "collision_entropy"})
    when = "Answers that other models wrote."

    def compare(self, scores: PairScores) -> LossOutput:
        closeness = _closeness(scores.chosen) + _closeness(scores.rejected)
        weight = closeness.detach().clamp(max=0).exp()
        return LossOutput(weight * F.softplus(self.z(scores)))


def _closeness(side: SideScores) -> Tensor:
    """m: mean log π_θ(y_t), less the log of its mean over what the policy samples, (B,)."""
    return mean_of(side, "logps") + mean_of(side, "collision_entropy")


@dataclass(frozen=True)
class Bpo(RatioMatching):
    """BPO: L_h(z), z = β (Σr^l − Σr^w), for any generator; the defaults are its authors' setting.

    Source: arXiv 2505.19601.
    """

    generator: Generator = field(default_factory=lambda: Sba(lam=0.5))
    min_ratio: float = 0.01
    when = "As dpo, with another shape of the loss, which the generator gives."

    def compare(self, scores: PairScores) -> LossOutput:
        z = self.z(scores)
        return LossOutput(self.match(z), num_clipped=num_clipped(z))


@dataclass(frozen=True)
class Ipo(BetaLoss):
    """IPO: (mean r^w − mean r^l − 1/(2β))².

    Source: arXiv 2310.12036, equation 17, with length-normalised ratios.
    """

    when = "Preferences that are nearly certain: the margin is drawn to a number, not to infinity."

    def compare(self, scores: PairScores) -> LossOutput:
        difference = mean_of(scores.chosen, "log_ratio") - mean_of(scores.rejected, "log_ratio")
        return LossOutput((difference - 1 / (2 * self.beta)) ** 2)


@dataclass(frozen=True)
class Hinge(BetaLoss):
    """SLiC's hinge on DPO's margin: max(0, 1 + z), z = β (Σr^l − Σr^w).

    Source: arXiv 2309.06657, section 3.
    """

    when = "Pairs whose margin is large enough shall no longer change the policy."

    def compare(self, scores: PairScores) -> LossOutput:
        return LossOutput(F.relu(1 + self.z(scores)))


@dataclass(frozen=True)
class Tdpo(BetaLoss):
    """TDPO, version 1: softplus(−β (Σr^w − Σr^l − (ΣK^l − ΣK^w))) = softplus(−β (ΣA^w − ΣA^l));
    version 2: softplus(−β (Σr^w − Σr^l − α (ΣK^l − stopgrad(ΣK^w)))).

    Source: arXiv 2404.11999, equations 16 and 17.
    """

    version: Literal[1, 2] = 2
    alpha: float = 0.5
    when = "As dpo, with the KL to the reference held down at every token."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.version in (1, 2), f"version must be 1 or 2, got {self.version}")
        require(math.isfinite(self.alpha), f"alpha must be a finite number, got {self.alpha}")

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]  # nobody assigns it
        """Version 1 is a difference of advantages; version 2 weighs the KL by itself."""
        return frozenset({"advantage"} if self.version == 1 else {"log_ratio", "kl"})

    def compare(self, scores: PairScores) -> LossOutput:
        if self.version == 1:
            margin = sum_of(scores.chosen, "advantage") - sum_of(scores.rejected, "advantage")
            return LossOutput(F.softplus(-self.beta * margin))
        kl_difference = sum_of(scores.rejected, "kl") - sum_of(scores.chosen, "kl").detach()
        return LossOutput(F.softplus(self.z(scores) + self.beta * self.alpha * kl_difference))
