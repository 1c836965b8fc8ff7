"""The processes that train together: one, or many that hold the same weights and share the pairs of each step."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

T = TypeVar("T")
BUCKET_NUMBERS = 2**25  # gradients are summed in buckets of about this many numbers
PATIENCE = timedelta(hours=6)  # with a process that saves or evaluates for long; one that died is noticed at once


@dataclass(frozen=True)
class Group:
    """This process among those that train together.

    Args:
        rank: 0 … size − 1; the process of rank 0 is the only one that prints and writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Group:
        """The group that the launcher has started this process in."""
        state = _process_state()
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this process does of some work."""
        return items[self.rank :: self.size]

    def gather(self, value: T) -> list[T]:
        """The values that all processes give, by rank; every process waits for the last one."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=_side_channel())
        return values

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All processes in a row, for weights that they share out."""
        return init_device_mesh(device.type, (self.size,))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients of all processes, in place; one that a process does not have counts as zero.

        Those of sharded weights are sums already. Not torch's DDP, which wants as many passes in every process.
        """
        if self.size == 1:
            return
        for bucket in _buckets(parameter for parameter in parameters if not isinstance(parameter, DTensor)):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = summed.view_as(parameter)


ONE = Group()


def device_of_environment() -> torch.device:
    """Where this process computes."""
    return torch.device(_process_state().device)


def _process_state() -> PartialState:
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@functools.cache
def _side_channel() -> dist.ProcessGroup:
    """For what is said on the CPU, so that no device is waited for."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    return group


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if parameter.numel() > room:
            buckets.append([])
            room = BUCKET_NUMBERS
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets
