"""What the scorer hands to a loss, and what a loss hands back.

Shape legend, used by every docstring of the project:

    B  pairs of a batch            T  response tokens of one side (columns are response-relative)
    N  selected response tokens    V  vocabulary
    H  hidden size                 s_t  the state [prompt, response tokens before t]

Column t of every (B, T) tensor belongs to the t-th response token, on both sides: aligning two
responses is a slice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SideScores:
    """Token statistics of one side (chosen or rejected) of a batch of pairs.

    Source: arXiv 2605.12288, section 3, for `log_ratio`, `kl` and `advantage`.

    Args:
        mask: (B, T) bool, True where column t holds a response token. Response tokens are
            left-aligned: a row is some True values followed by False values. All other fields are
            read only where the mask is True.
        logps: (B, T) nats, log π_θ(y_t | s_t).
        log_ratio: (B, T) nats, r_t = log π_θ(y_t | s_t) − log π_ref(y_t | s_t).
        kl: (B, T) nats, K_t = KL(π_ref(·|s_t) ‖ π_θ(·|s_t)), exact over the vocabulary.
        advantage: (B, T) nats, A_t = r_t + K_t.
        state_baseline: (B, T), the learned b_φ(s_t) of TBPO-Q.
        weights: (B, T), what helper policies say of the tokens: the weights ω_t of TIS-DPO, or the
            guidance ρ_t of TGDPO. It carries no gradient.
        reverse_kl: (B, T) nats, KL(π_θ(·|s_t) ‖ π_ref(·|s_t)). A diagnostic: no loss differentiates
            it.
        entropy: (B, T) nats, the policy's entropy at s_t. A diagnostic.
        collision_entropy: (B, T) nats, −log Σ_v π_θ(v|s_t)². It carries no gradient.

    Raises:
        ValueError: if the mask is not a (B, T) bool tensor, or a field has another shape than it.
    """

    mask: Tensor
    logps: Tensor | None = None
    log_ratio: Tensor | None = None
    kl: Tensor | None = None
    advantage: Tensor | None = None
    state_baseline: Tensor | None = None
    weights: Tensor | None = None
    reverse_kl: Tensor | None = None
    entropy: Tensor | None = None
    collision_entropy: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.ndim != 2:
            raise ValueError(
                f"mask must be a (B, T) bool tensor, got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value.shape != self.mask.shape:
                found = f"{field.name} {tuple(value.shape)}"
                raise ValueError(f"{found} differs from the mask {tuple(self.mask.shape)}")


@dataclass(frozen=True)
class PairScores:
    """Both sides of a batch of pairs: B is the same, T may differ.

    Args:
        chosen, rejected: the two sides.
        weights: (B,), what each pair counts for in means over pairs; None: 1. No loss reads them.
    """

    chosen: SideScores
    rejected: SideScores
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.chosen.mask.shape[0] != self.rejected.mask.shape[0]:
            raise ValueError(
                f"{len(self.chosen.mask)} chosen, but {len(self.rejected.mask)} rejected responses"
            )

    @property
    def aligned_mask(self) -> Tensor:
        """(B, min(T_chosen, T_rejected)) bool: positions at which both responses have a token."""
        length = min(self.chosen.mask.shape[1], self.rejected.mask.shape[1])
        return self.chosen.mask[:, :length] & self.rejected.mask[:, :length]


@dataclass(frozen=True)
class LossOutput:
    """What a loss returns.

    Args:
        per_pair: (B,) loss of each pair, differentiable. Only the training step reduces it.
        log_ratio_aligned: (B, T) log R_t, detached and not clipped; 0 outside
            `PairScores.aligned_mask`. None for losses that compare whole responses.
        num_clipped: number of values of log R outside the generator's clip (±30); None without a
            generator.
    """

    per_pair: Tensor
    log_ratio_aligned: Tensor | None = None
    num_clipped: Tensor | None = None


def sum_over_response(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of (B, T) values over the response tokens, (B,).

    Masked entries may hold anything, NaN included.
    """
    return values.masked_fill(~mask, 0.0).sum(dim=1)


def aligned_scores(scores: PairScores) -> PairScores:
    """The scores of the positions at which both responses have a token."""
    mask = scores.aligned_mask

    def cut(side: SideScores) -> SideScores:
        values = {field.name: getattr(side, field.name) for field in fields(side)}
        present = {name: value for name, value in values.items() if value is not None}
        kept = {name: value[:, : mask.shape[1]] for name, value in present.items()}
        return SideScores(**kept | {"mask": mask})

    return PairScores(cut(scores.chosen), cut(scores.rejected), scores.weights)


def sums_over_response(side: SideScores) -> dict[str, Tensor]:
    """Detached sums over the response tokens, (B,), by the name of each statistic that a side has.

    `tokens` is their number.
    """
    statistics = {
        field.name: getattr(side, field.name) for field in fields(side) if field.name != "mask"
    }
    present = {name: values.detach() for name, values in statistics.items() if values is not None}
    sums = {name: sum_over_response(values, side.mask) for name, values in present.items()}
    return sums | {"tokens": side.mask.sum(dim=1)}


def mean_over_response(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T) values over the response tokens, (B,); 0 for a row without tokens."""
    return sum_over_response(values, mask) / mask.sum(dim=1).clamp(min=1)
