"""Losses that compare whole responses, by the policy's log-ratio to a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F

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
from tbpo_cli.core.types import LossOutput, PairScores


@dataclass(frozen=True)
class Dpo(BetaLoss):
    """DPO: softplus(z), z = β (Σr^l − Σr^w); smoothed, (1−ε) softplus(z) + ε softplus(−z).

    Source: arXiv 2305.18290, equation 7; the smoothing is that of conservative DPO (cDPO).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing)

    def __call__(self, scores: PairScores) -> LossOutput:
        z = self.z(scores)
        epsilon = self.label_smoothing
        return LossOutput((1 - epsilon) * F.softplus(z) + epsilon * F.softplus(-z))


@dataclass(frozen=True)
class Bpo(RatioMatching):
    """BPO: L_h(z), z = β (Σr^l − Σr^w), for any generator; the defaults are its authors' setting.

    Source: arXiv 2505.19601.
    """

    generator: Generator = field(default_factory=lambda: Sba(lam=0.5))
    min_ratio: float = 0.01

    def __call__(self, scores: PairScores) -> LossOutput:
        z = self.z(scores)
        return LossOutput(self.match(z), num_clipped=num_clipped(z))


@dataclass(frozen=True)
class Ipo(BetaLoss):
    """IPO: (mean r^w − mean r^l − 1/(2β))².

    Source: arXiv 2310.12036, equation 17, with length-normalised ratios.
    """

    def __call__(self, scores: PairScores) -> LossOutput:
        difference = mean_of(scores.chosen, "log_ratio") - mean_of(scores.rejected, "log_ratio")
        return LossOutput((difference - 1 / (2 * self.beta)) ** 2)


@dataclass(frozen=True)
class Hinge(BetaLoss):
    """SLiC's hinge on DPO's margin: max(0, 1 + z), z = β (Σr^l − Σr^w).

    Source: arXiv 2309.06657, section 3.
    """

    def __call__(self, scores: PairScores) -> LossOutput:
        return LossOutput(F.relu(1 + self.z(scores)))


@dataclass(frozen=True)
class Tdpo(BetaLoss):
    """TDPO, version 1: softplus(−β (Σr^w − Σr^l − (ΣK^l − ΣK^w))) = softplus(−β (ΣA^w − ΣA^l));
    version 2: softplus(−β (Σr^w − Σr^l − α (ΣK^l − stopgrad(ΣK^w)))).

    Source: arXiv 2404.11999, equations 16 and 17.
    """

    version: Literal[1, 2] = 2
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.version in (1, 2), f"version must be 1 or 2, got {self.version}")
        require(math.isfinite(self.alpha), f"alpha must be a finite number, got {self.alpha}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # nobody assigns it
        """Version 1 is a difference of advantages; version 2 weighs the KL by itself."""
        return frozenset({"advantage"} if self.version == 1 else {"log_ratio", "kl"})

    def __call__(self, scores: PairScores) -> LossOutput:
        if self.version == 1:
            margin = sum_of(scores.chosen, "advantage") - sum_of(scores.rejected, "advantage")
            return LossOutput(F.softplus(-self.beta * margin))
        kl_difference = sum_of(scores.rejected, "kl") - sum_of(scores.chosen, "kl").detach()
        return LossOutput(F.softplus(self.z(scores) + self.beta * self.alpha * kl_difference))
