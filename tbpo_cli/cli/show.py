"""`tbpo show`: what a recipe comes to, before it is run. No weights are loaded."""

from __future__ import annotations

import copy
import json
import os
import textwrap
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from tbpo_cli import console
from tbpo_cli.batch.batches import longest_sequence, num_steps, span_lengths
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.core.head import REFERENCE_FREE
from tbpo_cli.core.losses import Loss, build_loss
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.attention import choose_layout
from tbpo_cli.model.load import NEGATIVE, POLICY, POSITIVE, REFERENCE, Policy, load_policy
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.report.diagnoses import advice
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.chain import STAGES, STATES, plan
from tbpo_cli.train.group import Group
from tbpo_cli.train.memory import device_memory, estimate_memory, matrix_rate, operations
from tbpo_cli.train.metrics import read_metrics
from tbpo_cli.train.stage import choose_sharding, open_stores

EFFICIENCY = {
    "cpu": 0.6,
    "cuda": 0.35,
}  # of a step, over bare matrix products; tests/benchmarks/results/train_step*.md


def show(recipe: Recipe, given: dict[str, str], run_dir: RunDir, processes: int = 1) -> None:
    """Prints all of it to stdout.

    Args:
        given: which keys do not have their default, from `recipe.sources`.
        processes: of the training, one a device.
    """
    _show_values(recipe, given)
    if not Path(recipe.model.base).exists():
        _ask_hub_once()
    console.out.print()
    for name, (state, changes) in plan("eval", recipe, run_dir).items():
        _print(f"{STATES[state]} {'; '.join(changes)}", name)
        if (name, state) == ("prepare", "new"):
            run_dir.inputs(STAGES[name], recipe)  # says which files are not there
    for name in ("sft", "align"):
        if getattr(recipe, name) is not None:
            console.out.print()
            for label, text in examine(name, recipe, run_dir, processes)[0]:
                _print(text, label)


