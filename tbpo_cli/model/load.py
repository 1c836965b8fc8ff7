"""The policy and its reference, from a recipe."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tbpo_cli.config.recipe import Model, Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.adapters import (
    add_adapter,
    continued_adapter,
    copies_layers,
    local_adapter,
    new_adapter,
)
from tbpo_cli.model.base import CPU, compute_dtype, load_base
from tbpo_cli.model.fused import fuse_lora
from tbpo_cli.model.policy import REFERENCE, Policy
from tbpo_cli.model.sharding import LanguageModel, Shards, shard


def load_policy(
    recipe: Recipe,
    device: torch.device,
    sft_output: Path | None,
    with_reference: bool,
    load_device: torch.device | None = None,
    start: str | None = None,
    mesh: DeviceMesh | None = None,
) -> Policy:
    """The policy in its starting state.

    Args:
        device: where it will compute.
        sft_output: `sft/adapter` or `sft/model` of this run, if an SFT stage came before.
        with_reference: whether the loss, or the evaluation, compares with a reference.
        load_device: where its tensors are made: "meta" for shapes alone; None: `device`.
        start: the adapter, or the model, that it starts from; None: the reference.
        mesh: the processes over which its weights are sharded; None: this one has all of them.

    Raises:
        TbpoError: if the base cannot be loaded, or LoRA finds no layers.
    """
    torch.manual_seed(recipe.run.seed)  # random weights and a new adapter depend on the seed alone
    compute = compute_dtype(recipe.model, device)
    load_device = load_device or device
    if recipe.model.lora is not None:
        reference = sft_output or _named_adapter(recipe.model)
        policy = reference if start is None else local_adapter(start, "align.start")
        return _load_adapters(recipe, load_device, compute, policy, reference, mesh)
    # bf16 would round small updates of the weights away: they are kept in fp32.
    autocast = None if compute == torch.float32 else compute
    shards = None if mesh is None else Shards(mesh, autocast, trains=True)
    source = str(sft_output or recipe.model.base)
    model = load_base(recipe.model, start or source, load_device, torch.float32, shards)
    frozen = {}
    if with_reference and start is None and shards is None:
        frozen[REFERENCE] = frozen_copy(model, autocast)
    elif with_reference:
        # Gathered weights are cast to `compute`: those that never change are kept so.
        dtype = torch.float32 if shards is None else compute
        frozen_shards = None if shards is None else replace(shards, trains=False)
        other = load_base(recipe.model, source, load_device, dtype, frozen_shards)
        frozen[REFERENCE] = other.requires_grad_(False)
    return Policy(model, frozen, autocast)


def frozen_copy(model: LanguageModel, autocast: torch.dtype | None) -> LanguageModel:
    """A copy of a model that is never trained.

    Args:
        autocast: the dtype of its matrix products. Those of its linear layers are kept in it, where
            autocast would cast them in each pass: the copy computes the same numbers.
    """
    ends = {id(model.get_input_embeddings().weight)}
    if (head := model.get_output_embeddings()) is not None:
        ends.add(id(head.weight))
    kept = {
        id(module.weight): nn.Parameter(module.weight.detach().to(autocast), requires_grad=False)
        for module in model.modules()
        if autocast is not None and type(module) is nn.Linear and id(module.weight) not in ends
    }
    narrow = {id(weight) for weight in kept.values()}
    copied: LanguageModel = copy.deepcopy(model, kept)  # by its memo, nothing is copied twice
    for module in copied.modules():
        if type(module) is nn.Linear and id(module.weight) in narrow:
            module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]  # of this one only
    return copied.requires_grad_(False)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer whose weight is narrower than its input, as in a probe without autocast."""
    weight = module.weight
    if not torch.is_autocast_enabled(x.device.type if not x.is_meta else "cpu"):
        weight = weight.to(x.dtype)
    return F.linear(x, weight, module.bias)


def load_trained(
    recipe: Recipe,
    device: torch.device,
    trained: Path,
    sft_output: Path | None,
    mesh: DeviceMesh | None = None,
) -> Policy:
    """The policy as training left it, with its reference.

    Args:
        trained: `align/adapter` or `align/model`, or the folder of any other adapter for the base.
        sft_output: `sft/adapter` or `sft/model` of this run, if an SFT stage came before.
        mesh: as of `load_policy`.
    """
    compute = compute_dtype(recipe.model, device)
    if not is_adapter(trained):
        source = str(sft_output or recipe.model.base)
        shards = None if mesh is None else Shards(mesh)
        reference = load_base(recipe.model, source, device, compute, shards)
        policy = load_base(recipe.model, str(trained), device, compute, shards)
        return Policy(policy, {REFERENCE: reference})
    reference_adapter = sft_output or _named_adapter(recipe.model)
    return _load_adapters(recipe, device, compute, trained, reference_adapter, mesh, trains=False)


