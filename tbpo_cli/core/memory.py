"""How torch says that memory has run out."""

from __future__ import annotations

import torch

# What the CUDA runtime, its libraries and the CPU's allocator say, in other classes of errors than
# torch.OutOfMemoryError.
OUT_OF_MEMORY = (
    "can't allocate memory",  # the allocator of the CPU
    "CUDA error: out of memory",  # an AcceleratorError, from the driver
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # on a full GPU, where cuBLAS has no memory to begin with
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """What an error says, in a line; the name of its class if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
