"""The models that `tbpo sample` and `tbpo eval` load in the processes that do their work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.model.adapters import local_adapter
from tbpo_cli.model.load import (
    add_helper,
    is_whole_model,
    load_base_alone,
    load_trained,
    num_models,
)
from tbpo_cli.model.policy import Policy
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.train.group import Group
from tbpo_cli.train.placement import Placement, place


def load_measured(
    recipe: Recipe, run_dir: RunDir, helpers: Mapping[str, str], group: Group
) -> tuple[Policy, Placement]:
    """The models of an evaluation: the policy, its reference, and those in `eval.against`.

    Args:
        helpers: the sources of the last ones by their views.
    """
    trained = run_dir.weights("align")
    count = num_models(trained, helpers.values())
    placement = place(recipe, count, run_dir.stage("eval"), group)
    mesh = placement.mesh
    device = group.device
    policy = load_trained(recipe, device, trained, _sft_output(recipe, run_dir), mesh)
    for view, source in helpers.items():
        add_helper(policy, view, source, recipe.model, device, key="eval.against", mesh=mesh)
    return policy, placement


def place_sampled(recipe: Recipe, run_dir: RunDir, group: Group) -> Placement:
    """Decides how `load_sampled` loads; all processes call it."""
    if _alone(recipe):
        count = 1
    else:
        trained = _trained(recipe, run_dir)
        # Before the first round a server answers with the base.
        count = num_models(trained) if trained.exists() else 1
    return place(recipe, count, run_dir.stage("sample"), group)


def load_sampled(recipe: Recipe, run_dir: RunDir, mesh: DeviceMesh | None) -> Policy:
    """The aligned policy, or another adapter in its place, with the reference."""
    device = Group.of_environment().device
    if source := _alone(recipe):
        return load_base_alone(recipe, device, source, mesh)
    sft_output = None if recipe.sample.adapter else _sft_output(recipe, run_dir)
    return load_trained(recipe, device, _trained(recipe, run_dir), sft_output, mesh)


def _sft_output(recipe: Recipe, run_dir: RunDir) -> Path | None:
    return run_dir.weights("sft") if recipe.sft is not None else None


def _alone(recipe: Recipe) -> str | None:
    """The model that answers by itself, without a reference beside it; None if there are two."""
    adapter = recipe.sample.adapter
    is_base = recipe.sample.models == ("reference",) and recipe.sft is None
    if is_base and recipe.model.adapter is None:
        return recipe.model.base
    is_model = adapter is not None and is_whole_model(adapter)
    return adapter if is_model else None  # of a round without an adapter


def _trained(recipe: Recipe, run_dir: RunDir) -> Path:
    """The folder of the weights that answer as the policy."""
    adapter = recipe.sample.adapter
    return local_adapter(adapter) if adapter else run_dir.weights("align")
