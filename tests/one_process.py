"""A training whose weights one process shards with itself alone: FSDP2 as on many, on one device.

In a module of its own, so that a new process can import it.
"""

import socket

import torch
import torch.distributed as dist
from conftest import run_stage
from torch.distributed.device_mesh import init_device_mesh

from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.data.store import PairStore
from tbpo_cli.model.load import load_policy
from tbpo_cli.model.shapes import policy_of_shapes
from tbpo_cli.model.sharding import gathered
from tbpo_cli.train import loop
from tbpo_cli.train.group import Group
from tbpo_cli.train.run import TrainingRun


def train_sharded(device, shards, recipe_file, folder, sets):
    """The trained weights as arrays; of weights that are not sharded with `shards` False."""
    recipe = load_recipe(recipe_file, sets)
    run = folder / f"sharded-{shards}"
    run_stage("prepare", recipe_file, run)
    stores = [PairStore(run / "prepare" / split) for split in ("train", "eval")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    loss, settings = recipe.align.loss, recipe.align
    group = Group(device=torch.device(device))
    mesh = shapes = None
    if shards:
        mesh = init_device_mesh(device, (1,))
        shapes = policy_of_shapes(recipe, loss, group.device, after_sft=False)
    policy = load_policy(recipe, group.device, None, True, mesh=mesh)
    assert policy.is_sharded == shards
    (run / "align").mkdir()
    training = TrainingRun(
        policy, loss, settings, *stores, run / "align", 0, group=group, shapes=shapes
    )
    loop.train(training)
    weights = {name: gathered(p.detach()).cpu().numpy() for name, p in policy.trained.items()}
    dist.destroy_process_group()
    return weights
