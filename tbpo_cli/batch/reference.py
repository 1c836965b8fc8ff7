"""log π_ref of every response token, on disk: what a training finds out in its first epoch and reads in the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class ReferenceCache:
    """One float32 a response token of a split; NaN where it is not known yet. A value that is known never changes."""

    def __init__(self, path: Path, lengths: np.ndarray) -> None:
        """Opens the file, or makes it, whole or not at all.

        Args:
            path: of the file; what the values depend on belongs into its name.
            lengths: (n, 3) tokens of prompt, chosen and rejected of all pairs, from `span_lengths`.
        """
        self._lengths = lengths[:, 1:]
        self._ends = self._lengths.cumsum().reshape(
            -1, 2
        )  # chosen and rejected of a pair follow one another
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}")
            np.full(self._lengths.sum(), np.nan, dtype=np.float32).tofile(partial)
            partial.replace(path)
        self._values = np.memmap(
            path, dtype=np.float32, mode="r+", shape=(int(self._lengths.sum()),)
        )

    def read(self, indices: tuple[int, ...]) -> Tensor:
        """(N,) nats, in the order of a batch of these pairs: all chosen responses, then all rejected ones."""
        return torch.from_numpy(self._values[self._slots(indices)])

    def write(self, indices: tuple[int, ...], values: Tensor) -> None:
        """Keeps values in the order of `read`, where none was known."""
        slots = self._slots(indices)
        self._values[slots] = np.where(
            np.isnan(self._values[slots]), values.cpu().numpy(), self._values[slots]
        )

    def _slots(self, indices: tuple[int, ...]) -> np.ndarray:
        index = np.asarray(indices, dtype=np.int64)
        sides = [(self._ends[index, side], self._lengths[index, side]) for side in (0, 1)]
        return np.concatenate(
            [
                np.arange(0),
                *(np.arange(e - n, e) for ends, ns in sides for e, n in zip(ends, ns, strict=True)),
            ]
        )
