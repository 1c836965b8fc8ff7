"""The pairs of an optimiser step, cut to what the loss reads, in micro-batches: pure functions."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from tbpo_cli.batch.layouts import LAYOUTS, PairBatch, collate
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokens import TokenizedPair


def cut_to_span(pair: TokenizedPair, span: str) -> TokenizedPair:
    """The pair with only the tokens that a loss of that span reads.

    With causal attention, what stands behind them cannot change their scores.
    """
    if span == "aligned":
        length = pair.aligned_length
        chosen = pair.chosen_ids[:length]
        return replace(pair, chosen_ids=chosen, rejected_ids=pair.rejected_ids[:length])
    if span == "aligned_and_chosen":
        return replace(pair, rejected_ids=pair.rejected_ids[: pair.aligned_length])
    if span == "chosen":
        return replace(pair, rejected_ids=())
    return pair


def span_lengths(store: PairStore, indices: Sequence[int], span: str) -> np.ndarray:
    """(n, 3) tokens of prompt, chosen and rejected that a loss with that span reads, of n pairs."""
    lengths: np.ndarray = store.lengths[list(indices)]
    if span == "aligned":
        lengths[:, 1:] = lengths[:, 1:].min(axis=1, keepdims=True)
    elif span == "aligned_and_chosen":
        lengths[:, 2] = lengths[:, 1:].min(axis=1)
    elif span == "chosen":
        lengths[:, 2] = 0
    return lengths


def deal(lengths: np.ndarray, num_processes: int) -> list[list[int]]:
    """Divides pairs among processes so that these have about equally many tokens.

    From the longest pair on, each goes to the process with the fewest tokens so far.
    Source: Graham, "Bounds on multiprocessing timing anomalies" (1969): at most 4/3 of the optimum.

    Args:
        lengths: (n,) tokens of the pairs.

    Returns:
        For each process the places of its pairs in `lengths`, ascending.
    """
    parts: list[list[int]] = [[] for _ in range(num_processes)]
    totals = [(0, number) for number in range(num_processes)]
    for place in np.argsort(-lengths, kind="stable"):
        total, number = heapq.heappop(totals)
        parts[number].append(int(place))
        heapq.heappush(totals, (total + int(lengths[place]), number))
    return [sorted(part) for part in parts]


def longest_sequence(stores: Iterable[PairStore]) -> int:
    """Tokens of the longest prompt with one of its responses."""
    lengths = np.concatenate([store.lengths for store in stores])
    return int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())


def collate_all(
    store: PairStore,
    indices: Sequence[int],
    max_tokens: int,
    span: str,
    layout: str,
    with_token_keys: bool = False,
) -> Iterator[PairBatch]:
    """The pairs of the store at these indices, cut to the span, in micro-batches: see
    `micro_batches`.
    """
    for group in micro_batches(span_lengths(store, indices, span), max_tokens, layout):
        of_group = tuple(indices[number] for number in group)
        pairs = [cut_to_span(store[index], span) for index in of_group]
        yield collate(pairs, layout, of_group, with_token_keys)


@functools.lru_cache(maxsize=2)
def epoch_order(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the pairs: a function of its arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_pairs)


def step_indices(num_pairs: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The pairs of an optimiser step (from 0). Epochs follow one another without a gap, so every
    step is full.
    """
    visits = (
        divmod(position, num_pairs)
        for position in range(step * batch_size, (step + 1) * batch_size)
    )
    return [int(epoch_order(num_pairs, seed, epoch)[offset]) for epoch, offset in visits]


def num_steps(num_pairs: int, batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Optimiser steps of a training."""
    if max_steps is not None:
        return max_steps
    assert epochs is not None
    return max(1, round(epochs * num_pairs / batch_size))


def micro_batches(lengths: np.ndarray, max_tokens: int, layout: str) -> list[np.ndarray]:
    """Groups of pairs of like length, none with more than `max_tokens` tokens, padding included.

    A pair that has more tokens than that is a group of its own.

    Args:
        lengths: (n, 3) tokens of prompt, chosen and rejected, from `span_lengths`.

    Returns:
        For each micro-batch the numbers of its pairs, 0 to n − 1; there is no micro-batch without
        pairs.
    """
    order = np.argsort(lengths.sum(axis=1), kind="stable")
    cuts = []
    first = 0
    for last in range(1, len(order)):
        if LAYOUTS[layout].num_tokens(lengths[order[first : last + 1]]) > max_tokens:
            cuts.append(last)
            first = last
    return np.split(order, cuts) if len(order) else []
