"""log π_ref of every response token, on disk: computed in the first epoch of a training and read in
the later ones.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tbpo_cli.runs.files import sync


class ReferenceCache:
    """A file with one float32 for each response token of a split, in nats, and a checksum a pair.

    1. The file is made whole: as many float32 as the split has response tokens, all NaN, which
       means "not computed". Pairs follow one another in the order of the store; of a pair the
       chosen response comes first. A CRC-32 of each pair's values follows at the end of the file.
    2. It is mapped into memory, so that a step touches only the values of its own pairs.
    3. A step reads the values of its pairs. Values that do not fit their checksum, for example
       zeros after a power cut, read as NaN. If one value is NaN, the step computes all of them by
       the reference model and writes them.
    4. A value that is already there is never changed: a later computation, in other micro-batches,
       may differ in its last bits, and a training that goes on must see what it saw before. For
       the same reason `sync` comes before every checkpoint.
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
        num_bytes = 4 * (num_values + len(lengths))
        if not path.exists() or path.stat().st_size != num_bytes:
            _make(path, num_values, len(lengths))
        self._file = np.memmap(path, dtype=np.float32, mode="r+", shape=(num_bytes // 4,))
        self._values = self._file[:num_values]
        self._checksums = self._file[num_values:].view(np.uint32)

    def read(self, indices: tuple[int, ...]) -> Tensor:
        """(N,) nats, in the order of a batch of these pairs: all chosen responses, then all
        rejected ones.
        """
        missing = [index for index in indices if not self._is_known(index)]
        read = self._values[self._slots(indices)]
        if missing:
            read[np.isin(self._owners(indices), missing)] = np.nan
        return torch.from_numpy(read)

    def write(self, indices: tuple[int, ...], values: Tensor) -> None:
        """Stores values, in the order of `read`, of pairs that have none yet."""
        slots = self._slots(indices)
        owners = self._owners(indices)
        given = values.cpu().numpy()
        for index in dict.fromkeys(indices):
            if not self._is_known(index):
                of_pair = owners == index
                self._values[slots[of_pair]] = given[of_pair]
                self._checksums[index] = self._checksum(index)

    def sync(self) -> None:
        """Puts what was written on the disk."""
        self._file.flush()

    def _is_known(self, index: int) -> bool:
        return int(self._checksums[index]) == self._checksum(index)

    def _checksum(self, index: int) -> int:
        """Of the place of a pair and its values, so that neither zeros nor another pair's fit."""
        begin = self._ends[index, 0] - self._lengths[index, 0]
        values = self._values[begin : self._ends[index, 1]]
        return zlib.crc32(values.tobytes(), zlib.crc32(int(index).to_bytes(8, "little")))

    def _owners(self, indices: tuple[int, ...]) -> np.ndarray:
        """(N,) the pair of each response token, in the order of `read`."""
        index = np.asarray(indices, dtype=np.int64)
        return np.concatenate([np.repeat(index, self._lengths[index, side]) for side in (0, 1)])

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


def _make(path: Path, num_values: int, num_pairs: int) -> None:
    """A file without values: a disk without space for all of it is noticed here, not in a step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    with partial.open("wb") as file:
        for begin in range(0, num_values, 2**20):
            file.write(np.full(min(2**20, num_values - begin), np.nan, np.float32).tobytes())
        file.write(bytes(4 * num_pairs))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)
