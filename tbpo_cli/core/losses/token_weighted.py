"""DPO with a weight ω_t for every token: softplus(−β (Σω^w r^w − Σω^l r^l))."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tbpo_cli.core.losses.base import BetaLoss, statistic_of
from tbpo_cli.core.types import LossOutput, PairScores, SideScores, sum_over_response


@dataclass(frozen=True)
class TisDpo(BetaLoss):
    """TIS-DPO: softplus(−β (Σω^w r^w − Σω^l r^l)), ω = `importance_weights` of two helper policies.

    `positive` and `negative` name the helpers, as run directories or adapters: π⁺ trained by DPO,
    π⁻ trained by DPO on the reversed pairs (`[align] reverse = true`). The formula reads only the
    weights.

    Source: arXiv 2410.04350, equation 12.
    """

    positive: str = ""
    negative: str = ""
    needs = frozenset({"log_ratio", "weights"})

    def __call__(self, scores: PairScores) -> LossOutput:
        margin = _weighted_sum(scores.chosen) - _weighted_sum(scores.rejected)
        return LossOutput(F.softplus(-self.beta * margin))


def _weighted_sum(side: SideScores) -> Tensor:
    """Σ ω_t r_t, (B,)."""
    weighted = statistic_of(side, "weights") * statistic_of(side, "log_ratio")
    return sum_over_response(weighted, side.mask)


def importance_weights(token_scores: Tensor, mask: Tensor) -> Tensor:
    """TIS-DPO's ω: the tokens' ranks within their response, mapped linearly to [0.7, 1.3].

    The last token of a response, its end of turn, weighs 0 and is not ranked. A response of one
    token weighs 1, and so does a single token before the end.

    Args:
        token_scores: (B, T), log π⁺ − log π⁻ on the chosen side, its negative on the rejected.
        mask: (B, T) bool, the response tokens.

    Returns:
        (B, T), detached.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    ranked = mask & (torch.arange(mask.shape[1], device=mask.device) < lengths - 1)
    order = token_scores.detach().masked_fill(~ranked, math.inf).argsort(dim=1, stable=True)
    # The ranks run from 0 to the number of ranked tokens − 1.
    ranks = order.argsort(dim=1, stable=True).to(token_scores.dtype)
    last = ranked.sum(dim=1, keepdim=True) - 1
    weights = torch.where(last > 0, 0.7 + 0.6 * ranks / last.clamp(min=1), torch.ones_like(ranks))
    return torch.where(ranked | (mask & (lengths == 1)), weights, torch.zeros_like(weights))
