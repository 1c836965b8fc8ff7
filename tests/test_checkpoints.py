"""Checkpoints of sharded weights: read by any number of processes, whole, or not at all."""

import errno
import os
import resource
import threading
from contextlib import closing

import psutil
import pytest
import torch
from test_loading import make
from torch.distributed.checkpoint.staging import DefaultStager

from tbpo_cli.model.sharding import Shards, gathered, shard
from tbpo_cli.train.checkpoint import TrainState, kept_checkpoints, load_newest_checkpoint
from tbpo_cli.train.checkpoint_writer import CheckpointWriter
from tbpo_cli.train.group import Group
from tbpo_cli.train.optim import make_moments


def state_of(model, filled_with=None):
    """A model and its moments, all of them with numbers of their own if a seed is given."""
    parameters = dict(model.named_parameters())
    state = TrainState(parameters, torch.optim.AdamW(parameters.values()))
    make_moments(state.optimizer)
    if filled_with is not None:
        torch.manual_seed(filled_with)
        for tensor in state.tensors.values():
            with torch.no_grad():
                tensor.copy_(torch.rand(()) + torch.zeros_like(tensor))
    return state


@pytest.fixture
def sharded(mesh):
    model = make("llama", tie_word_embeddings=True)
    shard(model, Shards(mesh, trains=True))
    return model


def save_checkpoint(folder, step, states, group):
    with closing(CheckpointWriter(folder, states, group)) as writer:
        writer.begin(step)
        writer.finish()


@pytest.fixture
def slow_disk(monkeypatch):
    """An event: until it is set, no thread but this one can make a folder."""
    answers = threading.Event()
    make = os.mkdir

    def wait_and_make(*arguments, **named):
        if threading.current_thread() is not threading.main_thread():
            assert answers.wait(60)
        make(*arguments, **named)

    monkeypatch.setattr(os, "mkdir", wait_and_make)
    yield answers
    answers.set()


def assert_equal(state, other):
    assert state.tensors.keys() == other.tensors.keys()
    for name, tensor in state.tensors.items():
        assert torch.equal(gathered(tensor), gathered(other.tensors[name])), name


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 255
    path.write_bytes(content)


def test_sharded_weights_are_written_in_parts_and_read_sharded_and_whole(tmp_path, sharded):
    written, plain = state_of(sharded, 1), state_of(torch.nn.Linear(3, 2), 2)
    save_checkpoint(tmp_path, 4, {"policy": written, "baseline": plain}, Group())
    (step,) = kept_checkpoints(tmp_path).values()
    names = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert names == {"checkpoint.json", "baseline.safetensors", "policy/shard-00001.safetensors"}
    for model in (sharded, make("llama", tie_word_embeddings=True)):
        found, other = state_of(model), state_of(torch.nn.Linear(3, 2))
        states = {"policy": found, "baseline": other}
        assert load_newest_checkpoint(tmp_path, states, Group()) == 4
        assert_equal(found, written)
        assert_equal(other, plain)
    assert load_newest_checkpoint(tmp_path, {"policy": written}, Group()) == 0, "incomplete"


def test_a_checkpoint_of_whole_weights_is_read_sharded(tmp_path, sharded):
    written = state_of(make("llama", tie_word_embeddings=True), 1)
    save_checkpoint(tmp_path, 4, {"policy": written}, Group())
    found = state_of(sharded)
    assert load_newest_checkpoint(tmp_path, {"policy": found}, Group()) == 4
    assert_equal(found, written)


@pytest.mark.parametrize("fault", ["damaged", "is missing"])
def test_a_damaged_part_is_named_and_the_checkpoint_before_is_taken(
    tmp_path, sharded, capsys, fault
):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"policy": state_of(sharded, step)}, Group())
    assert [*kept_checkpoints(tmp_path)] == [2, 3]
    (part,) = (tmp_path / "step-3/policy").iterdir()
    flip_a_byte(part) if fault == "damaged" else part.unlink()
    found = state_of(sharded)
    assert load_newest_checkpoint(tmp_path, {"policy": found}, Group()) == 2
    assert "step-3 is skipped" in (said := capsys.readouterr().err) and part.name in said
    assert_equal(found, state_of(make("llama", tie_word_embeddings=True), 2))


