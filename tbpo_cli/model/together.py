"""What processes do at once where each has a part of the weights: the same number of passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tbpo_cli.runs.files import halved

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]

BATCH_SIZE = "sample.batch_size"  # the key of the sequences that go through a model at once


def equally_many(items: Iterable[T], blank: T, gather: Gather) -> list[T]:
    """The items of this process, and blank ones until all processes have as many.

    Args:
        gather: gives the values that all processes give; each waits for the last one.
    """
    own = list(items)
    return [*own, *[blank] * (max(gather(len(own))) - len(own))]


@dataclass(frozen=True)
class Together:
    """The processes that make each pass together, or one that makes its passes alone.

    Args:
        gather: as of `equally_many`.
        folder: of the stage, where a process that runs out of memory leaves the number that all
            processes begin again with; None: this process makes its passes alone.
    """

    gather: Gather = lambda value: [value]
    folder: Path | None = None

    def any(self, value: bool) -> bool:
        """Whether it is so in one of the processes."""
        return any(self.gather(value))

    def equally_many(self, items: Iterable[T], blank: T) -> Iterable[T]:
        """As the function of this name; the items alone where this process makes its passes alone.

        They are then not all made before the first is asked for.
        """
        return items if self.folder is None else equally_many(items, blank, self.gather)

    def batch_size(self, wanted: int) -> int:
        """Sequences at a time: those that are wanted, or what an earlier start has halved."""
        known = {} if self.folder is None else halved(self.folder)
        return min(wanted, known.get(BATCH_SIZE, wanted))


ALONE = Together()
