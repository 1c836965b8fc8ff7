"""Checkpoints: a folder of safetensors and JSON, complete or not there at all."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tbpo_cli import console
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.sharding import gather_all, gathered, placed_like
from tbpo_cli.runs.files import read_sealed, sha256, write_sealed

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

    def state(self, keep: bool) -> dict[str, Tensor]:
        """Whole tensors on the CPU by "parameter|NAME" and "optimizer|NAME|KEY".

        All processes call it; those without `keep` get an empty dict.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameter|{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer|{name}|{key}"] = value
        return {name: tensor.contiguous() for name, tensor in gather_all(tensors, keep).items()}

    def restore(self, path: Path) -> None:
        """Reads what `state` gave, tensor by tensor, into the parameters and the optimizer."""
        with safe_open(path, "pt") as file, torch.no_grad():
            for key in file.keys():  # noqa: SIM118 - no dict
                kind, name, *state = key.split("|")
                parameter = self.parameters[name]
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


def save_checkpoint(folder: Path, step: int, states: dict[str, TrainState], writes: bool) -> None:
    """Writes `folder/step-N`; all but the newest KEPT are removed. All processes call it.

    The files are written to a hidden folder and synced to the disk, then that is renamed.

    Raises:
        OSError: if there is no space on the disk; the checkpoints that were there stay.
    """
    tensors_of = {name: state.state(writes) for name, state in states.items()}
    if not writes:
        return
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, tensors in tensors_of.items():
            path = partial / f"{name}.safetensors"
            _save(tensors, path)
            _sync(path)
        hashes = {path.name: sha256(path) for path in sorted(partial.glob("*.safetensors"))}
        write_sealed(partial / "checkpoint.json", {"step": step, "files": hashes})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in list(kept_checkpoints(folder).values())[:-KEPT]:
        shutil.rmtree(old)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # the system's error is in its text only
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number.group(1)), os.strerror(int(number.group(1))), str(path)) from None


def load_newest_checkpoint(folder: Path, states: dict[str, TrainState]) -> int:
    """Restores the newest complete checkpoint and returns its step, 0 if there is none.

    A damaged one is skipped, with a message.
    """
    for step, path in reversed(kept_checkpoints(folder).items()):
        try:
            listed = read_sealed(path / "checkpoint.json").get("files", {})
            if set(listed) != {f"{name}.safetensors" for name in states}:
                raise ValueError("it is incomplete")
            for file, digest in listed.items():
                if sha256(path / file) != digest:
                    raise ValueError(f"{file} is damaged")
        except (OSError, ValueError, TbpoError) as error:
            console.say(
                f"{path} is skipped: {error.args[0] if isinstance(error, TbpoError) else error}"
            )
            continue
        for name, state in states.items():
            state.restore(path / f"{name}.safetensors")
        return step
    return 0


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
