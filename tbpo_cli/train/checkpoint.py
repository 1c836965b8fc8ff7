"""Checkpoints: a folder of safetensors and JSON, complete or not there at all."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tbpo_cli.errors import TbpoError
from tbpo_cli.files import read_sealed, sha256, write_sealed


@dataclass(frozen=True)
class Trainee:
    """A set of parameters with its optimizer; what a checkpoint holds of it."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Tensor]:
        """Everything as flat tensors: "parameter|NAME" and "optimizer|NAME|KEY"."""
        tensors = {f"parameter|{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer|{name}|{key}"] = value
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, in place."""
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter|{name}"])
            prefix = f"optimizer|{name}|"
            self.optimizer.state[parameter] = {
                # torch keeps "step" on the CPU and the moments beside the parameter
                key.removeprefix(prefix): value if value.ndim == 0 else value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }


def save_checkpoint(folder: Path, step: int, trainees: dict[str, Trainee], keep: int) -> None:
    """Writes `folder/step-N`: beside first, to the disk, then renamed. The newest `keep` stay.

    Raises:
        OSError: if there is no room; the checkpoints that were there are as they were.
    """
    final = folder / f"step-{step}"
    partial = folder / f".step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, trainee in trainees.items():
            path = partial / f"{name}.safetensors"
            _save(trainee.state(), path)
            _sync(path)
        hashes = {path.name: sha256(path) for path in sorted(partial.glob("*.safetensors"))}
        write_sealed(partial / "checkpoint.json", {"step": step, "files": hashes})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in sorted(_steps(folder))[:-keep]:
        shutil.rmtree(folder / f"step-{old}")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its text is all that is left of the system's error
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number.group(1)), os.strerror(int(number.group(1))), str(path)) from None


def load_newest_checkpoint(folder: Path, trainees: dict[str, Trainee]) -> tuple[int, list[str]]:
    """Restores the newest whole checkpoint.

    Returns:
        Its step (0 if there is none), and a line for every damaged one that was skipped.
    """
    skipped = []
    for step in sorted(_steps(folder), reverse=True):
        path = folder / f"step-{step}"
        try:
            listed = (read_sealed(path / "checkpoint.json") or {"files": {}})["files"]
            if set(listed) != {f"{name}.safetensors" for name in trainees}:
                raise ValueError("it is incomplete")
            for file, digest in listed.items():
                if sha256(path / file) != digest:
                    raise ValueError(f"{file} is damaged")
            states = {name: load_file(path / f"{name}.safetensors") for name in trainees}
        except (OSError, ValueError, SafetensorError, TbpoError) as error:
            skipped.append(f"{path} is skipped: {error.args[0] if isinstance(error, TbpoError) else error}")
            continue
        for name, trainee in trainees.items():
            trainee.restore(states[name])
        return step, skipped
    return 0, skipped


def _steps(folder: Path) -> list[int]:
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return [int(match.group(1)) for match in names if match]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
