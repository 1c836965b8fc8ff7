"""The preference losses, one small frozen dataclass each, and the LOSSES table.

A loss's fields are the keys of `[align.loss]`, its `__call__` is the mathematics, `needs` names the statistics of
`SideScores` that the scorer must compute (it computes no others), and `span` says which response tokens are read.
A new loss is one class and one line in `LOSSES`.

Below, w is the chosen and l the rejected side, Σ the sum over all tokens of a response, mean the mean over them, and
z the log of the ratio "rejected over chosen": a small z means that the policy prefers the chosen response.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tbpo_cli.core.generators import MAX_LOG_RATIO, Generator, Sba
from tbpo_cli.core.types import (
    LossOutput,
    PairScores,
    SideScores,
    mean_over_response,
    sum_over_response,
)


@dataclass(frozen=True)
class Loss:
    """Maps the token statistics of a batch of pairs to one number a pair.

    `span` is "aligned" if only the first min(|y^w|, |y^l|) tokens of both sides are read, "chosen" if the rejected
    side is not read, "response" otherwise. `mean_over` is what a step's loss is a mean over: its pairs, or its chosen
    tokens (each pair then weighs by its number of them).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_ratio"})
    span: ClassVar[Literal["aligned", "response", "chosen"]] = "response"
    mean_over: ClassVar[Literal["pairs", "chosen_tokens"]] = "pairs"

    def __call__(self, scores: PairScores) -> LossOutput:
        """The loss of each pair, from the statistics in `needs`."""
        raise NotImplementedError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_smoothing(label_smoothing: float) -> None:
    _require(
        0 <= label_smoothing < 0.5, f"label_smoothing must be in [0, 0.5), got {label_smoothing}"
    )


@dataclass(frozen=True)
class _PairLoss(Loss):
    """A loss with an inverse temperature β."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.beta) and self.beta > 0, f"beta must be positive, got {self.beta}"
        )

    def _z(self, scores: PairScores) -> Tensor:
        """z = β (Σr^l − Σr^w), (B,)."""
        return self.beta * (_sum(scores.rejected, "log_ratio") - _sum(scores.chosen, "log_ratio"))


@dataclass(frozen=True)
class _RatioMatching(_PairLoss):
    """Losses that fit z = log R under a Bregman generator.

    `label_smoothing` ε is the assumed share of flipped labels; `min_ratio` clips R from below, with zero gradient
    under the floor (0: no floor), which bounds losses whose generator does not saturate.
    """

    generator: Generator = field(default_factory=Sba)
    label_smoothing: float = 0.0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_smoothing(self.label_smoothing)
        _require(0 <= self.min_ratio < 1, f"min_ratio must be in [0, 1), got {self.min_ratio}")

    def _match(self, z: Tensor) -> Tensor:
        """(1−ε) L_h(z) + ε L_h(−z), elementwise."""
        floor = math.log(self.min_ratio) if self.min_ratio else -math.inf
        loss = self.generator.loss(z.clamp(min=floor))
        if self.label_smoothing:
            flipped = self.generator.loss((-z).clamp(min=floor))
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * flipped
        return loss

    def _match_tokens(self, scores: PairScores, z: Tensor) -> LossOutput:
        """(1/T) Σ_{t<T} L_h(log R_t), from z = log R_t, (B, T)."""
        mask = scores.aligned_mask
        z = z.masked_fill(~mask, 0.0)
        return LossOutput(mean_over_response(self._match(z), mask), z.detach(), _num_clipped(z))


def _of(side: SideScores, statistic: str) -> Tensor:
    """A statistic in the loss's `needs`, which the scorer has computed."""
    return cast(Tensor, getattr(side, statistic))


def _sum(side: SideScores, statistic: str) -> Tensor:
    return sum_over_response(_of(side, statistic), side.mask)


def _mean(side: SideScores, statistic: str) -> Tensor:
    return mean_over_response(_of(side, statistic), side.mask)


def _aligned_difference(scores: PairScores, statistic: str) -> Tensor:
    """rejected − chosen at the positions that both sides have, (B, min(T)); anything where one has no token."""
    rejected, chosen = _of(scores.rejected, statistic), _of(scores.chosen, statistic)
    length = min(rejected.shape[1], chosen.shape[1])
    return rejected[:, :length] - chosen[:, :length]


def _num_clipped(z: Tensor) -> Tensor:
    return (z.detach().abs() > MAX_LOG_RATIO).sum()


