"""Memory that runs out: no answer of a trial; and the same work again with less of it at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

import torch

from tbpo_cli import console
from tbpo_cli.core.memory import first_line, is_out_of_memory
from tbpo_cli.errors import ReportedError, TbpoError, is_echo
from tbpo_cli.model.together import ALONE, BATCH_SIZE, Together
from tbpo_cli.runs.files import note_halved

T = TypeVar("T")


def refuse_as_answer(error: Exception) -> None:
    """Raises an error again that says nothing about a model: of memory, or of other processes.

    For the except clauses of trials, which take what a model's code raises for an answer. Where
    only one of several processes took such an error for an answer, they would go on differently.
    """
    if is_out_of_memory(error) or is_of_processes(error):
        raise error


def is_of_processes(error: BaseException) -> bool:
    """Whether an error comes from the exchange with other processes; one may have ended."""
    is_of_gloo = isinstance(error, RuntimeError) and (is_echo(error) or "gloo/" in str(error))
    return isinstance(error, torch.distributed.DistError) or is_of_gloo


def result_or_failure(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `work()` and None; or None and, in a line, how memory ran out.

    The tensors of a failed attempt, and what the allocator had kept, are free afterwards.
    """
    try:
        return work(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = first_line(error)
    if torch.cuda.is_available():  # outside of the except block, which holds the tensors
        torch.cuda.empty_cache()
    return None, failure


def with_less_at_once(
    work: Callable[[int], T], size: int, what: str, together: Together = ALONE
) -> tuple[T, int]:
    """The result of `work(size)`; while memory runs out, of half of it, and half of that again.

    Where the weights are sharded, the other processes wait in the middle of a pass for this one:
    the halved number is left in the stage's folder, and the launcher starts all processes again.

    Args:
        work: must give the same result for every size, or the part of it that the size asks for.
        size: sequences at a time, at least 1.
        what: the work, in words, for the messages.
        together: the processes that make the passes of `work`.

    Returns:
        The result, and the size that it was got with.

    Raises:
        TbpoError: if there is too little memory for one sequence.
        ReportedError: if the weights are sharded.
    """
    while True:
        result, failure = result_or_failure(partial(work, size))
        if failure is None:
            return cast(T, result), size
        if size == 1:
            raise TbpoError(
                f"out of memory: {failure}",
                f"{what}, one sequence at a time",
                "memory for the model and one sequence",
                "a smaller sample.max_new_tokens or data.max_length, or a device with more memory",
            )
        size //= 2
        if together.folder is not None:
            note_halved(together.folder, BATCH_SIZE, size)
            raise ReportedError(1)
        console.say(f"out of memory: {what} goes on with {size:,} sequences at a time")
