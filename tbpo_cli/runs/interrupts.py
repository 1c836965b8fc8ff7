"""SIGINT, SIGTERM and SIGHUP: the command ends with a message, and no signal is lost.

A signal that the process was started with as ignored (by nohup, or a shell's trap) stays ignored.
SIGHUP comes when the terminal is closed, often twice, and nothing can be written to it any more.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []  # also those whose KeyboardInterrupt a library has swallowed


def heeded() -> list[signal.Signals]:
    """Those of NUMBERS that this process does not ignore."""
    return [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]


def listen() -> None:
    """From now on a signal raises KeyboardInterrupt, with its number, in the main thread."""
    _received.clear()
    handle(_receive)


def _receive(number: int, _frame: object) -> None:
    _received.append(number)
    raise KeyboardInterrupt(number)


def number_of(error: KeyboardInterrupt) -> int:
    """The number of the signal that raised it; SIGINT if it does not say."""
    return error.args[0] if error.args else signal.SIGINT


def raise_if_received() -> None:
    """Raises KeyboardInterrupt again if a library has swallowed one."""
    if _received:
        raise KeyboardInterrupt(_received[0])


Handler = Callable[[int, object], None]


def handle(handler: Handler) -> Callable[[], None]:
    """Has the signals go to a handler; returns what gives them back to the one before."""

    def receive(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        try:
            handler(number, frame)
        finally:
            if number == signal.SIGHUP:  # the second one says nothing new
                signal.signal(number, signal.SIG_IGN)

    before = {number: signal.signal(number, receive) for number in heeded()}

    def give_back() -> None:
        for number in set(heeded()).intersection(before):
            signal.signal(number, before[number])

    return give_back


def _leave_terminal() -> None:
    """Has stdout and stderr go nowhere if they are a terminal: it is closed, and writing fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if _is_character_device(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _is_character_device(descriptor: int) -> bool:
    """Whether it may be a terminal; os.isatty says no of one that is closed."""
    try:
        return stat.S_ISCHR(os.fstat(descriptor).st_mode)
    except OSError:  # of a stream that was closed
        return False