@dataclass(frozen=True)
class TbpoA(_RatioMatching):
    """TBPO-A: the mean over aligned t of L_h(log R_t), log R_t = β (A_t^l − A_t^w).

    The gradient flows through the exact K_t inside A_t = r_t + K_t. With sba, λ = 0, it never saturates, and the loss
    is unbounded below: negative values are normal.

    Source: arXiv 2605.12288, section 3.2. The exact KL is that of the released code; the K3 estimate of the paper's
    text, evaluated on the data's own token, would cancel the log-ratio.
    """

    needs = frozenset({"advantage"})
    span = "aligned"

    def __call__(self, scores: PairScores) -> LossOutput:
        return self._match_tokens(scores, self.beta * _aligned_difference(scores, "advantage"))


@dataclass(frozen=True)
class TbpoQ(_RatioMatching):
    """TBPO-Q: the mean over aligned t of L_h(log R_t), log R_t = β (r_t^l − r_t^w + log w_t), with a learned
    log w_t = clamp(c_t − mean_t c_t, ±baseline_clip), c_t = b_φ(s_t^l) − b_φ(s_t^w).

    The baseline b_φ is fitted by this same loss. Without the centring, it would lower the loss by sending log w to −∞.

    Source: arXiv 2605.12288, section 3.1.
    """

    baseline_clip: float = 10.0
    needs = frozenset({"log_ratio", "state_baseline"})
    span = "aligned"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.baseline_clip > 0, f"baseline_clip must be positive, got {self.baseline_clip}"
        )

    def __call__(self, scores: PairScores) -> LossOutput:
        c = _aligned_difference(scores, "state_baseline")
        centred = c - mean_over_response(c, scores.aligned_mask)[:, None]
        log_w = centred.clamp(-self.baseline_clip, self.baseline_clip)
        return self._match_tokens(
            scores, self.beta * (_aligned_difference(scores, "log_ratio") + log_w)
        )


@dataclass(frozen=True)
class Dpo(_PairLoss):
    """DPO: softplus(z), z = β (Σr^l − Σr^w); with label smoothing ε, (1−ε) softplus(z) + ε softplus(−z).

    Source: arXiv 2305.18290, equation 7; the smoothing is that of conservative DPO (cDPO).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_smoothing(self.label_smoothing)

    def __call__(self, scores: PairScores) -> LossOutput:
        z = self._z(scores)
        return LossOutput(
            (1 - self.label_smoothing) * F.softplus(z) + self.label_smoothing * F.softplus(-z)
        )


@dataclass(frozen=True)
class Bpo(_RatioMatching):
    """BPO: L_h(z), z = β (Σr^l − Σr^w), for any generator; the defaults are its authors' setting.

    Source: arXiv 2505.19601.
    """

    generator: Generator = field(default_factory=lambda: Sba(lam=0.5))
    min_ratio: float = 0.01

    def __call__(self, scores: PairScores) -> LossOutput:
        z = self._z(scores)
        return LossOutput(self._match(z), num_clipped=_num_clipped(z))


@dataclass(frozen=True)
class Ipo(_PairLoss):
    """IPO: (mean r^w − mean r^l − 1/(2β))². Source: arXiv 2310.12036, equation 17, with length-normalised ratios."""

    def __call__(self, scores: PairScores) -> LossOutput:
        difference = _mean(scores.chosen, "log_ratio") - _mean(scores.rejected, "log_ratio")
        return LossOutput((difference - 1 / (2 * self.beta)) ** 2)


@dataclass(frozen=True)
class Hinge(_PairLoss):
    """SLiC's hinge on DPO's margin: max(0, 1 + z), z = β (Σr^l − Σr^w). Source: arXiv 2309.06657, section 3."""

    def __call__(self, scores: PairScores) -> LossOutput:
        return LossOutput(F.relu(1 + self._z(scores)))


@dataclass(frozen=True)
class Tdpo(_PairLoss):
    """TDPO, version 1: softplus(−β (Σr^w − Σr^l − (ΣK^l − ΣK^w))) = softplus(−β (ΣA^w − ΣA^l));
    version 2: softplus(−β (Σr^w − Σr^l − α (ΣK^l − stopgrad(ΣK^w)))).

    Source: arXiv 2404.11999, equations 16 and 17.
    """

    version: Literal[1, 2] = 2
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.version in (1, 2), f"version must be 1 or 2, got {self.version}")
        _require(math.isfinite(self.alpha), f"alpha must be a finite number, got {self.alpha}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # nobody assigns it
        """Version 1 is a difference of advantages; version 2 weighs the KL by itself."""
        return frozenset({"advantage"} if self.version == 1 else {"log_ratio", "kl"})

    def __call__(self, scores: PairScores) -> LossOutput:
        if self.version == 1:
            margin = _sum(scores.chosen, "advantage") - _sum(scores.rejected, "advantage")
            return LossOutput(F.softplus(-self.beta * margin))
        kl_difference = _sum(scores.rejected, "kl") - _sum(scores.chosen, "kl").detach()
        return LossOutput(F.softplus(self._z(scores) + self.beta * self.alpha * kl_difference))


@dataclass(frozen=True)
class TisDpo(_PairLoss):
    """TIS-DPO: softplus(−β (Σω^w r^w − Σω^l r^l)), ω = `importance_weights` of two helper policies.

    `positive` and `negative` name the helpers, as run directories or adapters: π⁺ trained by DPO, π⁻ trained by DPO on
    the reversed pairs (`[align] reverse = true`). The formula reads only the weights.

    Source: arXiv 2410.04350, equation 12.
    """

    positive: str = ""
    negative: str = ""
    needs = frozenset({"log_ratio", "weights"})

    def __call__(self, scores: PairScores) -> LossOutput:
        chosen, rejected = (
            sum_over_response(_of(side, "weights") * _of(side, "log_ratio"), side.mask)
            for side in (scores.chosen, scores.rejected)
        )
        return LossOutput(F.softplus(self.beta * (rejected - chosen)))


def importance_weights(token_scores: Tensor, mask: Tensor) -> Tensor:
    """TIS-DPO's ω, (B, T), detached: the tokens' ranks within their response, mapped linearly to [0.7, 1.3].

    The last token of a response, its end of turn, weighs 0 and is not ranked. A response of one token weighs 1, and so
    does a single token before the end. `token_scores`, (B, T): log π⁺ − log π⁻ if chosen, its negative if rejected.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    ranked = mask & (torch.arange(mask.shape[1], device=mask.device) < lengths - 1)
    order = token_scores.detach().masked_fill(~ranked, math.inf).argsort(dim=1, stable=True)
    ranks = order.argsort(dim=1, stable=True).to(
        token_scores.dtype
    )  # 0 … number of ranked tokens − 1
    last = ranked.sum(dim=1, keepdim=True) - 1
    weights = torch.where(last > 0, 0.7 + 0.6 * ranks / last.clamp(min=1), torch.ones_like(ranks))
    return torch.where(ranked | (mask & (lengths == 1)), weights, torch.zeros_like(weights))


