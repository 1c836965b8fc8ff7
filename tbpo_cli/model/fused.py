"""Layers in fewer passes over memory than transformers' and peft's own: RMSNorm, and LoRA, whose
y = x Wᵀ + s (x Aᵀ) Bᵀ is added in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Layers that read one input, by their names in an attention or an MLP.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# The adapters of layers; all their A (Σr, in); the B (out, r) of each.
Copies = tuple[list[str | None], Tensor, list[Tensor]]


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


def fuse_lora(model: nn.Module) -> list[Siblings]:
    """Lets plain LoRA layers compute by `_LoraLinears`; others stay as they are.

    Layers that read one input are computed together: see `Siblings`.

    Returns:
        Those layers in their groups, for `cast_once`.
    """
    groups = []
    for parent in list(model.modules()):
        plain = {name: each for name, each in parent.named_children() if _is_plain_lora(each)}
        for names in (*SIBLINGS, *((name,) for name in plain)):
            siblings = Siblings([plain.pop(name) for name in names if name in plain])
            for place, layer in enumerate(siblings.layers):
                layer.forward = functools.partial(siblings.forward, place)  # of this one only
            if len(siblings.layers) > 1:
                parent.register_forward_hook(siblings.finish, always_call=True)
            if siblings.layers:
                groups.append(siblings)
    return groups


@contextmanager
def cast_once(groups: Sequence[Siblings]) -> Iterator[None]:
    """Layers read copies of their adapters' weights, in the base's dtype, within the context.

    One operation writes them all, in place of some in each layer of each pass. The weights must not
    change meanwhile, nor be sharded.
    """
    weights: list[Tensor] = []
    copies: list[Tensor] = []
    for group in groups:
        adapters = [_only_adapter(layer) for layer in group.layers]
        if group.are_apart or None in adapters:
            continue
        both = list(zip(group.layers, adapters, strict=True))
        a = [layer.lora_A[name].weight for layer, name in both]
        b = [layer.lora_B[name].weight for layer, name in both]
        dtype = group.layers[0].base_layer.weight.dtype
        ranks = [each.shape[0] for each in a]
        stacked = a[0].new_empty(sum(ranks), a[0].shape[1], dtype=dtype)
        ups = [torch.empty_like(each, dtype=dtype) for each in b]
        group.copies = (adapters, stacked, ups)
        weights += [*a, *b]
        copies += [*stacked.split(ranks), *ups]
    try:
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(copies, weights)
        yield
    finally:
        for group in groups:
            group.copies = None


def _is_plain_lora(module: nn.Module) -> bool:
    is_lora = type(module) is Linear and not module.lora_variant
    return is_lora and type(module.base_layer) is nn.Linear


class Siblings:
    """LoRA layers of one attention or MLP that read one input; or a single one.

    The first that is called computes all, and the others hand out what is theirs. Where they turn
    out to be called with several inputs, or not all of them, each computes for itself from then on.
    The pass that reads the head (`read_head`) has shown it before a training begins: activation
    checkpointing has to find the same operations when it computes a layer again.

    Args:
        layers: plain LoRA layers.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.are_apart = len({layer.in_features for layer in layers}) > 1
        self.input: Tensor | None = None
        self.results: dict[int, Tensor] = {}  # not handed out yet, by place in `layers`
        self.copies: Copies | None = None

    def forward(self, place: int, x: Tensor) -> Tensor:
        """What the layer at that place makes of (…, in) states: (…, out)."""
        if x is self.input and place in self.results:
            return self.results.pop(place)
        layer = self.layers[place]
        adapters = [_only_adapter(each) for each in self.layers]
        own = adapters[place]
        if own is None:
            return Linear.forward(layer, x)
        copies = self._copies_for(adapters, x.dtype)
        if self.are_apart or any(map(_drops, self.layers, adapters)):
            if copies is not None:
                stacked, ups = copies
                ranks = [up.shape[1] for up in ups]
                copies = stacked.split(ranks)[place], [ups[place]]
            return _products([layer], [own], x, copies)[0]
        results = dict(enumerate(_products(self.layers, adapters, x, copies)))
        result = results.pop(place)
        if results:
            self.input = x
            self.results = results
        return result

    def _copies_for(
        self, adapters: list[str | None], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]] | None:
        """All A and the B of those adapters, if `cast_once` has made copies in that dtype."""
        if self.copies is None:
            return None
        of, stacked, ups = self.copies
        return (stacked, ups) if of == adapters and stacked.dtype == dtype else None

    def finish(self, parent: nn.Module, inputs: Any, output: Any) -> None:
        """Forgets an input, and with it the graph behind the results, as its pass ends.

        Args:
            parent, inputs, output: of the pass; the output is None if it has failed.
        """
        self.are_apart |= bool(self.results) and output is not None
        self.input = None
        self.results = {}


