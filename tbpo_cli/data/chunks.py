"""Rows → tokenized pairs, a chunk of rows at a time, in this process or in several. The result is the same.

Not by `datasets.map`: the rows of a source may differ in columns and types, and one that is left out keeps its number.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

import pyarrow as pa

from tbpo_cli.data.pairs import PreferencePair, RejectedRow, recognise, to_pair
from tbpo_cli.data.sources import Row
from tbpo_cli.data.store import record_batch
from tbpo_cli.data.tokens import Chat, load_tokenizer, tokenize_pairs
from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Data, Model

ROWS_AT_A_TIME = 1000
_worker = threading.local()


class Kept(NamedTuple):
    """What is known of a usable row beside its tokens; `position` is that of the row in its chunk."""

    position: int
    pair_id: str
    reversed_id: str
    prompt_hash: str
    is_cut: bool


Prepared = tuple[pa.RecordBatch, list[Kept], dict[int, RejectedRow]]


@dataclass(frozen=True)
class Chunk:
    """What became of some rows.

    Args:
        rows: the rows.
        format_name: how they were read.
        pairs: one for each usable row, as store.SCHEMA.
        kept: one for each of `pairs`.
        rejected: position of an unusable row → the reason.
    """

    rows: list[Row]
    format_name: str
    pairs: pa.RecordBatch
    kept: list[Kept]
    rejected: dict[int, RejectedRow]


def prepare_rows(rows: Iterable[Row], data: Data, pool: Executor) -> Iterator[Chunk]:
    """The chunks of one source, in its order, whatever `data.workers` is.

    Args:
        pool: of `workers`.

    Raises:
        TbpoError: if the rows have no known format, if the chat template cannot be cut, or if a worker died.
    """
    chunks = _batched(rows, ROWS_AT_A_TIME)
    if (first := next(chunks, None)) is None:
        return
    name = recognise(first, data)
    waiting: deque[tuple[list[Row], Future[Prepared]]] = deque()
    for rows in itertools.chain([first], chunks):
        waiting.append((rows, pool.submit(_prepare, rows, name)))
        if len(waiting) > 2 * data.workers:
            yield _result(*waiting.popleft(), name)
    while waiting:
        yield _result(*waiting.popleft(), name)


@contextmanager
def workers(model: Model, data: Data) -> Iterator[Executor]:
    """`data.workers` processes; one worker is a thread, while the tokenizer's own threads use the other cores."""
    if data.workers == 1:
        pool: Executor = ThreadPoolExecutor(1, initializer=_begin_worker, initargs=(model, data))
    else:
        pool = ProcessPoolExecutor(data.workers, get_context("spawn"), _begin_process, (model, data))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _result(rows: list[Row], future: Future[Prepared], name: str) -> Chunk:
    try:
        return Chunk(rows, name, *future.result())
    except BrokenExecutor:
        raise TbpoError(
            "a worker died while it prepared rows",
            f"{rows[0].source}, rows {rows[0].number} to {rows[-1].number}",
            "enough memory for data.workers processes",
            "lower data.workers",
        ) from None


def _begin_process(model: Model, data: Data) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _begin_worker(model, data)


def _begin_worker(model: Model, data: Data) -> None:
    _worker.chat, _worker.data = Chat(load_tokenizer(model), data.template_date), data


def _prepare(rows: list[Row], name: str) -> Prepared:
    chat, data = _worker.chat, _worker.data
    rejected: dict[int, RejectedRow] = {}
    pairs: dict[int, PreferencePair] = {}
    for position, row in enumerate(rows):
        try:
            pairs[position] = to_pair(row, name, data.columns)
        except RejectedRow as reason:
            rejected[position] = reason
    tokenized, kept = [], []
    for (position, pair), result in zip(pairs.items(), tokenize_pairs([*pairs.values()], chat, data), strict=True):
        if isinstance(result, RejectedRow):
            rejected[position] = result
        else:
            tokenized.append((result, pair.score_margin))
            kept.append(Kept(position, pair.pair_id, pair.reversed_id, pair.prompt_hash, result.is_cut))
    return record_batch(tokenized), kept, rejected


def _batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
