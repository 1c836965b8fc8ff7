"""log π_ref of every response token, on disk: computed in the first epoch of a training and read in
the later ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class ReferenceCache:
    """A file with one float32 for each response token of a split, in nats.

    1. The file is made whole: as many float32 as the split has response tokens, all NaN, which
       means "not computed". Pairs follow one another in the order of the store; of a pair the
       chosen response comes first.
    2. It is mapped into memory, so that a step touches only the values of its own pairs.
    3. A step reads the values of its pairs. If one of them is NaN, it computes all of them by the
       reference model and writes them.
    4. A value that is already there is never changed: a later computation, in other micro-batches,
       may differ in its last bits, and a training that goes on must see what it saw before.
    """

    def __init__(self, path: Path, lengths: np.ndarray) -> None:
        """Opens the file, or makes it, whole or not at all.

        Args:
            path: of the file; its name must change with whatever the values depend on.
            lengths: (n, 3) tokens of prompt, chosen and rejected of all pairs, from `span_lengths`.
        """
        self._lengths = lengths[:, 1:]
        self._ends = self._lengths.cumsum().reshape(-1, 2)
        num_values = int(self._lengths.sum())
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}")
            np.full(num_values, np.nan, dtype=np.float32).tofile(partial)
            partial.replace(path)
        self._values = np.memmap(path, dtype=np.float32, mode="r+", shape=(num_values,))

    def read(self, indices: tuple[int, ...]) -> Tensor:
        """(N,) nats, in the order of a batch of these pairs: all chosen responses, then all
        rejected ones.
        """
        return torch.from_numpy(self._values[self._slots(indices)])

    def write(self, indices: tuple[int, ...], values: Tensor) -> None:
        """Stores values, in the order of `read`, where there is none yet."""
        slots = self._slots(indices)
        present = self._values[slots]
        self._values[slots] = np.where(np.isnan(present), values.cpu().numpy(), present)

    def _slots(self, indices: tuple[int, ...]) -> np.ndarray:
        """(N,) the places in the file of the response tokens of some pairs."""
        index = np.asarray(indices, dtype=np.int64)
        slots = [np.arange(0)]
        for side in (0, 1):
            ends = self._ends[index, side]
            lengths = self._lengths[index, side]
            slots += [
                np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)
            ]
        return np.concatenate(slots)
