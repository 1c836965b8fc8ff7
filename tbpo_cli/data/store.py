"""Tokenized pairs on disk: one Arrow file a split, written once, then read by memory map.

Not a `datasets.Dataset`: the lengths of all pairs are read from the columns' offsets, without their
ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tbpo_cli.data.tokens import TokenizedPair

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SCHEMA = pa.schema(
    {"pair_id": pa.string()}
    | {name: pa.list_(pa.int32()) for name in ID_COLUMNS}
    | {"score_margin": pa.float64(), "weight": pa.float64()}
)


def record_batch(pairs: Sequence[TokenizedPair]) -> pa.RecordBatch:
    """Pairs as Arrow columns of SCHEMA."""
    return pa.RecordBatch.from_pylist([vars(pair) for pair in pairs], schema=SCHEMA)


@contextmanager
def pair_writer(folder: Path) -> Iterator[pa.RecordBatchFileWriter]:
    """Writes the record batches of a split. An exception leaves no file, nor a part."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "pairs.arrow.partial"
    try:
        with pa.ipc.new_file(partial, SCHEMA) as writer:
            yield writer
        partial.replace(folder / "pairs.arrow")
    finally:
        partial.unlink(missing_ok=True)


class PairStore:
    """The pairs of a split: `len(store)` and `store[i]`.

    `lengths` is (n, 3): the tokens of prompt, chosen and rejected of each pair; `weights` is (n,).
    """

    def __init__(self, folder: Path, reverse: bool = False) -> None:
        """Opens a split; with `reverse`, chosen and rejected change places."""
        with pa.memory_map(str(folder / "pairs.arrow")) as source:
            self.table = pa.ipc.open_file(source).read_all()
        if reverse:
            self.table = self.table.rename_columns(
                {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
            )
        columns = [pc.list_value_length(self.table[name]).to_numpy() for name in ID_COLUMNS]
        self.lengths = np.stack(columns, axis=1).astype(np.int64)
        # Stores of earlier versions have no weights.
        self.weights = np.ones(len(self))
        if "weight" in self.table.column_names:
            self.weights = self.table["weight"].to_numpy()
        self.prompt_lengths, self.chosen_lengths, self.rejected_lengths = self.lengths.T

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> TokenizedPair:
        ids = (self.table[name][index].values.to_numpy() for name in ID_COLUMNS)
        pair_id = self.table["pair_id"][index].as_py()
        prompt, chosen, rejected = ids
        weight = float(self.weights[index])
        return TokenizedPair(pair_id, prompt, chosen, rejected, weight)

    @property
    def largest_id(self) -> int:
        """The largest token id; -1 without pairs."""
        return max(
            int(pc.list_flatten(self.table[name]).to_numpy().max(initial=-1)) for name in ID_COLUMNS
        )

    @property
    def score_margins(self) -> np.ndarray:
        """score_chosen − score_rejected of the pairs whose row had both."""
        return np.asarray(self.table["score_margin"].drop_null())

    @property
    def weighs_nothing(self) -> bool:
        """Whether there are pairs, and all of them have the weight 0."""
        return len(self) > 0 and not self.weights.any()

    @property
    def has_rejected(self) -> bool:
        """Whether these are comparisons, not demonstrations."""
        return bool((self.rejected_lengths > 0).all())
