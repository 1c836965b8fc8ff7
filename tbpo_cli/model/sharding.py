"""Weights shared out over processes by torch's FSDP2: each keeps a part of every tensor, and a layer while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

# A transformers causal language model, or peft's around one: no class says what both can do.
LanguageModel = Any

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def causal_model(model: LanguageModel) -> LanguageModel:
    """The transformers model inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shard(model: LanguageModel, mesh: DeviceMesh, compute: torch.dtype | None) -> None:
    """Leaves each process of a mesh its part of every weight, on the mesh's device; all processes call it.

    Gradients become sums over the processes, and every pass, forward or backward, a work of all of them together.

    Args:
        compute: the dtype that gathered weights are cast to; None: their own.
    """
    causal, precision = causal_model(model), MixedPrecisionPolicy()
    if (
        compute is not None
    ):  # by autocast alone, the casts of all layers would be kept until the backward pass
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    layers = set(causal._no_split_modules or ())
    inside_out = reversed(
        list(causal.modules())
    )  # a part that is shared out is no more a part of what holds it
    units = [module for module in inside_out if type(module).__name__ in layers]
    ends = [
        end
        for end in (causal.get_input_embeddings(), causal.get_output_embeddings())
        if end is not None
    ]
    tied = len({id(end.weight) for end in ends}) < len(
        ends
    )  # then the weight stays with what holds both: the model
    for unit in [*units, *([] if tied else ends), causal]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(
            True
        )  # else another factor than the mean's asks for NCCL
    causal.sharded_backbone = (
        causal.base_model.__call__
    )  # enters through the model, which gathers what is its own
    register_fsdp_forward_method(causal, "sharded_backbone")


def gathered(tensor: MaybeTensor) -> MaybeTensor:
    """The whole of a tensor that is shared out, on every process; gradients add up on the way back. Others as they are.

    All processes call it.
    """
    return (
        tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor
    )


def gather_all(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name in the memory of the CPU, gathered one after the other; all processes call it.

    Args:
        keep: whether this process wants them; it gets nothing otherwise.
    """
    kept: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in known:  # tied weights stay one tensor
            whole = gathered(tensor.detach())
            known[id(tensor)] = whole.cpu() if keep else whole.new_empty(0)
        kept[name] = known[id(tensor)]
    return kept if keep else {}


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, on the device of another one and shared out as that is."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
