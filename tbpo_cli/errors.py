"""The one kind of error that a user sees: what is wrong, where, what was expected, and what to
do.
"""

from __future__ import annotations

import copyreg
from dataclasses import dataclass, replace
from typing import Any

# The messages of a process whose connection another one has closed.
ECHOES = ("onnection closed by peer", "onnection reset by peer")


@dataclass(eq=False)
class TbpoError(Exception):
    """Anything that a user can cause. `cli/main.py` prints it, without a traceback, and exits with
    `exit_code`.

    Args:
        what: one sentence, lower case.
        where: file, line or key.
        expected: what would have been right.
        fix: the command or the key to change.
        also: further faults of the same thing, so that all are reported at once.
    """

    what: str
    where: str = ""
    expected: str = ""
    fix: str = ""
    also: tuple[TbpoError, ...] = ()
    exit_code = 2

    def __str__(self) -> str:
        lines = [
            f"  {label}: {text}"
            for label in ("where", "expected", "fix")
            if (text := getattr(self, label))
        ]
        return "\n".join([f"error: {self.what}", *lines, *map(str, self.also)])

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: an Exception keeps nothing of what was given by keyword."""
        return copyreg.__newobj__, (type(self),), vars(self)  # type: ignore[attr-defined]


class DivergenceError(TbpoError):
    """The loss or its gradient is not finite; no weight was changed."""

    exit_code = 3


class GateError(TbpoError):
    """The condition in `eval.gate` does not hold; all results are written."""

    exit_code = 4


class ReportedError(TbpoError):
    """A failure that another process has reported already; only its exit code is left."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("a worker process failed")
        self.exit_code = exit_code

    def __str__(self) -> str:
        return ""


class Interrupted(TbpoError):  # noqa: N818 - an event, not a fault
    """SIGINT, SIGTERM or SIGHUP, after a checkpoint was written. Exit 130, 143 or 129."""

    def __init__(self, signal_number: int, what: str, fix: str) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return f"interrupted: {self.what}\n  {self.fix}"


def is_echo(error: BaseException) -> bool:
    """Whether an error says only that another process has closed its connection."""
    return any(text in str(error) for text in ECHOES)


def gather(faults: list[TbpoError]) -> None:
    """Raises all faults as one error; returns if there are none."""
    if faults:
        first, *rest = faults
        raise replace(first, also=tuple(rest))
