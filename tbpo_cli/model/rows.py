"""Weights of a sharded model, read from safetensors files: each process reads its own rows."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from tbpo_cli.model.sharding import LanguageModel


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its name in a safetensors file."""

    path: Path
    name: str


class WholeOnlyError(Exception):
    """Why rows cannot be read alone: transformers has to load the whole checkpoint."""


def shapes_of(
    config: Any, source: str, revision: str | None, dtype: torch.dtype, attention: str | None
) -> tuple[LanguageModel, dict[str, Place]]:
    """A model whose parameters are shapes ("meta"), and where each of its weights is read from.

    1. Build the model from its config, with the numbers of what no file holds.
    2. Refuse what transformers changes while it loads: code of the checkpoint's own, weights that
       are converted or renamed, and those that are kept in fp32.
    3. Find each weight in the files, with the same shape.
    4. Give the model its generation config.

    Args:
        source: a folder, or the id of a Hub repository.
        dtype: of the weights.

    Raises:
        WholeOnlyError: if the files do not hold exactly these weights.
    """
    if getattr(config, "auto_map", None):
        raise WholeOnlyError("its code is not transformers' own")
    model = _built(config, dtype, attention)
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    if kept and dtype != torch.float32:
        raise WholeOnlyError(f"weights are kept in fp32: {', '.join(sorted(kept))}")
    found = {}
    for path in _files(config, source, revision):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                found[name] = (path, tuple(file.get_slice(name).get_shape()))
    places = _match(model, found)
    model._weight_conversions = []  # none was used: it is saved with the same names
    with suppress(OSError):  # without such a file, that of its config stays
        model.generation_config = GenerationConfig.from_pretrained(
            source, revision=revision or "main"
        )
    return model.eval(), places


def _built(config: Any, dtype: torch.dtype, attention: str | None) -> LanguageModel:
    """A model of parameters without numbers; its buffers and other tensors have theirs.

    Those that no file holds (rotary frequencies, multipliers) are then what the class makes of its
    config, in whichever of its methods it does so.

    Raises:
        WholeOnlyError: if the class needs numbers of its parameters to make them.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            with no_init_weights(), init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention
                )
            model.tie_weights()  # accelerate made a parameter of its own of each name
            model.initialize_weights()  # of buffers, in fp32: above, `dtype` is the default
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise WholeOnlyError(f"it cannot be built without its weights: {why}") from error
    for path, module in model.named_modules():
        kept = set(module._buffers) - module._non_persistent_buffers_set  # the files hold these
        held = {**module._buffers, **vars(module)}
        for name, tensor in held.items():
            if isinstance(tensor, Tensor) and tensor.is_meta and name not in kept:
                raise WholeOnlyError(f"no file holds {path}.{name}, which is made of weights")
    return model


def read_rows(model: LanguageModel, places: dict[str, Place], device: torch.device) -> None:
    """Gives a sharded model of shapes its numbers, on a device.

    1. Make tensors for this process's rows; what has numbers, which no file holds, keeps them.
    2. Read the rows, a tensor at a time, and cast them.

    Args:
        places: from `shapes_of`, by the names of the weights in the model.
    """
    computed = dict(model.named_buffers(remove_duplicate=False))
    model.to_empty(device=device)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if not computed[name].is_meta:  # else a file holds it
            buffer.copy_(computed[name])
    state = model.state_dict(keep_vars=True)
    with ExitStack() as files, torch.no_grad():
        opened = {
            path: files.enter_context(safe_open(path, "pt"))
            for path in dict.fromkeys(place.path for place in places.values())
        }
        for name, place in places.items():
            _read(opened[place.path], place.name, state[name])


def _read(file: Any, name: str, tensor: Tensor) -> None:
    """Copies a tensor of a file, or this process's rows of it, into a tensor of a model."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(file.get_tensor(name))
        return
    rows = own_rows(tensor)
    if len(rows):
        tensor.to_local().copy_(file.get_slice(name)[rows.start : rows.stop])


def own_rows(tensor: DTensor) -> range:
    """Which rows of a sharded tensor this process has.

    FSDP shards the first dimension of a tensor, over one dimension of the mesh.
    """
    (dimension,) = (i for i, each in enumerate(tensor.placements) if isinstance(each, Shard))
    mesh = tensor.device_mesh
    parts = mesh.size(dimension)
    part = mesh.get_local_rank(dimension)
    count, start = Shard.local_shard_size_and_offset(tensor.shape[0], parts, part)
    return range(start, start + count)


def _files(config: Any, source: str, revision: str | None) -> list[Path]:
    """The safetensors files of a checkpoint, as transformers chooses them."""
    if getattr(config, "transformers_weights", None):
        raise WholeOnlyError("its config names a file of its own")

    def cached(name: str) -> str | None:
        path: str | None = cached_file(
            source, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return path

    if single := cached(SAFE_WEIGHTS_NAME):
        return [Path(single)]
    index = cached(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise WholeOnlyError("it has no safetensors")
    names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    paths = [cached(name) for name in sorted(set(names))]
    if None in paths:
        raise WholeOnlyError("a file of its weights is missing")
    return [Path(path) for path in paths if path is not None]


def _match(
    model: LanguageModel, found: dict[str, tuple[Path, tuple[int, ...]]]
) -> dict[str, Place]:
    """Where each weight of a model is, by its name in the model; one name of tied weights.

    Raises:
        WholeOnlyError: unless the files have each weight once, and nothing else.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}."
    places: dict[str, Place] = {}
    read: set[int] = set()
    for name, (path, shape) in found.items():
        if rename_source_key(name, renamings, converters) != (name, None):
            raise WholeOnlyError(f"transformers converts its weights, as {name}")
        names = (name, prefix + name, name.removeprefix(prefix))
        own = next((each for each in names if each in state), None)
        if own is None or tuple(state[own].shape) != shape or id(state[own]) in read:
            raise WholeOnlyError(f"{name} is none of the model's weights, or of another shape")
        read.add(id(state[own]))
        places[own] = Place(path, name)
    missing = [name for name, tensor in state.items() if id(tensor) not in read]
    if missing:
        raise WholeOnlyError(f"the files lack {missing[0]}")
    return places
