"""A training stage in this process, alone or as one of several: from a recipe to saved weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerFast

from tbpo_cli import console
from tbpo_cli.batch.batches import longest_sequence
from tbpo_cli.config.recipe import Align, Model, Recipe, Sft
from tbpo_cli.core.head import REFERENCE_FREE
from tbpo_cli.core.losses import Loss
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.templates import Chat
from tbpo_cli.data.tokenizer import fingerprint, load_chat
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.base import compute_dtype
from tbpo_cli.model.load import add_helper, load_policy
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.probes import check_positions
from tbpo_cli.model.shapes import policy_of_shapes
from tbpo_cli.model.targets import without_adapter
from tbpo_cli.runs.files import free_bytes, require_space
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage
from tbpo_cli.train.checkpoint import bytes_on_disk, kept_checkpoints
from tbpo_cli.train.group import Group
from tbpo_cli.train.loop import train
from tbpo_cli.train.memory import MOMENTS, bytes_of_learning, bytes_of_weights
from tbpo_cli.train.placement import choose_sharding, mesh_of, words_of
from tbpo_cli.train.run import TrainingRun
from tbpo_cli.train.trackers import open_trackers

Stores = tuple[PairStore, PairStore]


def train_stage(
    stage: Stage, settings: Sft | Align, recipe: Recipe, run_dir: RunDir, loss: Loss
) -> None:
    """Trains, and writes `adapter/` or `model/`, metrics.jsonl and the manifest.

    Raises:
        TbpoError: if the pairs do not fit the loss or the model, or a model cannot be loaded.
    """
    started = time.monotonic()
    stores = open_stores(settings, run_dir)
    chat = load_chat(recipe.model, recipe.data.template_date)
    _check_prepared(stores, chat.tokenizer, recipe.model, run_dir, loss)
    group = Group.of_environment()
    folder = run_dir.begin(stage, recipe) if group.is_main else run_dir.stage(stage.name)
    group.gather(None)
    console.say(f"{stage.name}: loading {recipe.model.base}")
    shapes = _shapes_if_sharded(stage.name, settings, recipe, loss, group)
    mesh = None
    if shapes is not None:
        needed = bytes_of_weights(shapes) + bytes_of_learning(shapes, settings)
        mesh = mesh_of(needed, settings.shard_over, group)
    policy = _load(stage.name, recipe, run_dir, loss, group, mesh)
    _check_fit(policy, stores, recipe.model)
    _check_space(policy, settings, folder, group)
    device = _device_name(group.device)
    num_weights = policy.model.num_parameters()
    _say_what_is_trained(stage.name, policy, stores, device, group)
    key = _reference_key(stage.name, settings.reverse, recipe, run_dir, loss, group.device)
    with open_trackers(recipe, folder / "logs", group) as track:
        run = TrainingRun(
            policy=policy,
            loss=loss,
            settings=settings,
            train=stores[0],
            evaluation=stores[1],
            folder=folder,
            seed=recipe.run.seed,
            reference=run_dir.path / "reference" / f"{key}.f32",
            group=group,
            track=track,
            shapes=shapes,
        )
        train(run)
    outputs = _save(policy, chat, run_dir.weights(stage.name), group)
    if not group.is_main:
        return
    facts = {
        "seed": recipe.run.seed,
        "device": device,
        "num_weights": num_weights,
        "num_processes": group.size,
        "ways": run.ways,
        "seconds": round(time.monotonic() - started, 1),
        "base_commit": getattr(policy.model.config, "_commit_hash", None),  # of a Hub repository
    }
    run_dir.finish(stage.name, [*outputs, folder / "metrics.jsonl"], facts)


def _save(policy: Policy, chat: Chat, folder: Path, group: Group) -> list[Path]:
    """Writes the trained weights and the tokenizer; all processes call it, the first one writes."""
    if group.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # what a crash left of an earlier attempt
    outputs = policy.save(folder, group.is_main, chat.end_ids)
    if group.is_main:
        chat.tokenizer.save_pretrained(folder)
    return outputs


def _check_prepared(
    stores: Stores, tokenizer: PreTrainedTokenizerFast, model: Model, run_dir: RunDir, loss: Loss
) -> None:
    """Raises TbpoError if the pairs are not what the loss reads, all weigh 0, or are of another
    tokenizer.
    """
    if loss.span != "chosen" and not all(store.has_rejected for store in stores):
        raise TbpoError(
            "the rows have no rejected responses",
            "data.train or data.eval",
            "preference pairs, with a chosen and a rejected response",
            "demonstrations are for `tbpo sft`",
        )
    if stores[0].weighs_nothing:
        raise TbpoError(
            "all pairs to train on have the weight 0: nothing would be learnt",
            "the column weight of the rows",
            "at least one pair with a weight above 0",
            'mend that column, or name another one: [data.columns] weight = "importance"',
        )
    if fingerprint(tokenizer) != run_dir.manifest("prepare")["tokenizer"]:
        raise TbpoError(
            "the tokenizer or its chat template is not the one that the pairs were prepared with",
            f"model.base = {model.base!r}",
            "the same tokenizer for all stages",
            "tbpo prepare RECIPE --restart, or name the old one as model.revision",
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _say_what_is_trained(
    name: str, policy: Policy, stores: Stores, device: str, group: Group
) -> None:
    num_weights = sum(parameter.numel() for parameter in policy.trained.values())
    where = f"{group.size} × {device}" if group.size > 1 else device
    pairs = f"{len(stores[0]):,} pairs, {len(stores[1]):,} held out"
    console.say(f"{name}: training {num_weights:,} weights on {where}; {pairs}")
    if policy.adapters and (bare := without_adapter(policy.model)):
        console.say(f"linear layers without an adapter: {', '.join(bare)}")
    if name == "align":
        console.say(
            f"the reference is {policy.describe_reference()}"
            if policy.has_reference
            else "no reference: the loss needs none"
        )


def open_stores(settings: Sft | Align, run_dir: RunDir) -> Stores:
    """The prepared pairs that a stage trains on, and the held-out ones."""
    folder = run_dir.stage("prepare")
    train_pairs = PairStore(folder / settings.split, settings.reverse)
    return train_pairs, PairStore(folder / "eval", settings.reverse)


def _load(
    name: str, recipe: Recipe, run_dir: RunDir, loss: Loss, group: Group, mesh: DeviceMesh | None
) -> Policy:
    """The policy in its starting state, with the frozen models that the loss compares it with."""
    sft_output = run_dir.weights("sft") if name == "align" and recipe.sft is not None else None
    needs_reference = not loss.needs <= REFERENCE_FREE
    start = recipe.align.start if name == "align" else None
    policy = load_policy(recipe, group.device, sft_output, needs_reference, start=start, mesh=mesh)
    for view in loss.helpers:
        source = getattr(loss, view)
        key = f"align.loss.{view}"
        add_helper(policy, view, source, recipe.model, group.device, key=key, mesh=mesh)
    return policy


def _check_fit(policy: Policy, stores: Stores, model: Model) -> None:
    """Raises TbpoError if a token id has no embedding, or a sequence too few positions."""
    num_embeddings = policy.model.get_input_embeddings().weight.shape[0]
    largest = max(store.largest_id for store in stores)
    if largest >= num_embeddings:
        raise TbpoError(
            f"the tokenizer has an id that the model has no embedding for: {largest}",
            f"model.base = {model.base!r}",
            f"ids below {num_embeddings:,}, as the model's config says",
            "take the tokenizer that belongs to the model",
        )
    check_positions(
        policy.models,
        longest_sequence(stores),
        f"model.base = {model.base!r}",
        "data.max_length = {limit}",
    )


def _check_space(policy: Policy, settings: Sft | Align, folder: Path, group: Group) -> None:
    """Raises TbpoError, in all processes, if the disk is too full for the checkpoints."""
    num_trained = sum(weight.numel() for weight in policy.trained.values())
    num_kept = len(kept_checkpoints(folder / "checkpoints"))
    needed = bytes_on_disk(num_trained, MOMENTS[settings.optimizer], num_kept)
    require_space(folder, needed, min(group.gather(free_bytes(folder))))


def _shapes_if_sharded(
    name: str, settings: Sft | Align, recipe: Recipe, loss: Loss, group: Group
) -> Policy | None:
    """The policy as shapes without numbers if several processes shard its weights; else None.

    This is decided, and said, before any weights are read.
    """
    if group.size == 1:
        return None
    after_sft = name == "align" and recipe.sft is not None
    shapes = policy_of_shapes(recipe, loss, group.device, after_sft)
    is_sharded, reason = choose_sharding(shapes, settings.sharding, recipe.model, group.device)
    console.say(words_of(is_sharded, reason))
    return shapes if is_sharded else None


def _reference_key(
    name: str, reverse: bool, recipe: Recipe, run_dir: RunDir, loss: Loss, device: torch.device
) -> str:
    """A hash of what log π_ref of the training pairs depends on: model, adapter, data, dtype."""
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