def _only_adapter(layer: Linear) -> str | None:
    """The name of the adapter that a layer adds; None where peft has more to do than to add one."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    is_one = len(names) == 1 and not layer.lora_bias[names[0]]
    return names[0] if is_one and not layer.disable_adapters and not layer.merged else None


def _drops(layer: Linear, adapter: str | None) -> bool:
    """Whether a layer has an input of its own: dropout is drawn for each; or no such adapter."""
    dropout = None if adapter is None else layer.lora_dropout[adapter]
    return dropout is None or (dropout.training and not isinstance(dropout, nn.Identity))


def _products(
    layers: list[Linear], adapters: list[Any], x: Tensor, copies: tuple[Tensor, list[Tensor]] | None
) -> list[Tensor]:
    """What layers, each with an adapter, make of one input; only a single one has dropout."""
    rows = x.flatten(0, -2)
    dropped = layers[0].lora_dropout[adapters[0]](rows)
    both = list(zip(layers, adapters, strict=True))
    results: tuple[Tensor, ...] = _LoraLinears.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        rows,
        None if dropped is rows else dropped,
        [layer.scaling[name] for layer, name in both],
        copies,
        *(layer.base_layer.weight for layer in layers),
        *(layer.base_layer.bias for layer in layers),
        *(layer.lora_A[name].weight for layer, name in both),
        *(layer.lora_B[name].weight for layer, name in both),
    )
    return [result.unflatten(0, x.shape[:-1]) for result in results]


class _LoraLinears(torch.autograd.Function):
    """(n, in) rows → (n, out) for each of k layers: y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

    W and b are frozen; the layers' A (r, in) and B (out, r) are cast to the rows' dtype once, for
    both passes, unless copies are given. Forward:

    1. x [A₁; A₂; …]ᵀ, (n, Σr), in one product, from the rows after dropout.
    2. For each layer the product with W, to which the scaled product with B is added in place.

    Backward, with g (n, out) of each layer that was used:

    3. s g B, the gradients of step 1, beside each other in one (n, Σr) tensor.
    4. The gradients of all A in one product, and of each B.
    5. That of x: the layers' g W and the product of step 3 with all A, each added in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        scalings: list[float],
        copies: tuple[Tensor, list[Tensor]] | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        weights, biases, a, b = _fourths(tensors)
        read = x if dropped is None else dropped
        ctx.dtypes = [each.dtype for each in (*a, *b)]
        if copies is None:
            stacked = (a[0] if len(a) == 1 else torch.cat(a)).to(x.dtype)
            copies = stacked, [each.to(x.dtype) for each in b]
        stacked, b = copies
        inner = read @ stacked.T
        ctx.ranks = [each.shape[1] for each in b]
        ctx.scalings = scalings
        ctx.with_dropout = dropped is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(read, inner, stacked, *weights, *b)
        parts = zip(weights, biases, inner.split(ctx.ranks, dim=1), b, scalings, strict=True)
        return tuple(
            F.linear(x, weight, bias).addmm_(part, up.T, alpha=scaling)
            for weight, bias, part, up, scaling in parts
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        read, inner, stacked, *rest = ctx.saved_tensors
        k = len(grads)
        weights, b = rest[:k], rest[k:]
        grad_inner = torch.empty_like(inner)
        grad_b: list[Tensor | None] = []
        grad_x: Tensor | None = None
        parts = zip(
            grads, weights, b, ctx.scalings,
            inner.split(ctx.ranks, dim=1), grad_inner.split(ctx.ranks, dim=1), strict=True,
        )  # fmt: skip
        for grad, weight, up, scaling, own_inner, own_grad in parts:
            if grad is None:  # nothing was made of that layer's result
                own_grad.zero_()
                grad_b.append(None)
                continue
            own_grad.addmm_(grad, up, beta=0, alpha=scaling)  # step 3
            grad_b.append(torch.empty_like(up).addmm_(grad.T, own_inner, beta=0, alpha=scaling))
            if ctx.needs_input_grad[0]:
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        grad_dropped = None
        if ctx.with_dropout:
            grad_dropped = grad_inner @ stacked if ctx.needs_input_grad[1] else None
        elif grad_x is not None:
            grad_x.addmm_(grad_inner, stacked)
        grad_a = (grad_inner.T @ read).to(ctx.dtypes[0]).split(ctx.ranks)
        found = [a if grad is not None else None for a, grad in zip(grad_a, grads, strict=True)]
        found += [
            None if each is None else each.to(dtype)
            for each, dtype in zip(grad_b, ctx.dtypes[k:], strict=True)
        ]
        return grad_x, grad_dropped, None, None, *[None] * (2 * k), *found


def _fourths(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """Four lists of one length, from one list of all."""
    size = len(tensors) // 4
    return (list(tensors[start : start + size]) for start in range(0, len(tensors), size))
