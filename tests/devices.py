"""The devices of a test: the CPU in the ordinary suite, a GPU by `pytest -m gpu`.

Also work in a process of its own, with little memory left: on a GPU by the limit of torch's
allocator, on the CPU by that of the process's address space.
"""

import io
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from process import FORKS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
DEVICES = ["cpu", ON_GPU]


def on_device(device):
    """What tells a command to compute there, where a GPU is taken if there is one."""
    return () if device == "cuda" else ("--cpu",)


def limit_memory(device, num_bytes):
    """Leaves this process so many bytes of a device's memory beside what it has."""
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        share = (torch.cuda.memory_reserved() + num_bytes) / total
        torch.cuda.set_per_process_memory_fraction(share)
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * os.sysconf("SC_PAGE_SIZE") + num_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def in_a_process(work, *arguments):
    """(what `work(*arguments)` returns, what it writes to stderr), in a new process.

    Args:
        work: a function of a module that a new process can import.
    """
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        return pool.submit(_with_stderr, work, arguments).result()


def _with_stderr(work, arguments):
    with redirect_stderr(io.StringIO()) as err:
        result = work(*arguments)
    return result, err.getvalue()
