"""Whether the other machines of a training are alive, by files that all of them see.

A process that dies closes its connections, and the others notice. A machine that loses its power or
its network does not: the others would wait for it as long as torch's time-outs last, which are made
for a process that saves or evaluates for long.
"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

EVERY = 15.0  # seconds between two signs of life
LOST = 240.0  # seconds without one; network file systems may show a file a minute late


@dataclass
class Signs:
    """The signs of life of some machines: a file each in a folder that they share.

    Their clocks need not agree: a machine is alive while the content of its file changes. One whose
    file has not changed yet may still be starting, and is not lost.

    Args:
        folder: of the stage.
        rank: of this machine.
        count: how many machines there are.
    """

    folder: Path
    rank: int
    count: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0
    seen: dict[int, str] = field(default_factory=dict)
    changed: dict[int, float] = field(default_factory=dict)

    def beat(self) -> int | None:
        """Gives a sign of life, and returns the number of a machine that is lost, if one is."""
        self.beats += 1
        self._write(f"{self.token} {self.beats}")
        now = time.monotonic()
        for rank in range(self.count):
            if rank == self.rank:
                continue
            content = self._read(rank)
            if content == "ended":
                self.changed.pop(rank, None)
            elif content != self.seen.setdefault(rank, content):
                self.seen[rank] = content
                self.changed[rank] = now
        lost = (rank for rank, since in self.changed.items() if now - since > LOST)
        return next(lost, None)

    def end(self) -> None:
        """Says that this machine's part has ended, well or not: it is not lost."""
        self._write("ended")

    def _path(self, rank: int) -> Path:
        return self.folder / f".machine-{rank}"

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a full disk stops the training where it writes itself
            self._path(self.rank).write_text(text)

    def _read(self, rank: int) -> str:
        with suppress(OSError):
            return self._path(rank).read_text()
        return ""
