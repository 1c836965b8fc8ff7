"""SIGINT and SIGTERM: the command ends with a message, wherever it is, and none is lost.

A signal that the process was started with as ignored (by nohup, or a shell's trap) stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

NUMBERS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []  # also what a library swallowed, as KeyboardInterrupt in a bare except


def heeded() -> list[signal.Signals]:
    """Those of NUMBERS that this process does not ignore."""
    return [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]


def listen() -> None:
    """From now on a signal raises KeyboardInterrupt, with its number, in the main thread."""
    _received.clear()
    for number in heeded():
        signal.signal(number, _receive)


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
    before = {number: signal.signal(number, handler) for number in heeded()}

    def give_back() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    return give_back
