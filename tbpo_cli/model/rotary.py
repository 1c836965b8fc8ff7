"""Rotary positions of queries and keys in half as many passes over memory as transformers' own."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Rotates = Callable[..., tuple[Tensor, Tensor]]
NAME = "apply_rotary_pos_emb"  # what transformers' attentions call
ARGUMENTS = ["q", "k", "cos", "sin", "unsqueeze_dim"]


def fuse_rotary(model: nn.Module) -> None:
    """Lets attentions rotate queries and keys by `_rotate`; those with another rotation stay.

    An attention keeps the forward pass of its class, in which NAME stands for another function.
    """
    kinds = {type(module) for module in model.modules()}
    forwards = {kind: forward for kind in kinds if (forward := _fused_forward(kind)) is not None}
    for module in model.modules():
        if type(module) in forwards and "forward" not in vars(module):
            module.forward = functools.partial(forwards[type(module)], module)  # of this one only


def _fused_forward(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward pass of a class with the fused rotation; None if it has no plain rotation."""
    forward: Any = inspect.unwrap(kind.forward)  # without what renames old arguments
    if NAME not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    own = forward.__globals__.get(NAME)
    if own is None or not _is_plain_rotation(own):
        return None
    names = {**forward.__globals__, NAME: functools.partial(_rotate, own)}
    fused = types.FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


@functools.cache
def _is_plain_rotation(rotates: Rotates) -> bool:
    """Whether a function computes what `_rotate` does, and in the types that it is given."""
    generator = torch.Generator().manual_seed(0)
    try:
        if [*inspect.signature(rotates).parameters] != ARGUMENTS:
            return False
        with torch.device("cpu"):
            numbers = [
                torch.randn(shape, generator=generator)
                for shape in [(1, 3, 5, 8), (1, 2, 5, 8), (1, 5, 8), (1, 5, 8)]
            ]
            query, key, cos, sin = (each.bfloat16() for each in numbers)
            # Of wider positions, some functions bring the result back to the narrower type.
            return all(
                torch.equal(found, plain)
                for cos, sin in [(cos, sin), numbers[2:]]
                for found, states in zip(rotates(query, key, cos, sin), (query, key), strict=True)
                for plain in [
                    states * cos + torch.cat((-states[..., 4:], states[..., :4]), -1) * sin
                ]
            )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _rotate(
    own: Rotates, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned by their positions; the arguments of transformers' function.

    Args:
        own: transformers' function, for what is left to it: positions that have gradients, or other
            sizes than the queries.
        q, k: (batch, heads, L, size).
        cos, sin: (batch or 1, L, size).
        unsqueeze_dim: where cos and sin have no dimension of heads.
    """
    if cos.requires_grad or not cos.shape[-1] == q.shape[-1] == k.shape[-1]:
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)  # type: ignore[no-untyped-call]  # torch gives it no types


class _Rotation(torch.autograd.Function):
    """y = x · cos + (−x₂, x₁) · sin for the halves x₁ and x₂ of each vector; cos, sin are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _turned(x, cos, first, second, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _turned(grad, cos, second, first, 1), None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """(x₁ cos₁ + sign x₂ first, x₂ cos₂ − sign x₁ second), without a copy of the halves."""
    turned = x * cos
    halves = turned.chunk(2, dim=-1)
    x1, x2 = x.chunk(2, dim=-1)
    halves[0].addcmul_(x2, first, value=sign)
    halves[1].addcmul_(x1, second, value=-sign)
    return turned
