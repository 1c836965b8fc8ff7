"""The input of a training: micro-batches collated ahead, and how many tokens they may have."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tbpo_cli import console
from tbpo_cli.batch.layouts import PairBatch
from tbpo_cli.errors import ReportedError, TbpoError
from tbpo_cli.model.out_of_memory import result_or_failure
from tbpo_cli.runs.files import halved, note_halved
from tbpo_cli.train.checkpoint import kept_checkpoints
from tbpo_cli.train.group import Group
from tbpo_cli.train.memory import MIN_TOKENS

T = TypeVar("T")
TOKENS = "max_tokens_per_device"  # the key of the recipe
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, in malloc.h


class TokenBudget:
    """The most tokens of a micro-batch, padding included; it is halved when memory runs out."""

    def __init__(
        self,
        wanted: int | Literal["auto"],
        fitting: int,
        group: Group,
        sharded_in: Path | None = None,
        folder: Path | None = None,
        smaller: str = "activation_checkpointing = true, or a smaller data.max_length",
    ) -> None:
        """
        Args:
            wanted: `max_tokens_per_device` of the recipe.
            fitting: the tokens to begin with for "auto".
            group: the processes, which all have the same number.
            sharded_in: the stage's folder, if the weights are sharded over the processes.
            folder: that of a training, for `once_more`.
            smaller: what helps where the number cannot be halved any more.
        """
        self._is_fixed = wanted != "auto"
        self._group = group
        self._sharded_in = sharded_in
        self._folder = folder or sharded_in
        self._smaller = smaller
        tokens = fitting if wanted == "auto" else wanted
        if not self._is_fixed and self._folder is not None:
            tokens = halved(self._folder).get(TOKENS, tokens)
        self.tokens = min(group.gather(tokens))

    def attempt(self, work: Callable[[int], T]) -> T:
        """The result of `work(tokens)`.

        While one process runs out of memory, all of them repeat it with half as many tokens. Where
        the weights are sharded, the others wait in the middle of a pass for this one: the halved
        number is left in the stage's folder, and the launcher starts all processes again.

        Raises:
            TbpoError: if the number is the recipe's, or cannot be halved any more.
            ReportedError: if the weights are sharded.
        """
        while True:
            result, failure = result_or_failure(partial(work, self.tokens))
            everyone = [failure] if self._sharded_in else self._group.gather(failure)
            failures = [one for one in everyone if one is not None]
            if not failures:
                return cast(T, result)
            result = None
            self._halve(failures[0])

    def once_more(
        self, work: Callable[[], T], what: str, changes: Sequence[Tensor] | None = None
    ) -> T:
        """The result of what a step does after its passes, when their activations are freed.

        1. If memory runs out before any of `changes` has changed, the allocator's cache is emptied,
           and the work done once more.
        2. Otherwise nothing is done twice: a weight could be updated twice, or a process wait for
           an exchange that the others are through with. Several processes begin again from the
           newest checkpoint, with half as many tokens; a single one ends.

        Args:
            work: what is done.
            what: the same in words, for the message.
            changes: all that the work changes; None if it may not be repeated in one process alone.

        Raises:
            TbpoError: in a single process, or if the number cannot be halved.
            ReportedError: in one of several.
        """
        before = _versions(changes or ())
        for attempt in range(2):
            result, failure = result_or_failure(work)
            if failure is None:
                return cast(T, result)
            if attempt or changes is None or _versions(changes) != before:
                break
            console.say(f"out of memory: {what} once more, with the memory that was kept freed")
        if self._group.size > 1 and self._can_halve:
            self.tokens //= 2
            self._begin_again()
        assert self._folder is not None
        kept = ["the start", *map("step {}".format, kept_checkpoints(self._folder / "checkpoints"))]
        half = f", with {TOKENS} = {self.tokens // 2}" if self.tokens >= 2 * MIN_TOKENS else ""
        raise TbpoError(
            f"out of memory: {failure}",
            what,
            "memory for it beside weights, gradients and the optimizer's moments",
            f"the same command goes on from {kept[-1]}{half}; less memory is needed for an adapter "
            '([model.lora]), or with more --gpus and sharding = "fsdp"',
        )

    @property
    def _can_halve(self) -> bool:
        return not self._is_fixed and self.tokens >= 2 * MIN_TOKENS

    def _halve(self, failure: str) -> None:
        if not self._can_halve:
            raise TbpoError(
                f"out of memory: {failure}",
                f"{TOKENS} = {self.tokens}",
                "a micro-batch that fits into memory",
                'max_tokens_per_device = "auto"' if self._is_fixed else self._smaller,
            )
        self.tokens //= 2
        if self._sharded_in:
            self._begin_again()
        console.say(
            f"out of memory: the same step again with max_tokens_per_device = {self.tokens:,}"
        )

    def _begin_again(self) -> NoReturn:
        """Leaves the number for the launcher, which starts all processes again."""
        assert self._folder is not None
        note_halved(self._folder, TOKENS, self.tokens)
        raise ReportedError(1)


@torch.no_grad()
def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor has been changed in place, as torch counts it."""
    own = (each.to_local() if isinstance(each, DTensor) else each for each in tensors)
    return [each._version for each in own]


def keep_freed_memory() -> None:
    """Lets glibc reuse large blocks instead of asking the kernel for them again in every step.

    Measured on one core: 6 to 10 % less time a step, for 4 to 30 % more memory. No setting of torch
    does it. On other systems than Linux with glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Prefetcher:
    """Collates the micro-batches of a step in a thread, while the step before it is computed.

    1. A step asks for its micro-batches, cut to a number of tokens.
    2. They are ready or being made, if the step was submitted with the same number before. If the
       number has changed since, they are made now.
    3. The next step is submitted with that number; what nobody asks for any more is dropped.

    torch's DataLoader would do it in processes, and its sampler would have to know the number,
    which changes when memory runs out.
    """

    def __init__(self, collate_step: Callable[[int, int], list[PairBatch]]) -> None:
        """`collate_step(step, max_tokens)` is a pure function."""
        self._collate_step = collate_step
        self._thread = ThreadPoolExecutor(1)
        self._submitted: dict[tuple[int, int], Future[list[PairBatch]]] = {}

    def batches(self, step: int, max_tokens: int) -> list[PairBatch]:
        """The micro-batches of a step; those of the next one are begun."""
        before = self._submitted
        self._submitted = {}
        for key in ((step, max_tokens), (step + 1, max_tokens)):
            is_submitted = key in before
            self._submitted[key] = (
                before[key] if is_submitted else self._thread.submit(self._collate_step, *key)
            )
        return self._submitted[step, max_tokens].result()

    def close(self) -> None:
        """Waits for the thread."""
        self._thread.shutdown(cancel_futures=True)
