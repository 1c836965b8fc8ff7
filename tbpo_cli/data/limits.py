"""A limit in time and memory for a program that came with a model: its chat template."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


class TooMuch(BaseException):  # an Exception would be taken for a fault of a row
    """What a program took more of, as "10 s"."""


@contextmanager
def at_most(seconds: float, num_bytes: int) -> Iterator[None]:
    """Within it, more seconds, or more bytes on top of what the process has, raise TooMuch.

    Only the main thread can be stopped so: it is the one that gets signals.
    """

    def stop(number: int, frame: object) -> None:
        raise TooMuch(f"{seconds:g} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with suppress(OSError, ValueError):  # a system that knows no such limit
            in_use = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (in_use + num_bytes, limits[1]))
        yield
    except MemoryError:
        raise TooMuch(f"{num_bytes / 2**30:g} GiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