@dataclass(frozen=True)
class SimPo(_PairLoss):
    """SimPO: softplus(−(β (mean log π_θ(y^w) − mean log π_θ(y^l)) − γ)). Source: arXiv 2405.14734, equation 6."""

    beta: float = 2.0
    gamma: float = 1.6
    needs = frozenset({"logps"})

    def __call__(self, scores: PairScores) -> LossOutput:
        margin = self.beta * (_mean(scores.chosen, "logps") - _mean(scores.rejected, "logps"))
        return LossOutput(F.softplus(self.gamma - margin))


@dataclass(frozen=True)
class Orpo(Loss):
    """ORPO: −mean log π_θ(y^w) + λ softplus(−log-odds-ratio) of the length-normalised probabilities.

    Source: arXiv 2403.07691, equations 6 and 7.
    """

    lam: float = 0.1
    needs = frozenset({"logps"})

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.lam) and self.lam >= 0, f"lam must not be negative, got {self.lam}"
        )

    def __call__(self, scores: PairScores) -> LossOutput:
        chosen, rejected = _mean(scores.chosen, "logps"), _mean(scores.rejected, "logps")
        log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
        return LossOutput(-chosen + self.lam * F.softplus(-log_odds_ratio))


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 − p)) for p = exp(mean_logps), kept finite where p rounds to 1."""
    mean_logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return mean_logps - (-torch.expm1(mean_logps)).log()


@dataclass(frozen=True)
class Sft(Loss):
    """Supervised fine-tuning: −mean over the chosen response's tokens of log π_θ; a step is the mean over tokens."""

    needs = frozenset({"logps"})
    span = "chosen"
    mean_over = "chosen_tokens"

    def __call__(self, scores: PairScores) -> LossOutput:
        return LossOutput(-_mean(scores.chosen, "logps"))


LOSSES: dict[str, type[Loss]] = {
    "sft": Sft,
    "dpo": Dpo,
    "ipo": Ipo,
    "hinge": Hinge,
    "simpo": SimPo,
    "orpo": Orpo,
    "bpo": Bpo,
    "tdpo": Tdpo,
    "tis_dpo": TisDpo,
    "tbpo_q": TbpoQ,
    "tbpo_a": TbpoA,
}


def build_loss(name: str, **fields: Any) -> Loss:
    """The loss of that name. Raises KeyError, TypeError or ValueError for an unknown name, field or bad value."""
    return LOSSES[name](**fields)
