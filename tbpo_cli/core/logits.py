"""An output head: what it makes of hidden states, and the way back of a gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tbpo_cli.core.memory import is_out_of_memory


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap(scale · (W h + bias)), cap(x) = softcap · tanh(x / softcap).

    Args:
        weight: (V, H), in any float type; products run in it and are accumulated in fp32.
        bias: (V,) or None.
        scale: constant factor of the logits.
        softcap: Gemma-2's cap of the logits; None for a linear head.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def frozen(self) -> bool:
        """Whether no gradient goes to the head itself."""
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)

    @property
    def is_linear(self) -> bool:
        """Whether the logits are a linear function of h."""
        return self.softcap is None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) → (n, V), at least fp32."""
        logits = _product(hidden.to(self.weight.dtype), self.weight.detach().T)
        if self.bias is not None:
            logits += self.bias.detach()
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def part(self, vocabulary: slice) -> Head:
        """The head of some of the tokens."""
        bias = None if self.bias is None else self.bias[vocabulary]
        return replace(self, weight=self.weight[vocabulary], bias=bias)

    def linear_part(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """∂/∂logits → ∂/∂(W h + bias), both (n, V); `grad` is overwritten.

        Only a softcap reads the logits.
        """
        if self.softcap is not None:
            assert logits is not None
            grad *= 1 - (logits / self.softcap) ** 2
        if self.scale != 1.0:
            grad *= self.scale
        return grad

    def to_hidden(self, linear_grad: Tensor) -> Tensor:
        """∂/∂(W h + bias), (n, V) → ∂/∂h, (n, H), at least fp32."""
        return _product(linear_grad.to(self.weight.dtype), self.weight.detach())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product, at least fp32: not rounded to half precision where the device can."""
    is_half = a.dtype in (torch.bfloat16, torch.float16)
    if is_half and _has_wide_products(a.device.type, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return at_least_fp32(a @ b)


@functools.cache
def _has_wide_products(device: str, dtype: torch.dtype) -> bool:
    """Whether products of half precision can be written in fp32 there: GPUs can, CPUs cannot."""
    try:
        small = torch.zeros(8, 8, device=device, dtype=dtype)
        return torch.mm(small, small, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return False


def at_least_fp32(values: Tensor) -> Tensor:
    """The values in fp32, or as they are if they are float64."""
    return values if values.dtype == torch.float64 else values.float()
