"""What every loss is made of.

A loss's fields are the keys of `[align.loss]`, `needs` names the statistics of `SideScores` that
the scorer must compute (it computes no others), `span` says which response tokens are read, and
`__call__` is the mathematics. In a preference loss the mathematics is `compare`, and `needs` and
`span` follow from what `compare` reads.

In every loss, w is the chosen and l the rejected side, Σ the sum over all tokens of a response,
mean the mean over them, and z the log of the ratio "rejected over chosen": a small z means that the
policy prefers the chosen response.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

from torch import Tensor

from tbpo_cli.core.generators import MAX_LOG_RATIO, Generator, Sba
from tbpo_cli.core.types import (
    LossOutput,
    PairScores,
    SideScores,
    mean_over_response,
    sum_over_response,
)

Span = Literal["aligned", "aligned_and_chosen", "response", "chosen"]


@dataclass(frozen=True)
class Loss:
    """Maps the token statistics of a batch of pairs to one number a pair.

    Class attributes:
        needs: names of the statistics that are read, fields of `SideScores`.
        span: the response tokens that are read. "response": all of them; "aligned": of both sides
            the first T = min(|y^w|, |y^l|); "aligned_and_chosen": likewise, and all chosen ones;
            "chosen": those of the chosen side alone.
        mean_over: what a step's loss is a mean over: its pairs, or its chosen tokens (each pair
            then weighs by its number of them).
        helpers: the fields that name policies beside the reference, which the loss reads.
        when: a sentence for the reader of `tbpo losses`: when to take this loss.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_ratio"})
    span: ClassVar[Span] = "response"
    mean_over: ClassVar[Literal["pairs", "chosen_tokens"]] = "pairs"
    helpers: ClassVar[tuple[str, ...]] = ()
    when: ClassVar[str] = ""

    def __call__(self, scores: PairScores) -> LossOutput:
        """The loss of each pair, from the statistics in `needs`."""
        raise NotImplementedError


@dataclass(frozen=True)
class PreferenceLoss(Loss):
    """A loss that compares the two responses of a pair.

    `sft_weight` adds that many times −mean log π_θ(y^w), over the whole chosen response: it holds
    up the chosen response's likelihood, which preference losses let fall. The policy's logits for
    it, and a chosen tail that `compare` does not read, are computed only if it is not 0.

    Source of `sft_weight`: arXiv 2404.19733 (RPO).

    Class attributes:
        reads: the statistics that `compare` reads.
        compares: "responses" as wholes, or "tokens", at the positions that both responses have.
    """

    sft_weight: float = field(default=0.0, kw_only=True)
    reads: ClassVar[frozenset[str]] = frozenset({"log_ratio"})
    compares: ClassVar[Literal["responses", "tokens"]] = "responses"

    def __post_init__(self) -> None:
        require_not_negative("sft_weight", self.sft_weight)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # nobody assigns it
        """What `compare` reads, and log π_θ if the chosen response is learned besides."""
        return self.reads | {"logps"} if self.sft_weight else self.reads

    @property
    def span(self) -> Span:  # type: ignore[override]  # nobody assigns it
        """What `compare` reads, and the chosen tail if the chosen response is learned besides."""
        if self.compares == "responses":
            return "response"
        return "aligned_and_chosen" if self.sft_weight else "aligned"

    def __call__(self, scores: PairScores) -> LossOutput:
        output = self.compare(scores)
        if not self.sft_weight:
            return output
        log_likelihood = mean_of(scores.chosen, "logps")
        return replace(output, per_pair=output.per_pair - self.sft_weight * log_likelihood)

    def compare(self, scores: PairScores) -> LossOutput:
        """The loss of each pair without the term of `sft_weight`, from what is in `reads`."""
        raise NotImplementedError


@dataclass(frozen=True)
class BetaLoss(PreferenceLoss):
    """A loss with an inverse temperature β."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        is_possible = math.isfinite(self.beta) and self.beta > 0
        require(is_possible, f"beta must be a finite number above 0, got {self.beta}")

    def z(self, scores: PairScores) -> Tensor:
        """z = β (Σr^l − Σr^w), (B,)."""
        return self.beta * (
            sum_of(scores.rejected, "log_ratio") - sum_of(scores.chosen, "log_ratio")
        )


@dataclass(frozen=True)
class RatioMatching(BetaLoss):
    """Losses that fit z = log R under a Bregman generator.

    `label_smoothing` ε is the assumed share of flipped labels; `min_ratio` clips R from below, with
    zero gradient under the floor (0: no floor), which bounds losses whose generator does not
    saturate.
    """

    generator: Generator = field(default_factory=Sba)
    label_smoothing: float = 0.0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing)
        require(0 <= self.min_ratio < 1, f"min_ratio must be in [0, 1), got {self.min_ratio}")

    def match(self, z: Tensor) -> Tensor:
        """(1−ε) L_h(z) + ε L_h(−z), elementwise."""
        floor = math.log(self.min_ratio) if self.min_ratio else -math.inf
        loss = self.generator.loss(z.clamp(min=floor))
        if self.label_smoothing:
            flipped = self.generator.loss((-z).clamp(min=floor))
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * flipped
        return loss


def require_not_negative(name: str, value: float) -> None:
    """Raises ValueError unless the value of that name is a finite number ≥ 0."""
    is_possible = math.isfinite(value) and value >= 0
    require(is_possible, f"{name} must be a finite number of at least 0, got {value}")


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message, unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_smoothing(label_smoothing: float) -> None:
    """Raises ValueError if at least half of the labels would be flipped."""
    require(
        0 <= label_smoothing < 0.5, f"label_smoothing must be in [0, 0.5), got {label_smoothing}"
    )


def statistic_of(side: SideScores, name: str) -> Tensor:
    """A statistic in the loss's `needs`, which the scorer has computed."""
    return cast(Tensor, getattr(side, name))


def sum_of(side: SideScores, name: str) -> Tensor:
    """The sum of a statistic over all tokens of the response, (B,)."""
    return sum_over_response(statistic_of(side, name), side.mask)


def mean_of(side: SideScores, name: str) -> Tensor:
    """The mean of a statistic over all tokens of the response, (B,)."""
    return mean_over_response(statistic_of(side, name), side.mask)


def num_clipped(z: Tensor) -> Tensor:
    """How many values of z = log R lie outside the generator's clip."""
    return (z.detach().abs() > MAX_LOG_RATIO).sum()
