"""Bregman generators: a convex h gives a loss L_h, minimal where the model's ratio is the data's.

Source: arXiv 2605.12288, section 3.3, and arXiv 2505.19601 (BPO) for `sba`. For R = exp(z), up to a
constant,

    L_h(z) = h'(R) R − h(R) − h'(1/R)

`lsif` follows this definition: the form R² − 2R that is printed in the literature does not come
from its h and does not recover the optimal policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

MAX_LOG_RATIO = 30.0  # exp(30) = 1e13: R² and its gradient are still finite in fp32


@runtime_checkable
class Generator(Protocol):
    """A convex function h on ratios R > 0 and the loss it induces."""

    def h(self, ratio: Tensor) -> Tensor:
        """h(R), elementwise, for R > 0."""

    def loss(self, log_ratio: Tensor) -> Tensor:
        """L_h(z), elementwise, at z = log R in nats, clipped to ±30 (zero gradient outside)."""


def _check_lam(lam: float) -> None:
    if not (math.isfinite(lam) and lam > -1):
        raise ValueError(f"lam must be above -1, where h is convex; got {lam}")


@dataclass(frozen=True)
class Logistic:
    """L_h(z) = softplus(z): DPO's loss.

    Its gradient vanishes as R → 0: a pair that is learned stops pulling.
    """

    def h(self, ratio: Tensor) -> Tensor:
        return (ratio * ratio.log() - (1 + ratio) * (1 + ratio).log()) / 2

    def loss(self, log_ratio: Tensor) -> Tensor:
        return F.softplus(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


@dataclass(frozen=True)
class Kliep:
    """L_h(z) = R + z.

    The gradient tends to 1 as R → 0: it never saturates, and the loss is unbounded below.
    """

    def h(self, ratio: Tensor) -> Tensor:
        return ratio * ratio.log() - ratio

    def loss(self, log_ratio: Tensor) -> Tensor:
        z = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return z.exp() + z


@dataclass(frozen=True)
class Lsif:
    """L_h(z) = R² − 2/R. The gradient diverges as R → 0."""

    def h(self, ratio: Tensor) -> Tensor:
        return (ratio - 1) ** 2

    def loss(self, log_ratio: Tensor) -> Tensor:
        z = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (2 * z).exp() - 2 * (-z).exp()


@dataclass(frozen=True)
class Ba:
    """Basu's power divergence, L_h(z) = R^{1+λ} − ((1+λ)/λ) R^{−λ}; λ = 0 is kliep.

    Requires λ > −1. The gradient saturates as `Sba` describes.
    """

    lam: float = 0.5

    def __post_init__(self) -> None:
        _check_lam(self.lam)

    def h(self, ratio: Tensor) -> Tensor:
        if self.lam == 0:
            return Kliep().h(ratio)
        return (ratio ** (1 + self.lam) - ratio) / self.lam

    def loss(self, log_ratio: Tensor) -> Tensor:
        if self.lam == 0:
            return Kliep().loss(log_ratio)
        z = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return ((1 + self.lam) * z).exp() - (1 + self.lam) / self.lam * (-self.lam * z).exp()


@dataclass(frozen=True)
class Sba:
    """Scaled Basu, L_h(z) = R^{1+λ}/(s(1+λ)) − R^{−λ}/(sλ); λ = 0: (R + z)/s.

    Requires λ > −1 and s > 0. dL/dz = (R^{1+λ} + R^{−λ})/s. At R = 1 it is 2/s, so s = 4 has DPO's
    gradient there. As R → 0 it tends to 1/s for λ = 0 (the paper's setting: it never saturates, and
    a negative loss is normal), diverges for λ > 0, and vanishes for −1 < λ < 0.
    """

    lam: float = 0.0
    scale: float = 4.0

    def __post_init__(self) -> None:
        _check_lam(self.lam)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a finite number above 0, got {self.scale}")

    def h(self, ratio: Tensor) -> Tensor:
        return Ba(self.lam).h(ratio) / (self.scale * (1 + self.lam))

    def loss(self, log_ratio: Tensor) -> Tensor:
        return Ba(self.lam).loss(log_ratio) / (self.scale * (1 + self.lam))


GENERATORS: dict[str, type[Generator]] = {
    "logistic": Logistic,
    "kliep": Kliep,
    "lsif": Lsif,
    "ba": Ba,
    "sba": Sba,
}


def build_generator(name: str, **fields: float) -> Generator:
    """The generator of that name.

    Raises KeyError, TypeError or ValueError for an unknown name, an unknown field or a bad value.
    """
    return GENERATORS[name](**fields)
