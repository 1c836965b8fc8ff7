"""Tokenized pairs on disk: one Arrow file a split, written once, then read by memory map."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from tbpo_cli.data.tokens import TokenizedPair

SCHEMA = pa.schema(
    {"pair_id": pa.string()} | {name: pa.list_(pa.int32()) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
)


class PairWriter:
    """Appends pairs to a split's file, in batches; a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "pairs.arrow"
        self._writer = pa.ipc.new_file(self.path, SCHEMA)

    def __enter__(self) -> PairWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, pairs: Iterable[TokenizedPair]) -> None:
        rows = [{name: getattr(pair, name) for name in SCHEMA.names} for pair in pairs]
        if rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))


class PairStore:
    """The pairs of a split: `len(store)`, `store[i]`, and the lengths of all of them."""

    def __init__(self, folder: Path, reverse: bool = False) -> None:
        """Opens a split; with `reverse`, chosen and rejected change places."""
        with pa.memory_map(str(folder / "pairs.arrow")) as source:
            self._table = pa.ipc.open_file(source).read_all()
        if reverse:
            renamed = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
            self._table = self._table.rename_columns([renamed.get(name, name) for name in SCHEMA.names])
        self.prompt_lengths, self.chosen_lengths, self.rejected_lengths = (
            np.concatenate([np.diff(chunk.offsets) for chunk in self._table[name].chunks] or [np.empty(0, np.int32)])
            for name in SCHEMA.names[1:]
        )

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> TokenizedPair:
        pair_id, *ids = (self._table[name][index] for name in SCHEMA.names)
        return TokenizedPair(pair_id.as_py(), *(column.values.to_numpy() for column in ids))

    @property
    def has_rejected(self) -> bool:
        """Whether these are comparisons, not demonstrations."""
        return bool((self.rejected_lengths > 0).all())
