"""A training stage in this process, alone or as one of several: from a recipe to weights in the stage's folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tbpo_cli import console
from tbpo_cli.config.recipe import Align, Model, Recipe, Sft
from tbpo_cli.core.head import REFERENCE_FREE
from tbpo_cli.core.losses import Loss
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokenizer import fingerprint, load_tokenizer
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.base import compute_dtype
from tbpo_cli.model.load import add_helper, load_policy
from tbpo_cli.model.policy import NEGATIVE, POSITIVE, Policy
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage
from tbpo_cli.train.group import Group
from tbpo_cli.train.loop import Tell, TrainingRun
from tbpo_cli.train.memory import room


def train_stage(
    stage: Stage, settings: Sft | Align, recipe: Recipe, run_dir: RunDir, loss: Loss
) -> None:
    """Trains a stage, and writes `adapter/` (or `model/`), metrics.jsonl and the manifest.

    Raises TbpoError if the prepared pairs do not fit the loss or the model, or the model cannot be loaded.
    """
    name = stage.name
    started = time.monotonic()
    stores = open_stores(settings, run_dir)
    if loss.span != "chosen" and not all(store.has_rejected for store in stores):
        what, where = "the rows have no rejected responses", "data.train or data.eval"
        expected = "preference pairs, with a chosen and a rejected response"
        raise TbpoError(what, where, expected, "demonstrations are for `tbpo sft`")
    tokenizer = load_tokenizer(recipe.model)
    if fingerprint(tokenizer) != run_dir.manifest("prepare")["tokenizer"]:
        what = "the tokenizer or its chat template is another one than the pairs were prepared with"
        fix = "tbpo prepare RECIPE --restart, or name the old one as model.revision"
        raise TbpoError(
            what, f"model.base = {recipe.model.base!r}", "the same tokenizer for all stages", fix
        )
    group = Group.of_environment()
    folder = run_dir.begin(stage, recipe) if group.is_main else run_dir.stage(name)
    group.gather(None)
    torch.backends.cuda.matmul.allow_tf32 = True
    console.say(f"{name}: loading {recipe.model.base}")
    policy = _load(name, recipe, run_dir, loss, group)
    _check_embeddings(policy, stores, recipe.model)
    where = (
        torch.cuda.get_device_name(group.device)
        if group.device.type == "cuda"
        else group.device.type
    )
    trained = sum(parameter.numel() for parameter in policy.trained.values())
    console.say(
        f"{name}: training {trained:,} weights on {f'{group.size} × ' if group.size > 1 else ''}{where}; "
        f"{len(stores[0]):,} pairs, {len(stores[1]):,} held out"
    )
    if name == "align":
        console.say(f"the reference is {policy.describe_reference()}")
    mesh = None if group.size == 1 else _place(policy, settings.sharding, recipe.model, group)
    reference = (
        run_dir.path
        / "reference"
        / f"{_reference_key(name, settings.reverse, recipe, run_dir, loss, group.device)}.f32"
    )
    with _trackers(recipe, folder / "logs", group) as tell:
        TrainingRun(
            policy, loss, settings, *stores, folder, recipe.run.seed, reference, group, tell, mesh
        ).run()
    weights = run_dir.weights(name)
    outputs = policy.save(weights, group.is_main)
    if not group.is_main:
        return
    tokenizer.save_pretrained(weights)
    seconds = round(time.monotonic() - started, 1)
    facts = {
        "seed": recipe.run.seed,
        "device": where,
        "num_processes": group.size,
        "seconds": seconds,
    }
    facts["base_commit"] = getattr(policy.model.config, "_commit_hash", None)  # of a Hub repository
    run_dir.finish(name, [*outputs, folder / "metrics.jsonl"], facts)


@contextmanager
def _trackers(recipe: Recipe, folder: Path, group: Group) -> Iterator[Tell]:
    """Opens run.trackers, through accelerate: what metrics.jsonl holds, live in tensorboard, wandb or trackio.

    Yields tell("train" or "eval", step, metrics). Raises TbpoError if the package of one is not installed.
    """
    names = recipe.run.trackers if group.is_main else ()
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TbpoError(
                f"{name} is not installed", "run.trackers", "its package", f"pip install {name}"
            )
    if not names:
        yield lambda split, step, values: None
        return
    accelerator, given = Accelerator(log_with=list(names), project_dir=folder), recipe.settings()
    shown = {
        key: value if isinstance(value, (bool, int, float)) else str(value)
        for key, value in given.items()
    }
    accelerator.init_trackers(recipe.run.name, shown)  # the recipe is shown beside the curves
    try:
        yield lambda split, step, values: accelerator.log(
            {f"{split}/{key}": v for key, v in values.items()}, step
        )
    finally:
        accelerator.end_training()


def open_stores(settings: Sft | Align, run_dir: RunDir) -> tuple[PairStore, PairStore]:
    """The prepared pairs that a stage trains on, and the held-out ones."""
    folder = run_dir.stage("prepare")
    return PairStore(folder / settings.split, settings.reverse), PairStore(
        folder / "eval", settings.reverse
    )


def _load(name: str, recipe: Recipe, run_dir: RunDir, loss: Loss, group: Group) -> Policy:
    """The policy in its starting state, with the frozen models that the loss compares it with."""
    sft_output = run_dir.weights("sft") if name == "align" and recipe.sft is not None else None
    # Where weights may be sharded over several processes, they need not fit one device.
    is_placed = group.size == 1 or recipe.model.quantization is not None
    load_device = group.device if is_placed else torch.device("cpu")
    policy = load_policy(
        recipe, group.device, sft_output, not loss.needs <= REFERENCE_FREE, load_device
    )
    if "weights" in loss.needs:
        for view in (POSITIVE, NEGATIVE):
            add_helper(
                policy,
                view,
                getattr(loss, view),
                recipe.model,
                group.device,
                load_device,
                f"align.loss.{view}",
            )
    return policy


def _check_embeddings(policy: Policy, stores: tuple[PairStore, PairStore], model: Model) -> None:
    embeddings = policy.model.get_input_embeddings().weight.shape[0]
    if (largest := max(store.largest_id for store in stores)) >= embeddings:
        what = f"the tokenizer has an id that the model has no embedding for: {largest}"
        expected = f"ids below {embeddings:,}, as the model's config says"
        raise TbpoError(
            what,
            f"model.base = {model.base!r}",
            expected,
            "take the tokenizer that belongs to the model",
        )


def _place(policy: Policy, wanted: str, model: Model, group: Group) -> DeviceMesh | None:
    """The mesh over which the weights will be sharded; None if they are not: the models are moved."""
    is_sharded, reason = choose_sharding(policy, wanted, model, group.device)
    kept = (
        "weights are sharded over the processes (fsdp)"
        if is_sharded
        else "each process has all weights (ddp)"
    )
    console.say(f"{kept}: {reason}")
    if is_sharded:
        return init_device_mesh(group.device.type, (group.size,))
    policy.move_to(group.device)
    return None


def choose_sharding(
    policy: Policy, wanted: str, model: Model, device: torch.device
) -> tuple[bool, str]:
    """Whether weights are sharded over the processes, and why."""
    if wanted != "auto":
        return wanted == "fsdp", "as the recipe says"
    if not policy.adapters:
        return True, "all of them are trained"
    if device.type == "cuda" and model.quantization is None:
        models = [policy.model, *policy.frozen.values()]
        size = sum(p.numel() * p.element_size() for each in models for p in each.parameters())
        if size > room(device) / 2:  # the rest is for activations
            return (
                True,
                f"their {size / 1e9:,.0f} GB are more than half of a device's {room(device) / 1e9:,.0f} GB",
            )
    return False, "only an adapter is trained"


def _reference_key(
    name: str, reverse: bool, recipe: Recipe, run_dir: RunDir, loss: Loss, device: torch.device
) -> str:
    """A hash of all that log π_ref of the training pairs depends on: model, adapter, data, dtype."""
    started = run_dir.started_from(name)
    of_model = (key for key in started["settings"] if key.startswith(("run.seed", "model.")))
    settings = {
        key: started["settings"][key] for key in of_model if not key.startswith("model.lora.")
    }
    base = started["files"].get("model.base", {}) | started["files"].get("model.adapter", {})
    parts = {
        "model": [
            settings,
            [file["sha256"] for file in base.values()],
            str(compute_dtype(recipe.model, device)),
        ],
        "data": [started["outputs"], loss.span, reverse],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
