"""Token-level losses: position t of the chosen response against position t of the rejected one.

Each position stands on its own prefix; the tail of the longer response takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tbpo_cli.core.losses.base import RatioMatching, num_clipped, require, statistic_of
from tbpo_cli.core.types import LossOutput, PairScores, mean_over_response


@dataclass(frozen=True)
class TbpoA(RatioMatching):
    """TBPO-A: the mean over aligned t of L_h(log R_t), log R_t = β (A_t^l − A_t^w).

    The gradient flows through the exact K_t inside A_t = r_t + K_t. With sba, λ = 0, it never
    saturates, and the loss is unbounded below: negative values are normal.

    Source: arXiv 2605.12288, section 3.2. The exact KL is that of the released code; the K3
    estimate of the paper's text, evaluated on the data's own token, would cancel the log-ratio.
    """

    reads = frozenset({"advantage"})
    compares = "tokens"
    when = (
        "The default, and the method of this project: responses are compared token by token, and a "
        "step with LoRA costs less than dpo's."
    )

    def compare(self, scores: PairScores) -> LossOutput:
        """`reads` → one number a pair, by the formula of the class."""
        z = self.beta * _aligned_difference(scores, "advantage")
        return _match_tokens(self, scores, z)


@dataclass(frozen=True)
class TbpoQ(RatioMatching):
    """TBPO-Q: the mean over aligned t of L_h(log R_t), log R_t = β (r_t^l − r_t^w + log w_t), with
    a learned log w_t = clamp(c_t − mean_t c_t, ±baseline_clip), c_t = b_φ(s_t^l) − b_φ(s_t^w).

    The baseline b_φ is fitted by this same loss. Without the centring, it would lower the loss by
    sending log w to −∞.

    Source: arXiv 2605.12288, section 3.1.
    """

    baseline_clip: float = 10.0
    reads = frozenset({"log_ratio", "state_baseline"})
    compares = "tokens"
    when = "As tbpo_a, where a learned baseline is wanted in place of the exact KL."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.baseline_clip > 0, f"baseline_clip must be above 0, got {self.baseline_clip}")

    def compare(self, scores: PairScores) -> LossOutput:
        c = _aligned_difference(scores, "state_baseline")
        centred = c - mean_over_response(c, scores.aligned_mask)[:, None]
        log_w = centred.clamp(-self.baseline_clip, self.baseline_clip)
        z = self.beta * (_aligned_difference(scores, "log_ratio") + log_w)
        return _match_tokens(self, scores, z)


def _aligned_difference(scores: PairScores, statistic: str) -> Tensor:
    """rejected − chosen at the positions that both sides have, (B, min(T)).

    Where one of the two has no token, the entry may hold anything.
    """
    rejected = statistic_of(scores.rejected, statistic)
    chosen = statistic_of(scores.chosen, statistic)
    length = min(rejected.shape[1], chosen.shape[1])
    return rejected[:, :length] - chosen[:, :length]


def _match_tokens(loss: RatioMatching, scores: PairScores, z: Tensor) -> LossOutput:
    """(1/T) Σ_{t<T} L_h(log R_t), from z = log R_t, (B, T)."""
    mask = scores.aligned_mask
    z = z.masked_fill(~mask, 0.0)
    per_pair = mean_over_response(loss.match(z), mask)
    return LossOutput(per_pair, z.detach(), num_clipped(z))
