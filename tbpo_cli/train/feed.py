"""What feeds a training: batches collated ahead, of as many tokens as the device's memory holds."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch

from tbpo_cli import console
from tbpo_cli.batch.layouts import PairBatch
from tbpo_cli.errors import TbpoError, ToldError
from tbpo_cli.runs.files import HALVED, halved_tokens, write_whole
from tbpo_cli.train.group import Group
from tbpo_cli.train.memory import LEAST_TOKENS

T = TypeVar("T")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, in malloc.h


class TokenBudget:
    """`max_tokens_per_device`, of a micro-batch, padding included; and what becomes of it when memory runs out."""

    def __init__(
        self,
        wanted: int | Literal["auto"],
        that_fit: int,
        group: Group,
        sharded_in: Path | None = None,
    ) -> None:
        """`that_fit`: tokens for "auto". `sharded_in`: the stage's folder, if the processes share the weights out."""
        self._fixed, self._group, self._sharded_in = wanted != "auto", group, sharded_in
        halved = None if self._fixed or sharded_in is None else halved_tokens(sharded_in)
        self.tokens = min(group.gather(halved or (that_fit if wanted == "auto" else wanted)))

    def attempt(self, work: Callable[[int], T]) -> T:
        """The result of `work(tokens)`; all processes repeat it with half as many tokens while one runs out of memory.

        Raises TbpoError if the number is the recipe's or cannot be halved any more, and ToldError if the weights are
        sharded: the other processes wait in the middle of a pass for this one, and end with it; the launcher finds the
        halved number in the stage's folder, and starts all of them again.
        """
        while True:
            result, failure = None, None
            try:
                result = work(self.tokens)
            except RuntimeError as error:
                if not (
                    isinstance(error, torch.OutOfMemoryError)
                    or "can't allocate memory" in str(error)
                ):
                    raise
                failure = str(error).splitlines()[0]
            # Only here has the failed attempt let go of its tensors.
            told = [failure] if self._sharded_in else self._group.gather(failure)
            failures = [what for what in told if what is not None]
            if not failures:
                return cast(T, result)
            result = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self._fixed or self.tokens < 2 * LEAST_TOKENS:
                what, where = (
                    f"out of memory: {failures[0]}",
                    f"max_tokens_per_device = {self.tokens}",
                )
                smaller = "activation_checkpointing = true, or a smaller data.max_length"
                fix = 'max_tokens_per_device = "auto"' if self._fixed else smaller
                raise TbpoError(what, where, "a micro-batch that fits into memory", fix)
            self.tokens //= 2
            if self._sharded_in:
                write_whole(self._sharded_in / HALVED, str(self.tokens))
                raise ToldError(1)
            console.say(
                f"out of memory: the same step again with max_tokens_per_device = {self.tokens:,}"
            )


def keep_freed_memory() -> None:
    """Lets glibc reuse large blocks instead of fetching them anew from the kernel, page by page, in every step.

    Measured on one core: 6 to 10 % less time a step, for 4 to 30 % more memory. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Ahead:
    """The micro-batches of one step after the other, each collated in a thread while the step before it is computed.

    Not torch's DataLoader, whose workers are processes, and whose sampler would have to know of a changed budget.
    """

    def __init__(self, collate_step: Callable[[int, int], list[PairBatch]]) -> None:
        """`collate_step(step, tokens)` is a pure function."""
        self._collate_step, self._thread = collate_step, ThreadPoolExecutor(1)
        self._made: dict[tuple[int, int], Future[list[PairBatch]]] = {}

    def batches(self, step: int, tokens: int) -> list[PairBatch]:
        """Those of a step, cut to `tokens`; the next step is begun."""
        wanted = ((step, tokens), (step + 1, tokens))
        self._made = {
            key: self._made.get(key) or self._thread.submit(self._collate_step, *key)
            for key in wanted
        }
        return self._made[step, tokens].result()

    def close(self) -> None:
        """Waits for what is being made."""
        self._thread.shutdown(cancel_futures=True)
