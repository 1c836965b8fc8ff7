"""Checkpoints: a folder of safetensors and JSON, complete or not there at all.

Of sharded weights each process writes its own part (torch.distributed.checkpoint), which processes
of any number read again.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from tbpo_cli import console
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.sharding import gathered, placed_like
from tbpo_cli.runs.files import read_sealed, sha256
from tbpo_cli.train.group import Group

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

    def restore(self, folder: Path, name: str) -> None:
        """Reads what a CheckpointWriter wrote, sharded like this or otherwise."""
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


def _load_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Reads this process's part of some tensors, in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a load that needs no other process
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


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
