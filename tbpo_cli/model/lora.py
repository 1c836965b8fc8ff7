"""LoRA layers in fewer passes over memory than peft's own, y = x Wᵀ + s (x Aᵀ) Bᵀ, added in place; found adapters."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tbpo_cli.errors import TbpoError


def fuse_lora(model: nn.Module) -> None:
    """Lets the plain LoRA layers of a model compute by `_LoraLinear`; all others stay as they are."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and not module.lora_variant:
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]  # of this one only


def _forward(module: Linear, x: Tensor) -> Tensor:
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or len(adapters) != 1 or module.lora_bias[adapters[0]]:
        return Linear.forward(module, x)
    name = adapters[0]
    rows = x.flatten(0, -2)
    dropped = module.lora_dropout[name](rows)
    result: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        rows, None if dropped is rows else dropped, module.base_layer.weight, module.base_layer.bias,
        module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name],
    ).unflatten(0, x.shape[:-1])  # fmt: skip
    return result


class _LoraLinear(torch.autograd.Function):
    """(n, in) rows → (n, out). W and its bias are frozen; A (r, in) and B (out, r) are cast to the rows' type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
        scaling: float,
    ) -> Tensor:  # fmt: skip
        inner = (x if dropped is None else dropped) @ a.to(x.dtype).T
        ctx.save_for_backward(x if dropped is None else dropped, weight, a, b, inner)
        ctx.scaling, ctx.with_dropout = scaling, dropped is not None
        return nn.functional.linear(x, weight, bias).addmm_(inner, b.to(x.dtype).T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        grad_inner = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)  # (n, r)
        grad_a = (grad_inner.T @ x).to(a.dtype)
        grad_b = (grad.T @ inner).mul_(ctx.scaling).to(b.dtype)
        grad_x, grad_dropped = grad @ weight if ctx.needs_input_grad[0] else None, None
        if ctx.with_dropout:
            grad_dropped = grad_inner @ a.to(grad.dtype) if ctx.needs_input_grad[1] else None
        elif grad_x is not None:
            grad_x.addmm_(grad_inner, a.to(grad.dtype))
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


def local_adapter(source: str, key: str = "the adapter") -> Path:
    """The folder of an adapter, or that of "user/repo[@revision]" in the cache. Raises TbpoError if there is none."""
    from huggingface_hub import snapshot_download

    folder, (repo, _, revision) = Path(source), source.partition("@")
    files = ("adapter_config.json", "adapter_model.safetensors")
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(files)))
        if missing := [name for name in files if not (folder / name).exists()]:
            raise OSError(f"it has no {missing[0]}")
    except (OSError, ValueError) as error:
        what, where = f"the adapter cannot be loaded: {str(error).splitlines()[0]}", f"{key} = {source!r}"
        expected = f"a folder, or user/repo[@revision] on the Hub, with {' and '.join(files)} (a pickle is not loaded)"
        fix = "check it, and that the Hub can be reached; a whole model is named as model.base"
        raise TbpoError(what, where, expected, fix) from error
    return folder
