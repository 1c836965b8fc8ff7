"""A limit in time and memory for a program that came with a model: its chat template."""

from __future__ import annotations

import functools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import ParamSpec, TypeVar

from tbpo_cli.errors import TbpoError

Given = ParamSpec("Given")
Made = TypeVar("Made")

MAX_SECONDS = 10.0  # of computing, in which a template renders a conversation
MAX_BYTES = 2**30  # of memory, for the same
PAGE = resource.getpagesize()
TEMPLATE = "model.chat_template, or the tokenizer's own template"
# Seconds that the main thread had computed when the rendering began; None outside of `at_most`.
_began: float | None = None


class TooMuch(BaseException):  # an Exception would be taken for a fault of a row
    """The limit that a program exceeded, as "10 s"."""


@contextmanager
def at_most(seconds: float, num_bytes: int) -> Iterator[None]:
    """Raises TooMuch in its block after so many seconds of computing, or bytes of further memory.

    The seconds are counted anew for each function of `limited` that is called in the block. Only
    the main thread gets signals and can be stopped; in another thread there is no limit.
    """
    global _began
    if _began is not None or threading.get_ident() != threading.main_thread().ident:
        yield
        return

    def look(number: int, frame: object) -> None:
        # Not by the clock: the process may have been stopped meanwhile, as by Ctrl-Z.
        if _began is not None and time.thread_time() - _began > seconds:
            raise TooMuch(f"{seconds:g} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, look)
    _began = time.thread_time()
    timer = signal.setitimer(signal.ITIMER_REAL, seconds / 10, seconds / 10)
    try:
        with suppress(OSError, ValueError):  # a system that knows no such limit
            resource.setrlimit(resource.RLIMIT_AS, (_bytes_in_use() + num_bytes, limits[1]))
        yield
    except MemoryError:
        raise TooMuch(f"{num_bytes / 2**30:g} GiB of memory") from None
    finally:
        _began = None
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def limited(
    render: Callable[Given, Made], whose: str = "the chat template", where: str = TEMPLATE
) -> Callable[Given, Made]:
    """The function that renders, within MAX_SECONDS and MAX_BYTES.

    Args:
        whose: the template, as the message calls it.
        where: the place that the message names.

    Returns:
        A function that raises TbpoError where it takes more. Call it from the main thread, and for
        many small renderings within one `at_most`, which saves most of the cost.
    """

    @functools.wraps(render)
    def within(*given: Given.args, **named: Given.kwargs) -> Made:
        global _began
        try:
            if _began is not None:
                _began = time.thread_time()
                return render(*given, **named)
            with at_most(MAX_SECONDS, MAX_BYTES):
                return render(*given, **named)
        except TooMuch as error:
            taken = str(error)
        except MemoryError:
            taken = f"{MAX_BYTES / 2**30:g} GiB of memory"
        what = f"{whose} takes more than {taken} for one conversation"
        fix = "give another template"
        if where == TEMPLATE:
            fix = "mend the template, or give one of your own as model.chat_template"
        raise TbpoError(what, where, "a template that ends", fix)

    return within


def _bytes_in_use() -> int:
    """The address space of this process. Raises OSError where the system does not say so."""
    opened = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(opened, 64).split()[0]) * PAGE
    finally:
        os.close(opened)
