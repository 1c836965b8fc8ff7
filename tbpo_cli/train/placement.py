"""Whether several processes shard the weights, and over which; decided from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tbpo_cli import console
from tbpo_cli.config.recipe import Model, Recipe
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.shapes import base_of_shapes
from tbpo_cli.model.sharding import LanguageModel
from tbpo_cli.model.together import ALONE, Together
from tbpo_cli.runs.files import read_sealed, write_sealed
from tbpo_cli.train.group import Group
from tbpo_cli.train.memory import bytes_of_weights, device_memory

# In a stage's folder: how the processes that answered had the weights, for the manifest.
PLACED = ".placed.json"


@dataclass(frozen=True)
class Placement:
    """Where the weights of models are that answer and are measured, and are not trained.

    Args:
        mesh: the processes over which the weights are sharded; None: each has all of them.
        shapes: the base on "meta" if the weights are sharded; else None.
        together: the processes that make each pass together.
    """

    mesh: DeviceMesh | None = None
    shapes: LanguageModel | None = None
    together: Together = ALONE


def place(recipe: Recipe, num_models: int, folder: Path, group: Group) -> Placement:
    """Decides for a stage without training, before any weights are read, and says it.

    All processes call it. By `align.sharding`: "auto" shards weights that fill more than half of a
    device, as it does with the frozen ones of a training.

    Args:
        num_models: whole models that are loaded at once, each as large as the base.
        folder: of the stage.
    """
    if group.size == 1:
        _note(folder, group, "one process has all weights")
        return Placement()
    wanted = recipe.align.sharding
    shapes = None if wanted == "ddp" else base_of_shapes(recipe, group.device)
    size = 0 if shapes is None else num_models * bytes_of_weights(Policy(shapes))
    decisions = group.gather(choose_for_answers(size, wanted, recipe.model, group.device))
    is_sharded, reason = next((each for each in decisions if each[0]), decisions[0])
    said = words_of(is_sharded, reason)
    console.say(said)
    _note(folder, group, said)
    if not is_sharded:
        return Placement()
    mesh = mesh_of(size, recipe.align.shard_over, group)
    return Placement(mesh, shapes, Together(group.gather, folder))


def placed(folder: Path) -> dict[str, str | int]:
    """What `place` has noted in a stage's folder, for the manifest; nothing if nothing was run."""
    return read_sealed(folder / PLACED)


def _note(folder: Path, group: Group, weights: str) -> None:
    if group.is_main:
        write_sealed(folder / PLACED, {"weights": weights, "num_processes": group.size})


def words_of(is_sharded: bool, reason: str) -> str:
    """A decision about the weights in words."""
    how = "the weights are sharded over the processes (fsdp)"
    return f"{how if is_sharded else 'each process has all weights (ddp)'}: {reason}"


def mesh_of(needed: float, wanted: str, group: Group) -> DeviceMesh:
    """The processes over which weights are sharded: one dimension, or (machines, processes of one).

    With two, each machine has a copy of the weights: what they exchange in each layer stays within
    it, and the sums of gradients alone go between machines.

    Args:
        needed: bytes of weights, gradients and moments, before they are divided.
        wanted: `shard_over` of the recipe.
    """
    parts = num_sharing(needed, wanted, group.device, group.size, group.size_on_machine)
    kind = group.device.type
    if parts == group.size:
        return init_device_mesh(kind, (group.size,))
    machines = group.size // parts
    console.say(copies_on_machines(machines, parts))
    return init_device_mesh(kind, (machines, parts), mesh_dim_names=("machine", "part"))


def num_sharing(
    needed: float, wanted: str, device: torch.device, size: int, on_machine: int
) -> int:
    """How many processes share one copy of sharded weights: those of each machine, or all.

    Args:
        needed, wanted: as of `mesh_of`.
        size: the processes of all machines.
        on_machine: those of this one.
    """
    is_several = 1 < on_machine < size and size % on_machine == 0
    if wanted == "auto":
        is_small = device.type == "cpu" or needed / on_machine < device_memory(device) / 2
        wanted = "machine" if is_small else "all"
    return on_machine if is_several and wanted == "machine" else size


def copies_on_machines(machines: int, parts: int) -> str:
    """In words, how weights are sharded if each machine has all of them."""
    return f"each of the {machines} machines has a copy of the weights, in {parts} parts"


def choose_sharding(
    policy: Policy, wanted: str, model: Model, device: torch.device
) -> tuple[bool, str]:
    """Whether several processes shard the weights in a training, and why."""
    if wanted != "auto":
        return wanted == "fsdp", "as the recipe says"
    if not policy.adapters:
        return True, "all of them are trained"
    reason = _too_large(bytes_of_weights(policy), model, device)
    return (False, "only an adapter is trained") if reason is None else (True, reason)


def choose_for_answers(
    size: int, wanted: str, model: Model, device: torch.device
) -> tuple[bool, str]:
    """Whether several processes shard weights that are not trained, and why.

    Args:
        size: bytes of the weights.
        wanted: `align.sharding`.
    """
    if wanted != "auto":
        return wanted == "fsdp", "as the recipe says"
    reason = _too_large(size, model, device)
    return (False, "they leave memory for activations") if reason is None else (True, reason)


def _too_large(size: int, model: Model, device: torch.device) -> str | None:
    """Why weights are too large for a device that needs memory for activations, too; else None."""
    if device.type != "cuda" or model.quantization is not None:
        return None
    memory = device_memory(device)
    if size <= memory / 2:
        return None
    return f"their {size / 1e9:,.0f} GB are more than half of a device's {memory / 1e9:,.0f} GB"