def _ask_hub_once() -> None:
    """Where the Hub does not answer, what is cached must do: the Hub's client would try for a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever client it uses
        constants.HF_HUB_OFFLINE = True


def _show_values(recipe: Recipe, given: dict[str, str]) -> None:
    """Every value by table: those that were given, one a line, then the defaults."""
    here, tables = f'"{Path.cwd()}{os.sep}', defaultdict[str, list[tuple[str, str]]](list)
    for key, value in recipe.settings().items():
        table, _, name = key.rpartition(".")
        value = json.dumps(value, ensure_ascii=False).replace(here, '"./')
        tables[table].append((f"{name} = {value}", given.get(key, "")))
    for table, lines in tables.items():
        console.out.print(f"[{table}]", markup=False)
        for line, source in lines:
            if source:
                console.out.print(f"  {line:<66} ({source})", markup=False)
        if defaults := [line for line, source in lines if not source]:
            _print(", ".join(defaults), "  default:", indent=4)


def _print(text: str, label: str = "", indent: int = 12) -> None:
    begin = f"{label} ".ljust(indent) if label else ""
    options: dict[str, Any] = {
        "break_on_hyphens": False,
        "break_long_words": False,
        "subsequent_indent": " " * indent,
    }
    console.out.print(
        "\n".join(textwrap.wrap(text, 80, initial_indent=begin, **options)), markup=False
    )


def examine(
    name: str, recipe: Recipe, run_dir: RunDir, processes: int = 1
) -> tuple[list[tuple[str, str]], dict[str, float]]:
    """What is known of the stage "sft" or "align" before it runs, and what usually goes wrong with such a one.

    Returns:
        (what, words for a person) a line; and the bytes of each device by what takes them, if the base can be read.
    """
    settings, device = getattr(recipe, name), Group.of_environment().device
    loss = recipe.align.loss if name == "align" else build_loss("sft")
    longest, bounds, passed = recipe.data.max_length, (0, 2**31), 0.0
    known: dict[str, Any] = {"room": device_memory(device)}  # of what `advice` asks
    memory: dict[str, float] = {}
    if plan("prepare", recipe, run_dir)["prepare"][0] == "done":
        stores = open_stores(settings, run_dir)
        longest, whole = (
            longest_sequence(stores),
            np.sort(_lengths(stores[0], "response").sum(axis=1)),
        )
        bounds = (
            int(whole[-1]),
            int(whole[-settings.batch_size :].sum()),
        )  # a step with all metrics reads all of them
        line, passed, of_pairs = _count(recipe, name, run_dir, loss, stores)
        lines, known = [(name, line)], known | of_pairs
    else:
        lines = [(name, "pairs, tokens and steps are known once `tbpo prepare` has read the rows")]
    try:
        policy = policy_on_meta(name, recipe, loss, device)
    except TbpoError as error:
        lines.append(
            (
                "model",
                f"layout, head, reference, memory and time could not be found out: {error.what}",
            )
        )
    else:
        is_sharded, why = choose_sharding(policy, settings.sharding, recipe.model, device)
        if processes > 1:
            lines.append(("processes", f"{processes}, {'fsdp' if is_sharded else 'ddp'}: {why}"))
        lines += _choices(policy, loss, settings.layout, longest)
        memory, tokens = estimate_memory(
            policy, recipe.model, settings, device, processes if is_sharded else 1, bounds
        )
        known |= {
            "weights": sum(p.numel() for p in policy.model.parameters()),
            "memory": sum(memory.values()),
        }
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in memory.items() if size)
        said = f"about {known['memory'] / 1e9:.1f} of {known['room'] / 1e9:.0f} GB on each {device.type}"
        lines.append(("memory", f"{said}, with {tokens:,} tokens at a time: {parts}"))
        if passed:
            needed = operations(policy, settings.activation_checkpointing) / processes
            dtype = policy.autocast or policy.model.dtype
            lines.append(("time", _time(run_dir.stage(name), passed, needed, device, dtype)))
    beta = getattr(loss, "beta", 1.0) / getattr(type(loss)(), "beta", 1.0)
    warnings = advice(name, recipe.model.lora is not None, settings.learning_rate, beta, **known)
    return lines + [("WARNING", warning) for warning in warnings], memory


def policy_on_meta(name: str, recipe: Recipe, loss: Loss, device: torch.device) -> Policy:
    """The policy and all that it is seen beside, as shapes: as `training` would load it for a device.

    Raises:
        TbpoError: if the base's config cannot be read, or LoRA finds no layers.
    """
    model, meta = (
        replace(recipe.model, initial_weights="random", quantization=None),
        torch.device("meta"),
    )
    with meta:
        policy = load_policy(
            replace(recipe, model=model), device, None, not loss.needs <= REFERENCE_FREE, meta
        )
        views = [POSITIVE, NEGATIVE] if "weights" in loss.needs else []
        views += (
            [REFERENCE] if name == "align" and recipe.sft is not None and policy.adapters else []
        )
        for view in views:
            if policy.adapters:
                policy.model.add_adapter(view, policy.adapters[POLICY])
                policy.model.set_adapter(POLICY)
            else:
                policy.frozen[view] = copy.deepcopy(policy.model).requires_grad_(False)
    return policy


def _lengths(store: PairStore, span: str) -> np.ndarray:
    return span_lengths(store, range(len(store)), span)


def _count(
    recipe: Recipe, name: str, run_dir: RunDir, loss: Loss, stores: tuple[PairStore, PairStore]
) -> tuple[str, float, dict[str, Any]]:
    """Of the prepared pairs: a line, the tokens that pass through the model, and what `advice` asks about them."""
    settings, counts = getattr(recipe, name), run_dir.manifest("prepare")["counts"]
    train, held_out = (_lengths(store, loss.span) for store in stores)
    batch = settings.batch_size
    steps = num_steps(len(train), batch, settings.epochs, settings.max_steps)
    visits = steps * batch / len(train)
    prompt, chosen, rejected = train.mean(axis=0)
    line = (
        f"{len(train):,} pairs, {len(held_out):,} held out; {steps:,} steps of {batch}, each pair {visits:.2g} ×, "
        f"{train.sum() * visits:,.0f} tokens; mean tokens of a pair that the loss reads: "
        f"prompt {prompt:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f}"
    )
    cut = sum(
        count["rejected"].get("overlong", 0) + count["noted"].get("cut", 0) for count in counts
    )
    known = {
        "visits": visits,
        "held_out": len(held_out),
        "cut": cut / max(1, sum(count["rows"] for count in counts)),
    }
    if name == "align" and stores[0].has_rejected:
        known["length_ratio"] = stores[0].chosen_lengths.mean() / stores[0].rejected_lengths.mean()
    passed = (
        train.sum() * visits + held_out.sum() * (steps // settings.eval_every + 2) / 2
    )  # an evaluation is forward
    return line, passed, known


def _choices(policy: Policy, loss: Loss, wanted: str, longest: int) -> list[tuple[str, str]]:
    """What the training will say when it has chosen."""
    reference = policy.describe_reference() if policy.has_reference else "none"
    metrics = (
        " (for the metrics only)" if policy.has_reference and loss.needs <= REFERENCE_FREE else ""
    )
    layout, why = choose_layout([policy.model, *policy.frozen.values()], wanted, longest)
    return [
        ("reference", reference + metrics),
        ("head", Scorer.of(policy).describe(loss.needs)),
        ("layout", f"{layout}: {why}; two small pairs will tell whether the weights agree"),
    ]


def _time(
    folder: Path, tokens: float, needed: float, device: torch.device, dtype: torch.dtype
) -> str:
    """How long some tokens take, and what that is based on; a token needs so many operations."""
    seen = [
        line["tokens_per_s"]
        for line in read_metrics(folder / "metrics.jsonl")
        if "tokens_per_s" in line
    ]
    if len(seen) > 1:
        rate, basis = median(seen[1:]), f"the {median(seen[1:]):,.0f} tokens/s of {folder}"
    else:
        products, share = matrix_rate(device, dtype), EFFICIENCY[device.type]
        rate, basis = (
            share * products / needed,
            f"{share} of this {device.type}'s {products / 1e9:,.0f} GFLOP/s",
        )
    minutes = tokens / rate / 60
    said = f"{minutes * 60:.0f} seconds" if minutes < 2 else f"{minutes:.0f} minutes"
    return f"about {said if minutes < 120 else f'{minutes / 60:.0f} hours'} (rough: {basis})"
