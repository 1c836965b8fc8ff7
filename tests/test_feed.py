"""The input of a training: the token budget, memory that runs out, and batches collated ahead."""

import threading
from collections import namedtuple
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import run_stage

from tbpo_cli.batch.batches import span_lengths
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.core import build_loss
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.load import load_policy
from tbpo_cli.train import loop
from tbpo_cli.train.feed import Prefetcher
from tbpo_cli.train.group import Group
from tbpo_cli.train.run import TrainingRun

OUT_OF_MEMORY = {
    "driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "cublas on a full GPU": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
    ),
}


def train(recipe_file, run, *overrides, max_tokens=None, error=None):
    """`tbpo align` where micro-batches of more than `max_tokens` fail; returns the weights."""
    recipe = load_recipe(recipe_file, ("model.lora.dropout=0.0", "align.layout=padded", *overrides))
    run_stage("prepare", recipe_file, run)
    stores = [PairStore(run / "prepare" / split) for split in ("train", "eval")]
    policy = load_policy(recipe, torch.device("cpu"), None, with_reference=True)

    def allocate(_module, inputs):
        if max_tokens is not None and inputs[0].numel() > max_tokens:
            raise error

    policy.model.get_input_embeddings().register_forward_pre_hook(allocate)
    (run / "align").mkdir(exist_ok=True)
    loop.train(TrainingRun(policy, recipe.align.loss, recipe.align, *stores, run / "align", 0))
    return {name: p.detach() for name, p in policy.trained.items()}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_budget_and_repeats_the_step_with_the_same_result(
    recipe_file, tmp_path, capsys, kind
):
    """A step has some 400 tokens; the device holds 200, so the budget falls from 1024 to 128 in the
    first evaluation. The weights are those of a device that holds all."""
    whole = train(recipe_file, tmp_path / "whole")
    assert "out of memory" not in capsys.readouterr().err
    cut = train(recipe_file, tmp_path / "cut", max_tokens=200, error=OUT_OF_MEMORY[kind])
    said = capsys.readouterr().err
    assert (
        "the same step again with max_tokens_per_device = 256" in said
        and said.count("out of memory") == 3
    )
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ((), "activation_checkpointing"),
        (("align.max_tokens_per_device=500",), 'max_tokens_per_device = "auto"'),
    ],
)
def test_a_pair_that_does_not_fit_and_a_budget_of_the_recipe_are_errors_that_name_a_fix(
    recipe_file, tmp_path, settings, fix
):
    with pytest.raises(TbpoError, match="out of memory") as error:
        train(recipe_file, tmp_path / "run", *settings, max_tokens=10, error=OUT_OF_MEMORY["gpu"])
    assert fix in error.value.fix and error.value.exit_code == 2


@pytest.mark.parametrize(
    ("place", "name"), [(torch.nn.utils, "clip_grad_norm_"), (torch.optim.AdamW, "step")]
)
def test_clipping_and_updating_are_done_once_more_if_memory_ran_out_before_anything_changed(
    recipe_file, tmp_path, monkeypatch, capsys, place, name
):
    whole = train(recipe_file, tmp_path / "whole")
    own = getattr(place, name)
    calls = []

    def fail_once(*arguments, **named):
        calls.append(name)
        if len(calls) == 3:
            raise OUT_OF_MEMORY["gpu"]
        return own(*arguments, **named)

    monkeypatch.setattr(place, name, fail_once)
    again = train(recipe_file, tmp_path / "again")
    assert capsys.readouterr().err.count("once more") == 1
    for weight, other in zip(whole.values(), again.values(), strict=True):
        assert torch.equal(weight, other)


