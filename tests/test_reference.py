"""log π_ref, found out in the first epoch and read in the others."""

import json

import numpy as np
import pytest
import torch
from conftest import run_stage
from safetensors.torch import load_file

from tbpo_cli.batch.reference import ReferenceCache
from tbpo_cli.core import LOSSES, build_loss
from tbpo_cli.model.scoring import from_reference_logps

# 10 steps of 8 pairs on 40 pairs are two epochs; LoRA dropout is on
TWO_EPOCHS = (
    "align.max_steps=10",
    "align.log_every=5",
    "align.checkpoint_every=3",
    "align.learning_rate=1e-2",
)
QUIET = (*TWO_EPOCHS, "align.log_every=100")
NUM_PAIRS = 40


def values_of(run):
    (path,) = (run / "reference").iterdir()
    return path, np.fromfile(path, dtype=np.float32)[:-NUM_PAIRS]  # the checksums follow


def train_losses(run):
    lines = [json.loads(line) for line in (run / "align/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_the_losses_that_need_nothing_else_of_the_reference_say_so():
    names = {name for name in LOSSES if from_reference_logps(build_loss(name).needs)}
    assert names == {
        "dpo",
        "dpo_norm",
        "robust",
        "ipo",
        "hinge",
        "apo_zero",
        "apo_down",
        "dpop",
        "bpo",
        "wpo",
        "ld_dpo",
        "d2po",
        "tis_dpo",
        "tgdpo",
        "tbpo_q",
    }


@pytest.mark.parametrize(
    ("loss", "dropout"),
    [("dpo", 0.1), ("tbpo_q", 0.0)],  # whole responses; aligned tokens and a baseline
)
def test_a_cached_reference_gives_the_trajectory_of_a_live_one(
    recipe_file, tmp_path, loss, dropout
):
    """A step that reports all metrics asks the reference itself, on whole responses.

    For a loss that reads aligned tokens, these are other rows, and so another dropout.
    """
    settings = (f"align.loss.name={loss}", f"model.lora.dropout={dropout}")
    cached = run_stage("align", recipe_file, tmp_path / "cached", *settings, *QUIET)
    live = run_stage(
        "align", recipe_file, tmp_path / "live", *settings, *TWO_EPOCHS, "align.log_every=1"
    )
    assert not np.isnan(values_of(cached)[1]).all() and np.isnan(values_of(live)[1]).all()
    assert train_losses(cached) == pytest.approx(train_losses(live), rel=1e-5, abs=1e-6)
    first, second = (
        load_file(run / "align/adapter/adapter_model.safetensors") for run in (cached, live)
    )
    for name, weight in second.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-3, atol=1e-4)


def test_the_second_epoch_and_a_restart_read_what_is_known(recipe_file, tmp_path):
    """Two epochs without a step that reports all metrics, which would leave the file alone: then
    all values are known. A restart with another β trains on them, as if it had found them out
    itself."""
    run = run_stage("align", recipe_file, tmp_path / "run", "align.loss.name=dpo", *QUIET)
    _, before = values_of(run)
    assert not np.isnan(before).any() and (before < 0).all()
    settings = ("align.loss={name = 'dpo', beta = 0.2}", *QUIET)
    restarted = run_stage("align", recipe_file, tmp_path / "run", *settings, restart=True)
    np.testing.assert_array_equal(values_of(restarted)[1], before)
    fresh = run_stage("align", recipe_file, tmp_path / "fresh", *settings)
    assert train_losses(fresh) == pytest.approx(train_losses(restarted), rel=1e-5, abs=1e-6)


def test_one_epoch_or_another_need_makes_no_file(recipe_file, tmp_path):
    one_epoch = run_stage(
        "align", recipe_file, tmp_path / "one", "align.loss.name=dpo", "align.max_steps=5"
    )
    whole = run_stage(
        "align", recipe_file, tmp_path / "whole", "align.loss.name=tbpo_a", *TWO_EPOCHS
    )
    assert not any((run / "reference").exists() for run in (one_epoch, whole))


def test_the_file_is_named_by_what_it_depends_on(recipe_file, tmp_path):
    two_steps = (
        "align.loss.name=dpo",
        "align.batch_pairs=40",
        "align.max_steps=2",
    )  # of all 40 pairs: two epochs
    names = {
        override: values_of(
            run_stage("align", recipe_file, tmp_path / str(number), *two_steps, override)
        )[0].name
        for number, override in enumerate(
            (
                "align.loss.beta=0.2",
                "model.lora.r=2",
                "align.loss.name=ipo",
                "align.loss.name=tbpo_q",
                "align.reverse=true",
                "model.dtype=bfloat16",
            )
        )
    }
    same = {"align.loss.beta=0.2", "model.lora.r=2", "align.loss.name=ipo"}
    assert len({names[override] for override in same}) == 1, (
        "neither β nor the adapter's size touches the reference"
    )
    assert len(set(names.values())) == len(names) - len(same) + 1


def test_a_known_value_never_changes_and_pairs_keep_their_places(tmp_path):
    lengths = np.array([(3, 2, 1), (4, 1, 3), (2, 2, 2)])
    cache = ReferenceCache(tmp_path / "folder/values.f32", lengths)
    cache.write((2, 0), torch.arange(7.0))  # chosen of 2, chosen of 0, rejected of 2, rejected of 0
    again = ReferenceCache(tmp_path / "folder/values.f32", lengths)
    assert again.read((0,)).tolist() == [2, 3, 6] and again.read((2,)).tolist() == [0, 1, 4, 5]
    assert again.read((1,)).isnan().all()
    again.write((1, 0), torch.arange(10.0, 17.0))
    assert cache.read((0, 1)).tolist() == [2, 3, 10, 6, 13, 14, 15]


@pytest.mark.parametrize("damage", ["zeros", "flipped bit", "another pair's", "short"])
def test_values_that_are_not_those_that_were_written_are_unknown(tmp_path, damage):
    """As after a power cut: pages of zeros, old pages, a file that was cut."""
    path = tmp_path / "values.f32"
    lengths = np.array([(3, 2, 2), (4, 2, 2), (2, 2, 2)])
    cache = ReferenceCache(path, lengths)
    cache.write((0, 1, 2), -torch.arange(1.0, 13.0))
    cache.sync()
    content = bytearray(path.read_bytes())
    if damage == "zeros":
        content[16:32] = bytes(16)
    elif damage == "flipped bit":
        content[18] ^= 1
    elif damage == "another pair's":
        content[16:32], content[52:56] = content[:16], content[48:52]
    else:
        content = content[:-8]
    path.write_bytes(content)
    again = ReferenceCache(path, lengths)
    assert again.read((1,)).isnan().all()
    if damage != "short":
        assert not again.read((0, 2)).isnan().any()
    again.write((1,), torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    assert ReferenceCache(path, lengths).read((1,)).tolist() == [-1, -2, -3, -4]
