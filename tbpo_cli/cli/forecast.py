"""What is known of a training before it runs: pairs, steps, layout, memory, time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from tbpo_cli.batch.batches import longest_sequence, num_steps, span_lengths
from tbpo_cli.config.recipe import Align, Recipe, Rounds, Sft
from tbpo_cli.core.head import REFERENCE_FREE
from tbpo_cli.core.losses import Loss, build_loss
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.layout import choose_layout
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.model.shapes import policy_of_shapes
from tbpo_cli.report.diagnoses import BEFORE, diagnose
from tbpo_cli.report.facts import Facts
from tbpo_cli.runs.launch import ALONE, Processes
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.chain import plan
from tbpo_cli.train.checkpoint import bytes_on_disk
from tbpo_cli.train.group import Group
from tbpo_cli.train.memory import (
    MOMENTS,
    bytes_of_learning,
    bytes_of_weights,
    device_memory,
    estimate_memory,
    matrix_rate,
    needs_checkpointing,
    operations,
)
from tbpo_cli.train.metrics import read_metrics
from tbpo_cli.train.placement import choose_sharding, copies_on_machines, num_sharing
from tbpo_cli.train.run import num_evaluated
from tbpo_cli.train.stage import open_stores

# The share of the speed of bare matrix products that a step reaches, measured for the CPU: see
# tests/benchmarks/results/train_step*.md.
EFFICIENCY = {"cpu": 0.6, "cuda": 0.35}

Line = tuple[str, str]  # what it is about, and words for a person


@dataclass(frozen=True)
class Training:
    """A training stage of a recipe: its name, its table and its loss."""

    name: str
    settings: Sft | Align
    loss: Loss


def trainings_of(recipe: Recipe) -> Iterator[Training]:
    """The training stages of a recipe, in order."""
    if recipe.sft is not None:
        yield Training("sft", recipe.sft, build_loss("sft"))
    yield Training("align", recipe.align, recipe.align.loss)


@dataclass(frozen=True)
class Forecast:
    """What is known of a training before it runs.

    Args:
        lines: what a person reads.
        memory: bytes of each device by what takes them; empty if the base cannot be read.
        disk: bytes of the checkpoints and the result; 0 if the base cannot be read.
        warnings: what usually goes wrong with such a training.
    """

    lines: list[Line]
    memory: dict[str, float]
    disk: float
    warnings: list[str]


@dataclass(frozen=True)
class Counts:
    """Of the prepared pairs.

    Args:
        line: for a person.
        facts: those that the diagnoses read.
        tokens: that pass through the model, a token of an evaluation counting a half.
        longest: tokens of the longest prompt with one of its responses.
        bounds: tokens of the longest pair, and of the longest step.
    """

    line: str
    facts: dict[str, Any]
    tokens: float
    longest: int
    bounds: tuple[int, int]


def forecast(
    training: Training, recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE
) -> Forecast:
    """What is known of a training in some processes, each of them with a device of its own."""
    settings = training.settings
    device = Group.of_environment().device
    counts = Counts("", {}, 0.0, recipe.data.max_length, (0, 2**31))
    if [*plan("prepare", recipe, run_dir).values()][-1][0] == "done":
        counts = count_pairs(training, run_dir)
    unknown = "pairs, tokens and steps are known once `tbpo prepare` has read the rows"
    lines = [(training.name, counts.line or unknown)]
    facts: dict[str, Any] = {
        "stage": training.name,
        "lora": recipe.model.lora is not None,
        "rate": settings.learning_rate,
        "device_memory": device_memory(device),
        "two_sigma_answers": recipe.two_sigma_answers,
        **counts.facts,
    }
    default = getattr(type(training.loss)(), "beta", None)
    if default is not None:
        facts["beta_share"] = getattr(training.loss, "beta", default) / default
    memory: dict[str, float] = {}
    disk = 0.0
    try:
        policy = policy_on_meta(training, recipe, device)
    except TbpoError as error:
        what = "layout, head, reference, memory and time could not be found out"
        lines.append(("model", f"{what}: {error.what}"))
    else:
        sharded, why = choose_sharding(policy, settings.sharding, recipe.model, device)
        size = processes.total
        parts = 1
        if sharded:
            needed = bytes_of_weights(policy) + bytes_of_learning(policy, settings)
            local = processes.per_machine
            parts = num_sharing(needed, settings.shard_over, device, size, local)
        if size > 1:
            how = f"{size}, {'fsdp' if sharded else 'ddp'}: {why}"
            if sharded and parts < size:
                how += f"; {copies_on_machines(size // parts, parts)}"
            lines.append(("processes", how))
        lines += choices(policy, training, counts.longest, recipe.rounds)
        memory, tokens = estimate_memory(
            policy, recipe.model, settings, device, parts, counts.bounds
        )
        facts["memory"] = sum(memory.values())
        facts["weights"] = sum(weight.numel() for weight in policy.model.parameters())
        lines.append(("memory", _memory_line(memory, tokens, device)))
        trained = sum(weight.numel() for weight in policy.trained.values())
        disk = bytes_on_disk(trained, MOMENTS[settings.optimizer])
        if counts.tokens:
            passed = counts.tokens / size
            longest_pair = counts.bounds[0]
            kept = memory["weights"] + memory["gradients and moments"]
            time = _time(training, policy, run_dir, passed, longest_pair, kept)
            lines.append(("time", time))
    return Forecast(lines, memory, disk, diagnose(Facts(**facts), BEFORE))


def policy_on_meta(training: Training, recipe: Recipe, device: torch.device) -> Policy:
    """The policy and the models that it is compared with, as shapes without numbers.

    They are those that the training would load for a device.

    Raises:
        TbpoError: if the base's config cannot be read, or LoRA finds no layers.
    """
    after_sft = training.settings is recipe.align and recipe.sft is not None
    return policy_of_shapes(recipe, training.loss, device, after_sft)


def _lengths(store: PairStore, span: str) -> np.ndarray:
    return span_lengths(store, range(len(store)), span)


def count_pairs(training: Training, run_dir: RunDir) -> Counts:
    """Counts the prepared pairs of a training."""
    settings = training.settings
    loss = training.loss
    stores = open_stores(settings, run_dir)
    train, held_out = (_lengths(store, loss.span) for store in stores)
    batch = settings.batch_size
    num_pairs = len(train)
    steps = num_steps(num_pairs, batch, settings.epochs, settings.max_steps)
    visits = steps * batch / num_pairs
    prompt, chosen, rejected = train.mean(axis=0)
    line = (
        f"{num_pairs:,} pairs, {len(held_out):,} held out; {steps:,} steps of {batch}, "
        f"each pair {visits:.2g} ×, {train.sum() * visits:,.0f} tokens; mean tokens of a pair "
        f"that the loss reads: prompt {prompt:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f}"
    )
    facts = {"steps": steps, "batch": batch, "pairs": num_pairs, "visits": visits}
    facts |= {"held_out": len(held_out), "cut": _share_over_length(run_dir)}
    whole = _lengths(stores[0], "response")
    if isinstance(settings, Align) and stores[0].has_rejected:
        facts["length_ratio"] = stores[0].chosen_lengths.mean() / stores[0].rejected_lengths.mean()
        if loss.span == "aligned":
            facts["unaligned"] = 1 - train[:, 1:].sum() / whole[:, 1:].sum()
    # A step with all metrics reads the whole pairs.
    tokens = np.sort(whole.sum(axis=1))
    bounds = (int(tokens[-1]), int(tokens[-batch:].sum()))
    share = num_evaluated(settings, len(held_out)) / max(1, len(held_out))
    num_evaluations = 2 + steps // settings.eval_every * share
    passed = float(train.sum() * visits + held_out.sum() * num_evaluations / 2)
    return Counts(line, facts, passed, longest_sequence(stores), bounds)


def _share_over_length(run_dir: RunDir) -> float:
    """The share of the rows that are over data.max_length."""
    counts = run_dir.manifest("prepare")["counts"]
    dropped = sum(count["rejected"].get("overlong", 0) for count in counts)
    shortened = sum(count["noted"].get("cut", 0) for count in counts)
    return float((dropped + shortened) / max(1, sum(count["rows"] for count in counts)))


def choices(
    policy: Policy, training: Training, longest: int, rounds: Rounds | None = None
) -> list[Line]:
    """Reference, head and layout, in the words with which the training will name them."""
    reference = policy.describe_reference() if policy.has_reference else "none"
    if policy.has_reference and rounds is not None and rounds.number > 1:
        later = ", in every round"
        if rounds.reference == "previous":
            later = ", in round 1; in each later one the policy of the round before, frozen"
        reference += f'{later} (rounds.reference = "{rounds.reference}")'
    if policy.has_reference and training.loss.needs <= REFERENCE_FREE:
        reference += " (for the metrics only)"
    try:
        layout, why = choose_layout(policy.models, training.settings.layout, longest)
        other = "the training is refused" if layout == "padded" else "rows are padded or refused"
        scores = "the scores of real pairs differ from those of each sequence alone"
        chosen = f"{layout}: {why}; if {scores}, {other}"
    except TbpoError as error:
        chosen = f"the training would stop: {error.what} ({error.where}); {error.fix}"
    return [
        ("reference", reference),
        ("head", Scorer.of(policy).describe(training.loss.needs)),
        ("layout", chosen),
    ]


def _memory_line(memory: dict[str, float], tokens: int, device: torch.device) -> str:
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in memory.items() if size)
    needed = sum(memory.values()) / 1e9
    available = device_memory(device) / 1e9
    begin = f"about {needed:.1f} of {available:.0f} GB on each {device.type}"
    return f"{begin}, with {tokens:,} tokens at a time: {parts}"


def _time(
    training: Training,
    policy: Policy,
    run_dir: RunDir,
    tokens: float,
    longest_pair: int,
    used: float,
) -> str:
    """How long some tokens take on a device, and what that is based on.

    Args:
        tokens: that pass through the model, on one device.
        longest_pair: its tokens.
        used: bytes of weights, gradients and moments on a device.
    """
    folder: Path = run_dir.stage(training.name)
    lines = read_metrics(folder / "metrics.jsonl")
    measured = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    if len(measured) > 1:
        rate = median(measured[1:])
        basis = f"the {rate:,.0f} tokens/s of {folder}"
    else:
        device = Group.of_environment().device
        products = matrix_rate(device, policy.autocast or policy.model.dtype)
        again = needs_checkpointing(
            policy.model, training.settings.activation_checkpointing, longest_pair, device, used
        )
        needed = operations(policy, again)
        share = EFFICIENCY[device.type]
        rate = share * products / needed
        basis = f"{share} of this {device.type}'s {products / 1e9:,.0f} GFLOP/s"
    seconds = tokens / rate
    if seconds < 120:
        amount = f"{seconds:.0f} seconds"
    elif seconds < 7200:
        amount = f"{seconds / 60:.0f} minutes"
    else:
        amount = f"{seconds / 3600:.0f} hours"
    return f"about {amount} (rough: {basis})"
