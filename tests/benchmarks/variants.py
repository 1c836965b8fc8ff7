"""Variants of TBPO-A that stand between it and TDPO 2, as a loss of its own for the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tbpo_cli.core.losses import LOSSES
from tbpo_cli.core.losses.base import RatioMatching, num_clipped, sum_of
from tbpo_cli.core.types import LossOutput, PairScores, mean_over_response


@dataclass(frozen=True)
class TbpoVariant(RatioMatching):
    """TBPO-A with each part of TDPO 2 as a switch; the defaults are TBPO-A itself.

    z = β (r^l − r^w + α (K^l − K^w)), at each aligned position; the loss of a pair is the mean over
    them of L_h(z). These parts of TDPO 2 (arXiv 2404.11999, equation 17) can be put in:

    Args:
        alpha: the weight of the KL difference, which is 1 in TBPO-A and 0.5 in TDPO 2.
        stop_chosen: K^w gets no gradient.
        whole: z is of the sums over whole responses, and L_h is applied to that one number.
    """

    alpha: float = 1.0
    stop_chosen: bool = False
    whole: bool = False
    reads = frozenset({"log_ratio", "kl"})

    @property
    def compares(self) -> str:  # type: ignore[override]
        return "responses" if self.whole else "tokens"

    def compare(self, scores: PairScores) -> LossOutput:
        if self.whole:
            ratio, chosen_kl, rejected_kl = self._of_responses(scores)
        else:
            ratio, chosen_kl, rejected_kl = self._of_tokens(scores)
        if self.stop_chosen:
            chosen_kl = chosen_kl.detach()
        z = self.beta * (ratio + self.alpha * (rejected_kl - chosen_kl))
        if self.whole:
            return LossOutput(self.match(z), num_clipped=num_clipped(z))
        mask = scores.aligned_mask
        z = z.masked_fill(~mask, 0.0)
        return LossOutput(mean_over_response(self.match(z), mask), z.detach(), num_clipped(z))

    @staticmethod
    def _of_responses(scores: PairScores) -> tuple[Tensor, Tensor, Tensor]:
        """Σr^l − Σr^w, ΣK^w and ΣK^l, (B,) each."""
        ratio = sum_of(scores.rejected, "log_ratio") - sum_of(scores.chosen, "log_ratio")
        return ratio, sum_of(scores.chosen, "kl"), sum_of(scores.rejected, "kl")

    @staticmethod
    def _of_tokens(scores: PairScores) -> tuple[Tensor, Tensor, Tensor]:
        """r^l − r^w, K^w and K^l at the positions that both responses have, (B, T) each."""
        length = scores.aligned_mask.shape[1]
        chosen, rejected = scores.chosen, scores.rejected
        ratio = rejected.log_ratio[:, :length] - chosen.log_ratio[:, :length]
        return ratio, chosen.kl[:, :length], rejected.kl[:, :length]


NAME = "tbpo_variant"
LOSSES[NAME] = TbpoVariant
