"""Memory that runs out: how torch says so, and the same work again with less of it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tbpo_cli import console
from tbpo_cli.errors import ReportedError, TbpoError
from tbpo_cli.model.together import ALONE, BATCH_SIZE, Together
from tbpo_cli.runs.files import note_halved

T = TypeVar("T")

# What the CUDA runtime, its libraries and the CPU's allocator say, in other classes of errors than
# torch.OutOfMemoryError.
OUT_OF_MEMORY = (
    "can't allocate memory",  # the allocator of the CPU
    "CUDA error: out of memory",  # an AcceleratorError, from the driver
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


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
        try:
            return work(size), size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = str(error).splitlines()[0]
        # Outside of the except block the tensors of the failed attempt are freed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
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
