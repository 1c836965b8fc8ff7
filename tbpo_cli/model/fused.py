"""Layers in fewer passes over memory than transformers' and peft's own: RMSNorm, and LoRA, whose
y = x Wᵀ + s (x Aᵀ) Bᵀ is added in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse_norms(model: nn.Module) -> None:
    """Lets plain RMSNorms compute by torch's own, one kernel on a GPU; other norms stay."""
    kinds = {
        type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")
    }
    plain = {kind for kind in kinds if _is_plain_norm(kind)}
    for module in model.modules():
        if type(module) in plain:
            module.forward = functools.partial(_norm, module)  # of this one only


@torch.no_grad()
def _is_plain_norm(kind: Callable[..., Any]) -> bool:
    """Whether norms of that class, made with a size and ε, compute x / √(mean x² + ε) · weight."""
    try:
        with torch.device("cpu"):
            x = torch.linspace(-1, 2, 12).view(2, 6)
            norm = kind(6, eps=0.1).float()
            norm.weight.copy_(torch.linspace(0.5, 2, 6))
            return bool(torch.allclose(_norm(norm, x), norm(x), rtol=1e-5, atol=1e-6))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _norm(module: Any, x: Tensor) -> Tensor:
    weight: Tensor = module.weight
    if weight.dtype != x.dtype:
        own: Tensor = type(module).forward(module, x)
        return own
    # Autocast would compute it in fp32; the kernel adds up in fp32 whatever its inputs are.
    device = "cpu" if x.is_meta else x.device.type
    with torch.autocast(device, enabled=False):
        return F.rms_norm(x, weight.shape, weight, module.variance_epsilon)


def fuse_lora(model: nn.Module) -> None:
    """Lets plain LoRA layers compute by `_LoraLinear`; others stay as they are."""
    for module in model.modules():
        if (
            type(module) is Linear
            and type(module.base_layer) is nn.Linear
            and not module.lora_variant
        ):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]  # of this one only


def _forward(module: Linear, x: Tensor) -> Tensor:
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    if (
        module.disable_adapters
        or module.merged
        or len(adapters) != 1
        or module.lora_bias[adapters[0]]
    ):
        return Linear.forward(module, x)
    name = adapters[0]
    rows = x.flatten(0, -2)
    dropped = module.lora_dropout[name](rows)
    result: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        rows,
        None if dropped is rows else dropped,
        module.base_layer.weight,
        module.base_layer.bias,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.scaling[name],
    )
    unflattened: Tensor = result.unflatten(0, x.shape[:-1])
    return unflattened


class _LoraLinear(torch.autograd.Function):
    """(n, in) rows → (n, out): y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

    W and its bias are frozen; A (r, in) and B (out, r) are cast to the rows' dtype. Forward:

    1. x Aᵀ, (n, r), from the rows after dropout.
    2. The product with W, to which the scaled product with B is added in place.

    Backward, with g (n, out): g B s is the gradient of step 1; those of A, B and x follow from it,
    and x gets g W as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        inner = (x if dropped is None else dropped) @ a.to(x.dtype).T
        ctx.save_for_backward(x if dropped is None else dropped, weight, a, b, inner)
        ctx.scaling = scaling
        ctx.with_dropout = dropped is not None
        return F.linear(x, weight, bias).addmm_(inner, b.to(x.dtype).T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        grad_inner = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)  # (n, r)
        grad_a = (grad_inner.T @ x).to(a.dtype)
        grad_b = (grad.T @ inner).mul_(ctx.scaling).to(b.dtype)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_dropped = None
        if ctx.with_dropout:
            grad_dropped = grad_inner @ a.to(grad.dtype) if ctx.needs_input_grad[1] else None
        elif grad_x is not None:
            grad_x.addmm_(grad_inner, a.to(grad.dtype))
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None
