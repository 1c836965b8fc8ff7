"""Whole responses with a weight ω_t for every token: DPO is the one whose weights are all 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tbpo_cli.core.losses.base import BetaLoss, require, require_not_negative, statistic_of
from tbpo_cli.core.types import (
    LossOutput,
    PairScores,
    SideScores,
    mean_over_response,
    sum_over_response,
)


@dataclass(frozen=True)
class TokenWeighted(BetaLoss):
    """softplus(−β (Σω^w r^w − Σω^l r^l)); a loss of this family is its `token_weights`."""

    def token_weights(self, scores: PairScores) -> tuple[Tensor, Tensor]:
        """ω of the chosen and of the rejected tokens, (B, T) each, without a gradient."""
        raise NotImplementedError

    def compare(self, scores: PairScores) -> LossOutput:
        """`reads` → one number a pair, by the formula of the class."""
        return LossOutput(F.softplus(-self.beta * self.margin(scores, "log_ratio")))

    def margin(self, scores: PairScores, statistic: str) -> Tensor:
        """Σω^w x^w − Σω^l x^l of a statistic x, (B,)."""
        chosen, rejected = self.token_weights(scores)
        weighted_chosen = chosen * statistic_of(scores.chosen, statistic)
        weighted_rejected = rejected * statistic_of(scores.rejected, statistic)
        return sum_over_response(weighted_chosen, scores.chosen.mask) - sum_over_response(
            weighted_rejected, scores.rejected.mask
        )


@dataclass(frozen=True)
class TisDpo(TokenWeighted):
    """TIS-DPO: softplus(−β (Σω^w r^w − Σω^l r^l)), ω = `importance_weights` of two helper policies.

    `positive` and `negative` name the helpers, as run directories or adapters: π⁺ trained by DPO,
    π⁻ trained by DPO on the reversed pairs (`[align] reverse = true`). The formula reads only the
    weights.

    Source: arXiv 2410.04350, equation 12.
    """

    positive: str = ""
    negative: str = ""
    reads = frozenset({"log_ratio", "weights"})
    helpers = ("positive", "negative")
    when = "Three trainings are affordable, and the tokens that decide shall count for more."

    def token_weights(self, scores: PairScores) -> tuple[Tensor, Tensor]:
        return statistic_of(scores.chosen, "weights"), statistic_of(scores.rejected, "weights")


@dataclass(frozen=True)
class TgDpo(TokenWeighted):
    """TGDPO: softplus(−β (Σω^w r^w − Σω^l r^l)), ω^w = 1 + αβρ^w, ω^l = 1 − αβρ^l.

    ρ = log π_g − log π_ref of the token, in `weights`, and βρ is the reward that DPO has given it
    in the helper π_g. `guide` names the helper, as a run directory or adapter: a policy that DPO
    (or another loss) has trained from the same reference. The helper's β is taken to be that of
    this loss, as in the released code.

    Source: arXiv 2506.14574, with the guidance f(u) = 1 + αu of its released code, whose α for
    Llama-3-8B is the default.
    """

    alpha: float = 0.5
    guide: str = ""
    reads = frozenset({"log_ratio", "weights"})
    helpers = ("guide",)
    when = "Two trainings are affordable: the first one's rewards say which tokens count for more."

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative("alpha", self.alpha)

    def token_weights(self, scores: PairScores) -> tuple[Tensor, Tensor]:
        strength = self.alpha * self.beta
        chosen, rejected = (
            statistic_of(side, "weights").detach() for side in (scores.chosen, scores.rejected)
        )
        return 1 + strength * chosen, 1 - strength * rejected


@dataclass(frozen=True)
class LdDpo(TokenWeighted):
    """LD-DPO: DPO, in which the tokens past T = min(|y^w|, |y^l|) weigh α.

    Source: arXiv 2409.06411.
    """

    alpha: float = 0.5
    when = "As dpo, where longer answers shall not win by their length."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")

    def token_weights(self, scores: PairScores) -> tuple[Tensor, Tensor]:
        sides = (scores.chosen, scores.rejected)
        num_chosen, num_rejected = (side.mask.sum(dim=1, keepdim=True) for side in sides)
        num_aligned = torch.minimum(num_chosen, num_rejected)
        return self._weights(scores.chosen, num_aligned), self._weights(
            scores.rejected, num_aligned
        )

    def _weights(self, side: SideScores, num_aligned: Tensor) -> Tensor:
        """1 for the first tokens, (B, 1) of them, and α for the rest, (B, T)."""
        log_ratio = statistic_of(side, "log_ratio")
        weights = torch.full_like(log_ratio, self.alpha, requires_grad=False)
        return weights.masked_fill(_positions(side) < num_aligned, 1.0)


@dataclass(frozen=True)
class D2po(TokenWeighted):
    """D²PO: DPO, in which token t, from 0, weighs γ^t.

    Source: arXiv 2502.14340.
    """

    gamma: float = 0.98
    when = "As dpo, where what is decided early in an answer shall count for more."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.gamma <= 1, f"gamma must be in (0, 1], got {self.gamma}")

    def token_weights(self, scores: PairScores) -> tuple[Tensor, Tensor]:
        return self._weights(scores.chosen), self._weights(scores.rejected)

    def _weights(self, side: SideScores) -> Tensor:
        """γ^t, (1, T)."""
        dtype = statistic_of(side, "log_ratio").dtype
        return torch.pow(self.gamma, _positions(side).to(dtype))[None]


@dataclass(frozen=True)
class ConfPo(TokenWeighted):
    """ConfPO: SimPO over the tokens that the policy is unsure of.

    A token counts if its π_θ(y_t) is below the mean of π_θ(y_t) over its response. Each response's
    log π_θ is the mean over its tokens that count; if none does, the pair's loss is 0.

    Source: arXiv 2506.08712, as its released code has it; the defaults are that code's for Mistral.
    """

    beta: float = 1.5
    gamma: float = 1.6
    reads = frozenset({"logps"})
    when = "As simpo, reading only the tokens that the policy is unsure of."

    def token_weights(self, scores: PairScores) -> tuple[Tensor, Tensor]:
        return _share_of_unsure(scores.chosen), _share_of_unsure(scores.rejected)

    def compare(self, scores: PairScores) -> LossOutput:
        chosen, rejected = self.token_weights(scores)
        counts = chosen.any(dim=1) & rejected.any(dim=1)
        margin = self.margin(scores, "logps")
        loss = F.softplus(self.gamma - self.beta * margin)
        return LossOutput(torch.where(counts, loss, 0.0))


def _share_of_unsure(side: SideScores) -> Tensor:
    """1 / their number for tokens whose probability is below the response's mean, 0 for others."""
    probs = statistic_of(side, "logps").detach().exp()
    is_unsure = (probs < mean_over_response(probs, side.mask)[:, None]) & side.mask
    return is_unsure.to(probs.dtype) / is_unsure.sum(dim=1, keepdim=True).clamp(min=1)


def _positions(side: SideScores) -> Tensor:
    """The column numbers 0 to T − 1, (T,)."""
    return torch.arange(side.mask.shape[1], device=side.mask.device)


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
