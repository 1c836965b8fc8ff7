"""Whole commands on each device, in processes of their own: whole, killed, sharded, in 4 bits."""

import json
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change_recipe
from devices import DEVICES, ON_GPU, in_a_process, on_device
from one_process import train_sharded
from safetensors.torch import load_file
from test_checkpoints import state_of
from test_processes import metrics, wait_for_checkpoint

from tbpo_cli.train.checkpoint_writer import CheckpointWriter
from tbpo_cli.train.group import Group

RECIPES = Path(__file__).parents[2] / "recipes"
# A GPU adds up in an order of its own each time.
TOLERANCE = {"cpu": 1e-6, "cuda": 2e-2}


def on_gpu(*losses):
    """Cases of more losses than a CPU takes time for."""
    return [pytest.param(loss, "cuda", marks=ON_GPU.marks) for loss in losses]


def finish(start, device, *arguments):
    done = start(*arguments, *on_device(device)).finish()
    assert done.returncode == 0, done.stderr
    return done


def adapter(run):
    return load_file(run / "align/adapter/adapter_model.safetensors")


def assert_near(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        gap = np.linalg.norm(np.asarray(theirs[name]) - np.asarray(weight))
        assert gap <= tolerance * (1e-3 + np.linalg.norm(weight)), name


@pytest.mark.parametrize(
    ("loss", "device"), [("tbpo_q", "cpu"), *on_gpu("tbpo_a", "tbpo_q", "dpo")]
)
def test_a_training_that_is_killed_goes_on_to_the_same_end(
    recipe_file, tmp_path, start, loss, device
):
    change_recipe(recipe_file, align={"max_steps": 12, "loss": {"name": loss}})
    finish(start, device, "align", recipe_file, "--run-dir", tmp_path / "whole")
    killed = start("align", recipe_file, "--run-dir", tmp_path / "run", *on_device(device))
    wait_for_checkpoint(tmp_path / "run", killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = finish(start, device, "align", recipe_file, "--run-dir", tmp_path / "run")
    assert "going on from step" in done.stderr
    assert_near(adapter(tmp_path / "whole"), adapter(tmp_path / "run"), TOLERANCE[device])
    assert len(metrics(tmp_path / "run")) == len(metrics(tmp_path / "whole"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_holds_what_was_on_the_device_when_it_was_begun(tmp_path, device):
    """It is copied, through pinned memory from a GPU, twice into the same copy."""
    state = state_of(torch.nn.Linear(300, 200).to(device), 1)
    group = Group(device=torch.device(device))
    with closing(CheckpointWriter(tmp_path, {"policy": state}, group)) as writer:
        for step in (1, 2):
            writer.begin(step)
            with torch.no_grad():
                for tensor in state.tensors.values():
                    tensor.add_(1)
        writer.finish()
    found, expected = (state_of(torch.nn.Linear(300, 200), seed) for seed in (None, 1))
    for step in (1, 2):
        found.restore(tmp_path / f"step-{step}", "policy")
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name], tensor + (step - 1)), name


@pytest.mark.parametrize("trained", ["adapter", "all weights"])
@pytest.mark.parametrize(("loss", "device"), [("dpo", "cpu"), *on_gpu("tbpo_a", "dpo")])
def test_weights_that_one_process_shards_are_trained_as_whole_ones(
    recipe_file, tmp_path, loss, trained, device
):
    sets = (f"align.loss.name={loss}", "model.dtype=float32", "align.learning_rate=1e-4")
    sets += ("model.lora=none",) if trained == "all weights" else ("model.lora.dropout=0.0",)
    (whole, _), (sharded, _) = (
        in_a_process(train_sharded, device, shards, recipe_file, tmp_path, sets)
        for shards in (False, True)
    )
    assert any(np.any(weight) for weight in whole.values())
    assert_near(whole, sharded, TOLERANCE[device])


@pytest.mark.parametrize("device", DEVICES)
def test_the_quickstart_from_its_rows_to_a_published_folder(tmp_path, start, device):
    """On the CPU, where other tests run all of it, with two steps and few answers."""
    recipe, run = RECIPES / "quickstart.toml", tmp_path / "run"
    few = ("align.max_steps=2", "eval.diversity_prompts=0", "sample.max_new_tokens=8")
    few += ("sample.max_prompts=4",)
    sets = [part for one in few for part in ("--set", one)] if device == "cpu" else []
    for stage in ("align", "sample", "eval"):
        finish(start, device, stage, recipe, "--run-dir", run, *sets)
    done = start("push", recipe, "--run-dir", run, *sets, "--to", tmp_path / "published").finish()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "published/README.md").exists()
    manifest = json.loads((run / "align/manifest.json").read_text())
    assert (manifest["device"] == "cpu") == (device == "cpu")
    assert list((run / "sample").glob("samples.jsonl"))
    lines = [line for line in metrics(run) if line["split"] == "eval"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    if device == "cuda":
        assert lines[-1]["accuracy"] > 0.7


@pytest.mark.parametrize("device", [ON_GPU])  # bitsandbytes trains on a GPU alone
@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q", "dpo", "simpo"])
def test_an_adapter_on_a_base_of_4_bits_learns(recipe_file, tmp_path, start, loss, device):
    pytest.importorskip("bitsandbytes")
    align = {"loss": {"name": loss}, "learning_rate": 1e-2}
    change_recipe(recipe_file, model={"quantization": "nf4"}, align=align)
    finish(start, device, "align", recipe_file, "--run-dir", tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["split"] == "eval"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
