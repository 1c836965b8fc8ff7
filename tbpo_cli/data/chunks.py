"""Rows → tokenized pairs, a chunk of rows at a time, with the same result in any number of workers.

Not by `datasets.map`: the rows of a source may differ in columns and types, and one that is left
out keeps its number.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from types import SimpleNamespace

from tbpo_cli.config.choosing import Choose
from tbpo_cli.config.recipe import Data, Model
from tbpo_cli.data.choosing import Chooser
from tbpo_cli.data.formats import to_pairs
from tbpo_cli.data.pairs import MadePairs, Noted, PreferencePair, RejectedRow
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row
from tbpo_cli.data.tokenizer import load_chat
from tbpo_cli.data.tokens import Rendered, Result, encode_pairs, render_pairs
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.children import die_with_parent

_worker = SimpleNamespace()  # of this process: `_begin_worker` fills it
# For one row: counts of its answers that are left out, if any; then its pairs, or why it has none.
OfRow = list[Result | Noted]
Chunk = tuple[list[Row], list[OfRow]]
RenderedChunk = tuple[list[Rendered], list[OfRow], list[int]]


def prepare_rows(
    rows: Iterator[Row], format_name: str, data: Data, pool: Executor
) -> Iterator[Chunk]:
    """Chunks of rows in their order, and for each row its pairs, or why it cannot be used.

    Raises:
        TbpoError: if the chat template cannot be cut, or if a worker died.
    """
    waiting: deque[tuple[list[Row], Future[list[OfRow]]]] = deque()
    try:
        while (chunk := list(itertools.islice(rows, ROWS_AT_A_TIME))) or waiting:
            if chunk:
                waiting.append((chunk, _submit(chunk, format_name, data, pool)))
            if not chunk or len(waiting) > 2 * data.workers:
                first, results = waiting.popleft()
                yield first, results.result()
    except BrokenExecutor:
        where = f"data.workers = {data.workers}"
        expected = "enough memory for so many processes"
        raise TbpoError(
            "a worker died while it prepared rows", where, expected, "lower data.workers"
        ) from None


def _submit(chunk: list[Row], format_name: str, data: Data, pool: Executor) -> Future[list[OfRow]]:
    """Starts the work on a chunk. Templates are rendered in the main thread of a process, where one
    that does not end can be stopped.
    """
    if data.workers == 1:
        return pool.submit(_encode, _render(chunk, format_name))
    return pool.submit(_prepare, chunk, format_name)


@contextmanager
def workers(
    model: Model, data: Data, choose: Choose | None = None, seed: int = 0
) -> Iterator[Executor]:
    """`data.workers` processes. One worker is this process and a thread: the tokenizer, which has
    threads of its own, encodes in it what is rendered here.

    They are killed if the block that uses them fails or is interrupted.

    Args:
        choose: how lists of answers become pairs; None: the defaults of [choose].
        seed: of the random choices in [choose].
    """
    begin = (model, data, choose or Choose(), seed)
    if data.workers == 1:
        _begin_worker(*begin)
        with ThreadPoolExecutor(1) as encoding:
            yield encoding
        return
    others = active_children()
    with ProcessPoolExecutor(
        data.workers, get_context("spawn"), _begin_process, (os.getpid(), *begin)
    ) as pool:
        try:
            yield pool
        except BaseException:
            for each in active_children():
                if each not in others:
                    each.kill()
            raise


def _begin_process(parent: int, model: Model, data: Data, choose: Choose, seed: int) -> None:
    die_with_parent(parent)
    for number in (
        signal.SIGINT,
        signal.SIGHUP,
    ):  # a terminal sends them to all; the main process answers
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _begin_worker(model, data, choose, seed)


def _begin_worker(model: Model, data: Data, choose: Choose, seed: int) -> None:
    _worker.chat = load_chat(model, data.template_date)
    _worker.data = data
    _worker.chooser = Chooser(choose, seed, _count_tokens)


def _count_tokens(texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in _worker.chat.encoder.encode_plain(texts)]


def _prepare(rows: list[Row], format_name: str) -> list[OfRow]:
    return _encode(_render(rows, format_name))


def _render(rows: list[Row], format_name: str) -> RenderedChunk:
    """The pairs of all rows as text; and for each row its counts, or why it has no pair, and its
    number of pairs.
    """
    pairs: list[PreferencePair] = []
    results: list[OfRow] = []
    counts: list[int] = []
    rows_of_pairs: list[Row] = []
    for row in rows:
        try:
            made = to_pairs(row, format_name, _worker.data, _worker.chooser)
            results.append([made.noted] if made.noted else [])
        except RejectedRow as reason:
            made = MadePairs([])
            results.append([reason])
        pairs += made.pairs
        rows_of_pairs += [row] * len(made.pairs)
        counts.append(len(made.pairs))
    return render_pairs(pairs, _worker.chat, rows_of_pairs), results, counts


def _encode(rendered: RenderedChunk) -> list[OfRow]:
    pairs, results, counts = rendered
    tokenized = iter(encode_pairs(pairs, _worker.chat, _worker.data))
    for of_row_results, count in zip(results, counts, strict=True):
        of_row_results += itertools.islice(tokenized, count)
    return results
