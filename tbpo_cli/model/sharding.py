"""Weights that are sharded over processes by torch's FSDP2.

Each process keeps a part of every tensor, and gathers a layer while it runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

# A transformers causal language model, or peft's around one: no class says what both can do.
LanguageModel = Any

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def causal_model(model: LanguageModel) -> LanguageModel:
    """The transformers model inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: LanguageModel) -> LanguageModel:
    """The part of a transformers model whose last hidden state its output head reads."""
    causal = causal_model(model)
    inner = causal.base_model
    if inner is not causal:
        return inner
    # The prefix that the class names is no part of it: transformers then takes the whole.
    decoder = causal.get_decoder()
    return getattr(causal, "model", causal) if decoder is causal else decoder


def text_decoder(model: LanguageModel) -> LanguageModel:
    """The language part of a model, without what it has for images or sound."""
    causal = causal_model(model)
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else backbone(causal)
    # Where the head itself is called "decoder", transformers takes it for the language part.
    return backbone(causal) if decoder is causal.get_output_embeddings() else decoder


@dataclass(frozen=True)
class Shards:
    """How weights are sharded.

    Args:
        mesh: the processes. Of two dimensions, the second one shards, and the first has replicas.
        compute: the dtype that gathered weights are cast to; None: their own. (Autocast would keep
            the casts of all layers until the backward pass.)
        trains: whether some of them are trained. FSDP takes weights of several dtypes (a router of
            experts is kept in fp32) only where none of them is.
    """

    mesh: DeviceMesh
    compute: torch.dtype | None = None
    trains: bool = False


def shard(model: LanguageModel, shards: Shards) -> None:
    """Leaves each process of a mesh its part of every weight, on the mesh's device.

    All processes call it. Gradients become sums over the processes; a pass, forward or backward, is
    then a collective operation of all of them.

    1. Freeze weights that are not trained.
    2. Shard each layer, the innermost first: what is sharded is left out of what contains it.
       Layers that share weights stay in step 4: a weight is in one group of FSDP only.
    3. Shard the input and the output embeddings; where they are tied, they stay in step 4.
    4. Shard what is left of the model.
    5. Let the backbone be called by itself, through the model, which gathers what is in step 4.
    """
    causal = causal_model(model)
    if not shards.trains:
        model.requires_grad_(False)
    precision = MixedPrecisionPolicy()
    if shards.compute is not None:
        precision = MixedPrecisionPolicy(param_dtype=shards.compute, reduce_dtype=torch.float32)
    embeddings = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    ends = [end for end in embeddings if end is not None]
    is_tied = len({id(end.weight) for end in ends}) < len(ends)
    for unit in [*_layers(causal), *([] if is_tied else ends), causal]:
        fully_shard(unit, mesh=shards.mesh, reshard_after_forward=True, mp_policy=precision)
        unit.set_gradient_divide_factor(1.0)
        # Without this, a factor other than that of the mean asks for NCCL.
        unit.set_force_sum_reduction_for_comms(True)
    causal.sharded_backbone = backbone(causal).__call__
    register_fsdp_forward_method(causal, "sharded_backbone")


def _layers(causal: LanguageModel) -> list[nn.Module]:
    """The layers of a model that share no weights with others, the innermost first."""
    kinds = set(causal._no_split_modules or ())
    layers = [each for each in reversed(list(causal.modules())) if type(each).__name__ in kinds]
    first: dict[Tensor, nn.Module] = {}
    shared: set[Tensor] = set()
    for layer in layers:
        inside = set(layer.modules())
        for weight in layer.parameters():
            if first.setdefault(weight, layer) not in inside:
                shared.add(weight)
    return [layer for layer in layers if shared.isdisjoint(layer.parameters())]


def gathered(tensor: MaybeTensor) -> MaybeTensor:
    """The whole of a sharded tensor, on every process; any other tensor as it is.

    All processes call it. Gradients are summed over them on the way back.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)


def gather_all(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name in the CPU's memory, gathered one at a time; all processes call it.

    Args:
        keep: whether this process keeps them; it gets nothing otherwise.
    """
    kept: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in known:  # tied weights stay one tensor
            whole = gathered(tensor.detach())
            known[id(tensor)] = whole.cpu() if keep else whole.new_empty(0)
        kept[name] = known[id(tensor)]
    return kept if keep else {}


def save_gathered(
    model: LanguageModel, folder: Path, dtype: torch.dtype, writes: bool, file_size: str = "5GB"
) -> None:
    """Writes a sharded model's weights as `save_pretrained` does; all processes call it.

    A tensor is gathered at a time, and a process keeps those of one file.

    Args:
        dtype: of the numbers in the files.
        writes: whether this process writes.
        file_size: the most that a file holds, as "5GB".
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    left_out = tied | set(model._keys_to_ignore_on_save or ())
    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in left_out
    }
    dtypes = {
        name: dtype if each.is_floating_point() else each.dtype for name, each in state.items()
    }
    shapes = {
        name: torch.empty(each.shape, dtype=dtypes[name], device="meta")
        for name, each in state.items()
    }
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=file_size)
    for file, names in plan.filename_to_tensors.items():
        kept = {}
        for name in names:
            whole = gathered(state[name].detach())
            if writes:
                kept[name] = whole.to("cpu", dtypes[name]).contiguous()
        if writes:
            save_file(kept, folder / file, {"format": "pt"})
    if writes and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        path = folder / SAFE_WEIGHTS_INDEX_NAME
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, on another one's device and sharded like it."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