def _load_adapters(
    recipe: Recipe,
    device: torch.device,
    compute: torch.dtype,
    policy: Path | None,
    reference: Path | None,
    mesh: DeviceMesh | None,
    trains: bool = True,
) -> Policy:
    """A base with the adapters of policy and reference.

    Of sharded weights only the base's are: each process has the whole of its adapters. Adapters
    with copies of the base's layers are put in before the base is sharded, and are sharded too.

    Args:
        policy: the folder of the policy's adapter; None: a new one.
        reference: that of the reference's; None: the base itself is the reference.
        trains: whether the policy's adapter is trained further.
    """
    shards = None if mesh is None else Shards(mesh)
    has_copies = any(copies_layers(folder) for folder in (policy, reference) if folder is not None)
    at_once = None if has_copies else shards
    place = CPU if has_copies and shards is not None else device
    base = load_base(recipe.model, recipe.model.base, place, compute, at_once)
    if policy is None:
        adapted = new_adapter(base, recipe.model)
    else:
        adapted = continued_adapter(base, policy, reference, recipe.model, trains)
    loaded = _with_adapter(adapted, recipe.model, compute)
    if has_copies and shards is not None:
        shard(loaded.model, replace(shards, trains=trains))
    return loaded


def load_base_alone(
    recipe: Recipe, device: torch.device, source: str | None = None, mesh: DeviceMesh | None = None
) -> Policy:
    """A whole model as the view of the reference, to answer with: the base, or that of a folder."""
    compute = compute_dtype(recipe.model, device)
    shards = None if mesh is None else Shards(mesh)
    base = load_base(recipe.model, source or recipe.model.base, device, compute, shards)
    return Policy(base, {REFERENCE: base})


def weights_of(source: str) -> str:
    """The folder of the weights of a run directory; any other source as it is."""
    runs = [Path(source) / "align" / kind for kind in ("adapter", "model")]
    return str(next((run for run in runs if run.is_dir()), source))


def is_adapter(folder: Path) -> bool:
    """Whether a local folder has an adapter."""
    return (folder / "adapter_config.json").exists()


def num_models(trained: Path, helpers: Iterable[str] = ()) -> int:
    """How many models, each as large as the base, `load_trained` and `add_helper` load.

    Args:
        trained: as of `load_trained`.
        helpers: the sources of `add_helper`.
    """
    sources = [weights_of(source) for source in helpers]
    if is_adapter(trained):
        return 1 + sum(is_whole_model(source) for source in sources)
    return 2 + len(sources)


def is_whole_model(folder: str) -> bool:
    """Whether a local folder has a model, and not an adapter alone."""
    return (Path(folder) / "config.json").exists()


def _named_adapter(model: Model) -> Path | None:
    return None if model.adapter is None else local_adapter(model.adapter, "model.adapter")


def _with_adapter(peft_model: LanguageModel, model: Model, compute: torch.dtype) -> Policy:
    fused = fuse_lora(peft_model)
    is_half = compute != torch.float32
    autocast = compute if model.quantization is not None and is_half else None
    return Policy(peft_model, autocast=autocast, fused=fused)


def add_helper(
    policy: Policy,
    name: str,
    source: str,
    model: Model,
    device: torch.device,
    load_device: torch.device | None = None,
    key: str = "align.loss",
    mesh: DeviceMesh | None = None,
) -> None:
    """Puts another policy beside the policy, as the view `name`.

    It is an adapter on the shared base where it can be, else a model of its own.

    Args:
        source: a run directory, or the folder of an adapter or model, or a Hub repository.
        device, load_device, mesh: as of `load_policy`.
        key: of the recipe, that names it.

    Raises:
        TbpoError: if nothing is named, or it cannot be loaded.
    """
    if not source:
        raise TbpoError(
            f"the {name} helper is not named",
            f"[align.loss] {name}",
            "a run directory, an adapter or a model",
            'train it with `[align.loss] name = "dpo"`,'
            " the negative one with `[align] reverse = true` as well",
        )
    folder = weights_of(source)
    try:
        if policy.adapters and not is_whole_model(folder):
            adapter = local_adapter(folder)
            if policy.is_sharded and copies_layers(adapter):
                what = "a sharded base cannot give it the copies of layers that it has"
                fix = 'sharding = "ddp", or a helper without modules_to_save'
                raise TbpoError(what, str(adapter), "an adapter of small matrices alone", fix)
            add_adapter(policy.model, adapter, name, model.base)
        else:
            compute = compute_dtype(model, device)
            shards = None if mesh is None else Shards(mesh, policy.autocast)
            helper = load_base(model, folder, load_device or device, compute, shards)
            policy.frozen[name] = helper.requires_grad_(False)
    except TbpoError as error:
        raise TbpoError(
            f"what {key} names cannot be loaded: {error.what}",
            source,
            "an adapter for the same base, or a model with its vocabulary",
            f"check {key}; {error.fix}" if error.fix else f"check {key}",
        ) from error
