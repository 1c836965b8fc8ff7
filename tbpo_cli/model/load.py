"""The policy and its reference, from a recipe."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from tbpo_cli.config.recipe import Model, Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.adapters import add_adapter, continued_adapter, local_adapter, new_adapter
from tbpo_cli.model.base import compute_dtype, load_base
from tbpo_cli.model.fused import fuse_lora
from tbpo_cli.model.policy import REFERENCE, Policy
from tbpo_cli.model.sharding import LanguageModel


def load_policy(
    recipe: Recipe,
    device: torch.device,
    sft_output: Path | None,
    with_reference: bool,
    load_device: torch.device | None = None,
    start: str | None = None,
) -> Policy:
    """The policy in its starting state.

    Args:
        device: where it will compute.
        sft_output: `sft/adapter` or `sft/model` of this run, if an SFT stage came before.
        with_reference: whether the loss, or the evaluation, compares with a reference.
        load_device: where it is loaded, to be moved or sharded later; None: `device`.
        start: the adapter, or the model, that it starts from; None: the reference.

    Raises:
        TbpoError: if the base cannot be loaded, or LoRA finds no layers.
    """
    torch.manual_seed(recipe.run.seed)  # random weights and a new adapter depend on the seed alone
    compute = compute_dtype(recipe.model, device)
    load_device = load_device or device
    if recipe.model.lora is None:
        # bf16 would round small updates of the weights away: they are kept in fp32.
        source = str(sft_output or recipe.model.base)
        model = load_base(recipe.model, start or source, load_device, torch.float32)
        frozen = {}
        if with_reference and start is None:
            frozen[REFERENCE] = copy.deepcopy(model).requires_grad_(False)
        elif with_reference:
            other = load_base(recipe.model, source, load_device, torch.float32)
            frozen[REFERENCE] = other.requires_grad_(False)
        return Policy(model, frozen, None if compute == torch.float32 else compute)
    base = load_base(recipe.model, recipe.model.base, load_device, compute)
    reference = sft_output or _named_adapter(recipe.model)
    policy = reference if start is None else local_adapter(start, "align.start")
    if policy is None:
        return _with_adapter(new_adapter(base, recipe.model), recipe.model, compute)
    adapted = continued_adapter(base, policy, reference, recipe.model)
    return _with_adapter(adapted, recipe.model, compute)


def load_trained(
    recipe: Recipe, device: torch.device, trained: Path, sft_output: Path | None
) -> Policy:
    """The policy as training left it, with its reference.

    Args:
        trained: `align/adapter` or `align/model`, or the folder of any other adapter for the base.
        sft_output: `sft/adapter` or `sft/model` of this run, if an SFT stage came before.
    """
    compute = compute_dtype(recipe.model, device)
    if not (trained / "adapter_config.json").exists():
        source = str(sft_output or recipe.model.base)
        reference = load_base(recipe.model, source, device, compute)
        policy = load_base(recipe.model, str(trained), device, compute)
        return Policy(policy, {REFERENCE: reference})
    base = load_base(recipe.model, recipe.model.base, device, compute)
    reference_adapter = sft_output or _named_adapter(recipe.model)
    adapted = continued_adapter(base, trained, reference_adapter, recipe.model, trains=False)
    return _with_adapter(adapted, recipe.model, compute)


def load_base_alone(recipe: Recipe, device: torch.device, source: str | None = None) -> Policy:
    """A whole model as the view of the reference, to answer with: the base, or that of a folder."""
    compute = compute_dtype(recipe.model, device)
    base = load_base(recipe.model, source or recipe.model.base, device, compute)
    return Policy(base, {REFERENCE: base})


def _named_adapter(model: Model) -> Path | None:
    return None if model.adapter is None else local_adapter(model.adapter, "model.adapter")


def _with_adapter(peft_model: LanguageModel, model: Model, compute: torch.dtype) -> Policy:
    fuse_lora(peft_model)
    is_half = compute != torch.float32
    autocast = compute if model.quantization is not None and is_half else None
    return Policy(peft_model, autocast=autocast)


def add_helper(
    policy: Policy,
    name: str,
    source: str,
    model: Model,
    device: torch.device,
    load_device: torch.device | None = None,
    key: str = "align.loss",
) -> None:
    """Puts another policy beside the policy, as the view `name`.

    It is an adapter on the shared base where it can be, else a model of its own.

    Args:
        source: a run directory, or the folder of an adapter or model, or a Hub repository.
        device, load_device: as of `load_policy`.
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
    runs = [Path(source) / "align" / kind for kind in ("adapter", "model")]
    folder = str(next((run for run in runs if run.is_dir()), source))
    try:
        if policy.adapters and not (Path(folder) / "config.json").exists():
            add_adapter(policy.model, local_adapter(folder), name, model.base)
        else:
            compute = compute_dtype(model, device)
            helper = load_base(model, folder, load_device or device, compute)
            policy.frozen[name] = helper.requires_grad_(False)
    except TbpoError as error:
        raise TbpoError(
            f"what {key} names cannot be loaded: {error.what}",
            source,
            "an adapter for the same base, or a model with its vocabulary",
            f"check {key}",
        ) from error
