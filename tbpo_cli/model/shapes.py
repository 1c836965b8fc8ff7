"""The models of a training as shapes without numbers, before any weights are read."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.core.head import REFERENCE_FREE
from tbpo_cli.core.losses import Loss
from tbpo_cli.model.base import compute_dtype, load_base
from tbpo_cli.model.load import load_policy
from tbpo_cli.model.policy import POLICY, REFERENCE, Policy
from tbpo_cli.model.sharding import LanguageModel


def policy_of_shapes(recipe: Recipe, loss: Loss, device: torch.device, after_sft: bool) -> Policy:
    """The policy and the models that it is compared with, on "meta".

    They are those that the training would load for a device; an existing adapter is taken for one
    that [model.lora] describes.

    Args:
        device: where the training would compute.
        after_sft: whether the reference is an adapter, that of an SFT stage before.

    Raises:
        TbpoError: if the base's config cannot be read, or LoRA finds no layers.
    """
    meta = torch.device("meta")
    model = replace(recipe.model, initial_weights="random", quantization=None, adapter=None)
    shapes = replace(recipe, model=model)
    with meta:
        policy = load_policy(shapes, device, None, not loss.needs <= REFERENCE_FREE, meta)
        views = [*loss.helpers]
        if policy.adapters and (after_sft or recipe.model.adapter is not None):
            views.append(REFERENCE)
        for view in views:
            if policy.adapters:
                policy.model.add_adapter(view, policy.adapters[POLICY])
                policy.model.set_adapter(POLICY)
            else:
                policy.frozen[view] = copy.deepcopy(policy.model).requires_grad_(False)
    return policy


def base_of_shapes(recipe: Recipe, device: torch.device) -> LanguageModel:
    """The base as it computes answers on a device, on "meta"."""
    meta = torch.device("meta")
    model = replace(recipe.model, initial_weights="random", quantization=None, adapter=None)
    with meta:
        return load_base(model, model.base, meta, compute_dtype(recipe.model, device))
