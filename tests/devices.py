"""The devices of a test: the CPU in the ordinary suite, a GPU by `pytest -m gpu`.

Also work in a process of its own, with little memory left: on a GPU by the limit of torch's
allocator, on the CPU by counting the bytes of tensors.
"""

import io
import weakref
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stderr

import pytest
import torch
from process import FORKS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
DEVICES = ["cpu", ON_GPU]


def on_device(device):
    """What tells a command to compute there, where a GPU is taken if there is one."""
    return () if device == "cuda" else ("--cpu",)


def memory_limit(device, num_bytes):
    """A context that leaves this process so many bytes of a device's memory beside what it has.

    Args:
        num_bytes: None: all of it.
    """
    if num_bytes is None:
        return nullcontext()
    if device == "cpu":
        return _CountedTensors(num_bytes)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    share = (torch.cuda.memory_reserved() + num_bytes) / total
    torch.cuda.set_per_process_memory_fraction(share)
    return nullcontext()


class _CountedTensors(TorchDispatchMode):
    """The allocator's own error once more than so many bytes of new tensors live at a time.

    A limit of the operating system's is none for a test: where memory ends inside of a library that
    does not expect it, the process is aborted.
    """

    def __init__(self, num_bytes):
        super().__init__()
        self.num_bytes = num_bytes
        self.storages = {}

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        given = {_address(each) for each in tree_leaves((arguments, keywords)) if _is_tensor(each)}
        result = operation(*arguments, **(keywords or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            if (address := _address(tensor)) not in given | self.storages.keys():
                storage = tensor.untyped_storage()
                self.storages[address] = storage.nbytes()
                weakref.finalize(storage, self.storages.pop, address)
        if sum(self.storages.values()) > self.num_bytes:
            torch.empty(2**60, dtype=torch.uint8)
        return result


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


def _address(tensor):
    return tensor.untyped_storage()._cdata


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