def test_an_update_that_fails_half_way_ends_and_the_same_command_goes_on_with_the_same_result(
    recipe_file, tmp_path, monkeypatch
):
    """In the third step: to update all of the weights again would be wrong for half of them."""
    often = "align.checkpoint_every=1"
    whole = train(recipe_file, tmp_path / "whole", often)
    calls = []

    def fail_half_way(optimizer):
        calls.append(1)
        (group,) = optimizer.param_groups
        every = group["params"]
        group["params"] = every[: len(every) // 2] if len(calls) == 4 else every
        update(optimizer)
        group["params"] = every
        if len(calls) == 4:
            raise OUT_OF_MEMORY["gpu"]

    update = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", fail_half_way)
    with pytest.raises(TbpoError, match="out of memory") as error:
        train(recipe_file, tmp_path / "run", often)
    assert error.value.where == "the optimizer's step" and len(calls) == 4
    # The checkpoint of the second step may still be being written.
    assert error.value.fix.startswith("the same command goes on from step ")
    assert ", with max_tokens_per_device = 512; " in error.value.fix
    monkeypatch.undo()
    gone_on = train(recipe_file, tmp_path / "run", often)
    for weight, other in zip(whole.values(), gone_on.values(), strict=True):
        assert torch.equal(weight, other)


def test_too_little_memory_for_the_moments_is_reported_before_the_first_step(
    recipe_file, tmp_path, monkeypatch
):
    def allocate(_optimizer):
        raise OUT_OF_MEMORY["gpu"]

    monkeypatch.setattr(torch.optim.AdamW, "step", allocate)
    with pytest.raises(TbpoError, match="out of memory") as error:
        train(recipe_file, tmp_path / "run")
    assert "moments" in error.value.where
    assert "model.lora" in error.value.fix
    assert not (tmp_path / "run/align/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("wanted", "total", "is_on"),
    [("auto", 10**12, False), ("auto", 10**5, True), (False, 10**5, False), (True, 10**12, True)],
)
def test_activations_are_computed_again_where_the_longest_pair_does_not_fit_otherwise(
    recipe_file, tmp_path, monkeypatch, capsys, wanted, total, is_on
):
    """On a machine with a terabyte, and on one with 100 kB."""
    memory = namedtuple("memory", "total")(total)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    run_stage("prepare", recipe_file, tmp_path / "run")
    settings = replace(load_recipe(recipe_file).align, activation_checkpointing=wanted)
    stores = [PairStore(tmp_path / "run/prepare" / split) for split in ("train", "eval")]
    policy = load_policy(load_recipe(recipe_file), torch.device("cpu"), None, with_reference=True)
    loop.build_stepper(TrainingRun(policy, settings.loss, settings, *stores, tmp_path, 0))
    layers = policy.model.get_base_model().model.layers
    assert {layer.gradient_checkpointing for layer in layers} == {is_on}
    said = capsys.readouterr().err
    assert ("would not fit otherwise" in said) == (wanted == "auto" and is_on)


def test_other_errors_are_not_taken_for_a_lack_of_memory(recipe_file, tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        train(recipe_file, tmp_path / "run", max_tokens=10, error=RuntimeError("a bug"))


def test_a_step_is_divided_by_the_lengths_of_its_pairs(recipe_file, tmp_path):
    """40 pairs on four processes: together the step's, of 1,664 tokens; each has about 416.

    In turn, by rank, they have 408 to 424.
    """
    run_stage("prepare", recipe_file, tmp_path / "run")
    recipe = load_recipe(recipe_file, ("align.batch_pairs=40", "align.loss.name=dpo"))
    stores = [PairStore(tmp_path / "run/prepare" / split) for split in ("train", "eval")]
    policy = load_policy(recipe, torch.device("cpu"), None, with_reference=True)
    run = TrainingRun(policy, recipe.align.loss, recipe.align, *stores, tmp_path, 0)
    stepper = loop.build_stepper(run)
    whole = [index for batch in stepper.collate(0, 10_000) for index in batch.indices]
    parts = []
    for rank in range(4):
        stepper.run = replace(run, group=Group(rank, 4))
        parts.append(stepper.collate(0, 10_000))
    assert sorted(i for part in parts for batch in part for i in batch.indices) == sorted(whole)
    loads = [sum(batch.num_tokens for batch in part) for part in parts]
    assert max(loads) - min(loads) < 5


@pytest.mark.parametrize(
    ("loss", "spans"),
    [
        ("tbpo_a", ("aligned", "response")),
        ("dpo", ("response", "response")),
        ("sft", ("chosen", "chosen")),
    ],
)
def test_a_step_reads_what_the_loss_does_and_one_that_reports_whole_responses(
    recipe_file, tmp_path, loss, spans
):
    """With log_every = 2 the first step reports nothing, and the second reports."""
    run_stage("prepare", recipe_file, tmp_path / "run")
    recipe = load_recipe(recipe_file)
    stores = [PairStore(tmp_path / "run/prepare" / split) for split in ("train", "eval")]
    policy = load_policy(recipe, torch.device("cpu"), None, with_reference=True)
    run = TrainingRun(policy, build_loss(loss), recipe.align, *stores, tmp_path, 0)
    stepper = loop.build_stepper(run)
    for number, span in enumerate(spans):
        batches = stepper.collate(number, 10_000)
        pairs = [index for batch in batches for index in batch.indices]
        num_tokens = sum(batch.tokens.numel() for batch in batches)
        assert len(pairs) == 8
        assert num_tokens == span_lengths(stores[0], pairs, span)[:, 1:].sum()


def test_the_next_step_is_made_while_this_one_is_computed_and_only_as_it_is_wanted():
    made, here = [], threading.get_ident()

    def collate_step(step, tokens):
        made.append((step, tokens, threading.get_ident() != here))
        return [step * tokens]

    ahead = Prefetcher(collate_step)
    assert ahead.batches(5, 100) == [500] and ahead.batches(6, 100) == [600]
    assert ahead.batches(6, 50) == [300], "the same step with another budget"
    assert ahead.batches(7, 50) == [350]
    ahead.close()
    assert made[:2] == [(5, 100, True), (6, 100, True)] and (6, 50, True) in made
    assert [entry[:2] for entry in made].count((7, 50)) == 1
