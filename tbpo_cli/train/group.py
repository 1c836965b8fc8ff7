"""The processes that train together: one, or several that divide the pairs of each step."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

T = TypeVar("T")
CPU = torch.device("cpu")
BUCKET = 32  # gradients that one all-reduce sums
# With a process that saves or evaluates for long. One that has died is noticed at once, a machine
# that is lost within minutes: see runs/machines.py.
TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class Group:
    """This process among those that train together; the one of rank 0 alone prints and writes."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU  # where this process computes

    @classmethod
    def of_environment(cls) -> Group:
        """The group that the launcher has started this process in."""
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        return cls(state.process_index, state.num_processes, torch.device(state.device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def size_on_machine(self) -> int:
        """How many of the processes are on this machine, by the launcher."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of some work."""
        return items[self.rank :: self.size]

    def gather(self, value: T) -> list[T]:
        """The values that all processes give, by rank; every process waits for the last one."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=side_channel())
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums the gradients over all processes, in place; one that a process lacks counts as zero.

        Those of sharded weights are sums already. torch's DDP would do it, but needs equally many
        passes in every process.
        """
        gradients = []
        for parameter in (p for p in parameters if self.size > 1 and not isinstance(p, DTensor)):
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
            gradients.append(parameter.grad)
        for first in range(0, len(gradients), BUCKET):
            flat = parameters_to_vector(gradients[first : first + BUCKET])
            dist.all_reduce(flat)
            vector_to_parameters(flat, gradients[first : first + BUCKET])


ONE = Group()


def side_channel() -> dist.ProcessGroup:
    """For Python objects, exchanged on the CPU so that no device is waited for."""
    return _side_channel_of(dist.group.WORLD)


@functools.cache
def _side_channel_of(_world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return group
