"""Checkpoints: a folder of safetensors and JSON, complete or not there at all.

Of sharded weights each process writes its own part (torch.distributed.checkpoint), which processes
of any number read again.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from tbpo_cli import console
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.sharding import gathered, placed_like
from tbpo_cli.runs.files import read_sealed, sha256, write_sealed
from tbpo_cli.train.group import Group, side_channel

KEPT = 2  # the newest, and the one before it in case it is damaged


@dataclass(frozen=True)
class TrainState:
    """Parameters that are trained, and their optimizer: what a checkpoint holds."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients together, a scalar; all processes call it."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return gathered(torch.nn.utils.get_total_norm(gradients))

    @property
    def is_sharded(self) -> bool:
        """Whether this process has a part of the parameters."""
        return any(isinstance(each, DTensor) for each in self.parameters.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by "parameter|NAME" and "optimizer|NAME|KEY"."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameter|{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer|{name}|{key}"] = value
        return tensors

    def save(self, folder: Path, name: str, group: Group) -> list[Path]:
        """Writes the file NAME.safetensors; of sharded parameters, files in the folder NAME.

        Returns:
            The files that this process has written.

        Raises:
            OSError: if there is no space on the disk; of sharded parameters, in all processes.
        """
        if self.is_sharded:
            return _save_shards(self.tensors, folder / name, group)
        if not group.is_main:
            return []
        path = folder / f"{name}.safetensors"
        _save({key: each.cpu().contiguous() for key, each in self.tensors.items()}, path)
        return [path]

    def restore(self, folder: Path, name: str) -> None:
        """Reads what `save` wrote, sharded like this or otherwise."""
        if (folder / name).is_dir():
            _load_shards(self.tensors, folder / name)
            return
        with safe_open(folder / f"{name}.safetensors", "pt") as file, torch.no_grad():
            for key in file.keys():  # noqa: SIM118 - no dict
                kind, parameter_name, *state = key.split("|")
                parameter = self.parameters[parameter_name]
                value = file.get_tensor(key)
                if kind == "parameter":
                    parameter.copy_(placed_like(value, parameter))
                else:  # torch keeps "step" on the CPU, and the moments beside the parameter
                    value = placed_like(value, parameter) if value.ndim else value
                    self.optimizer.state[parameter][state[0]] = value


def bytes_on_disk(num_trained: int, num_moments: int, num_kept: int = 0) -> float:
    """Bytes that a training will still write: its checkpoints and the result, in fp32.

    Args:
        num_trained: numbers that are trained.
        num_moments: numbers of the optimizer's state for each of them.
        num_kept: checkpoints that are there. KEPT of them stay while the next one is written.
    """
    num_written = KEPT + 1 - min(num_kept, KEPT)
    return 4.0 * num_trained * (num_written * (1 + num_moments) + 1)


def save_checkpoint(folder: Path, step: int, states: dict[str, TrainState], group: Group) -> None:
    """Writes `folder/step-N`; all but the newest KEPT are removed. All processes call it.

    1. All files are written to a hidden folder and synced to the disk, each by one process.
    2. Each process hashes its own files.
    3. The first one writes the hashes, and renames the folder.

    Raises:
        OSError: if there is no space on the disk; the checkpoints that were there stay.
    """
    final = folder / f"step-{step}"
    partial = folder / f".step-{step}.partial"
    try:
        if group.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        group.gather(None)
        hashes: dict[str, str] = {}
        for written in group.gather(_write(partial, states, group)):
            if isinstance(written, OSError):
                raise written
            hashes |= written
        if not group.is_main:
            return
        for name, state in states.items():
            if state.is_sharded:
                _sync(partial / name)
        write_sealed(partial / "checkpoint.json", {"step": step, "files": hashes})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
    finally:
        if group.is_main:
            shutil.rmtree(partial, ignore_errors=True)
    for old in list(kept_checkpoints(folder).values())[:-KEPT]:
        shutil.rmtree(old)


def _write(folder: Path, states: dict[str, TrainState], group: Group) -> dict[str, str] | OSError:
    """The hashes of the files that this process has written; or an error of its disk."""
    hashes = {}
    try:
        for name, state in states.items():
            for path in state.save(folder, name, group):
                _sync(path)
                hashes[str(path.relative_to(folder))] = sha256(path)
    except OSError as error:
        return error
    return hashes


def _save_shards(tensors: dict[str, Tensor], folder: Path, group: Group) -> list[Path]:
    """Writes this process's part of some tensors; of those that all have whole, one writes each."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(tensors, storage_writer=writer, process_group=side_channel())
    except CheckpointException as fault:  # in all processes, with the errors of each
        error = next(iter(fault.failures.values()))[0]
        if isinstance(error, SafetensorError):
            raise _system_error(error, folder) from None
        raise error from None
    return sorted(folder.glob(f"shard-{group.rank + 1:05d}-*.safetensors"))


def _load_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Reads this process's part of some tensors, in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a load that needs no other process
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise _system_error(error, path) from None


def _system_error(error: SafetensorError, path: Path) -> Exception:
    """The system's error, which is in the text of safetensors' only; that one if there is none."""
    if (number := re.search(r"os error (\d+)", str(error))) is None:
        return error
    return OSError(int(number.group(1)), os.strerror(int(number.group(1))), str(path))


def load_newest_checkpoint(folder: Path, states: dict[str, TrainState], group: Group) -> int:
    """Restores the newest complete checkpoint and returns its step, 0 if there is none.

    All processes call it, and see the same checkpoints. A damaged one is skipped, with a message.
    """
    for step, path in reversed(kept_checkpoints(folder).items()):
        faults = [fault for fault in group.gather(_fault(path, states, group)) if fault]
        if faults:
            console.say(f"{path} is skipped: {faults[0]}")
            continue
        for name, state in states.items():
            state.restore(path, name)
        return step
    return 0


def _fault(path: Path, states: dict[str, TrainState], group: Group) -> str:
    """What is wrong with a checkpoint, in words; "" if nothing.

    Of the files of sharded parameters each process reads and checks its share, which are its own
    where as many processes have written them.
    """
    try:
        listed: dict[str, str] = read_sealed(path / "checkpoint.json").get("files", {})
        shards = sorted(name for name in listed if "/" in name)
        names = {name.partition("/")[0].removesuffix(".safetensors") for name in listed}
        if names != set(states):
            return "it is incomplete"
        whole = [name for name in listed if "/" not in name]
        for name in [*whole, *group.share(shards)]:
            if sha256(path / name) != listed[name]:
                return f"{name} is damaged"
    except (OSError, TbpoError) as error:
        return str(error.args[0] if isinstance(error, TbpoError) else error)
    return ""


def kept_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their step, the newest last."""
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