def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path, sharded):
    """By a limit on the size of files, as a quota."""
    state = {"policy": state_of(sharded, 1)}
    save_checkpoint(tmp_path, 1, state, Group())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="large") as caught:
            save_checkpoint(tmp_path, 2, state, Group())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "store"}
    assert load_newest_checkpoint(tmp_path, state, Group()) == 1


def test_a_checkpoint_is_written_without_a_copy_where_memory_runs_out_for_that(
    tmp_path, sharded, monkeypatch, capsys
):
    def stage(*_arguments, **_named):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(DefaultStager, "stage", stage)
    state = state_of(sharded, 1)
    with closing(CheckpointWriter(tmp_path / "steps", {"policy": state}, Group())) as writer:
        writer.begin(1)
        assert [*kept_checkpoints(tmp_path / "steps")] == [1], "the training waits for it"
    assert "out of memory for a copy" in capsys.readouterr().err
    found = state_of(sharded, 2)
    assert load_newest_checkpoint(tmp_path / "steps", {"policy": found}, Group()) == 1
    assert_equal(found, state_of(make("llama", tie_word_embeddings=True), 1))


@pytest.mark.parametrize("is_sharded", [True, False])
def test_the_training_goes_on_while_what_it_had_at_a_checkpoint_is_written(
    tmp_path, sharded, slow_disk, is_sharded
):
    """And the next checkpoint waits for the one before it."""
    model = sharded if is_sharded else make("llama", tie_word_embeddings=True)
    state = state_of(model, 1)
    steps = tmp_path / "steps"
    with closing(CheckpointWriter(steps, {"policy": state}, Group())) as writer:
        writer.begin(1)
        with torch.no_grad():
            for tensor in state.tensors.values():
                tensor.add_(1)
        writer.advance()
        assert not steps.exists()
        slow_disk.set()
        writer.begin(2)
        assert 1 in kept_checkpoints(steps)
        writer.finish()
    assert (
        [*kept_checkpoints(steps)]
        == [1, 2]
        == sorted(int(path.name.removeprefix("step-")) for path in steps.iterdir())
    )
    found = state_of(make("llama", tie_word_embeddings=True))
    found.restore(steps / "step-1", "policy")
    assert_equal(found, state_of(make("llama", tie_word_embeddings=True), 1))


def test_a_checkpoint_is_there_after_a_step_in_which_it_was_written(tmp_path, sharded):
    """Without a next one, or an end, that waits for it."""
    with closing(CheckpointWriter(tmp_path, {"policy": state_of(sharded, 1)}, Group())) as writer:
        writer.begin(1)
        for _ in range(1000):
            writer.advance()
            if kept_checkpoints(tmp_path):
                break
            threading.Event().wait(0.01)
        assert [*kept_checkpoints(tmp_path)] == [1]


def test_without_memory_for_a_copy_the_training_waits(tmp_path, sharded, monkeypatch, capsys):
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    written = state_of(sharded, 1)
    with closing(CheckpointWriter(tmp_path, {"policy": written}, Group())) as writer:
        writer.begin(1)
        assert [*kept_checkpoints(tmp_path)] == [1]
    assert capsys.readouterr().err.count("the training waits while checkpoints are written") == 1
    found = state_of(sharded)
    found.restore(tmp_path / "step-1", "policy")
    assert_equal(found, state_of(make("llama", tie_word_embeddings=True), 1))


def test_what_a_killed_process_has_left_of_a_checkpoint_is_removed(tmp_path, sharded):
    (tmp_path / ".step-7.partial/policy").mkdir(parents=True)
    with closing(CheckpointWriter(tmp_path, {"policy": state_of(sharded)}, Group())):
        assert not list(tmp_path.glob(".*"))
