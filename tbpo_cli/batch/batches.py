"""Which pairs a step holds, how they are cut, and in which micro-batches: pure functions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tbpo_cli.batch.layouts import LAYOUTS, PairBatch, collate
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokens import TokenizedPair


def cut_to_span(pair: TokenizedPair, span: str) -> TokenizedPair:
    """Only what a loss with that span reads: with causal attention, a dropped tail cannot matter."""
    if span == "aligned":
        length = pair.aligned_length
        return TokenizedPair(
            pair.pair_id, pair.prompt_ids, pair.chosen_ids[:length], pair.rejected_ids[:length]
        )
    if span == "chosen":
        return TokenizedPair(pair.pair_id, pair.prompt_ids, pair.chosen_ids, ())
    return pair


def span_lengths(store: PairStore, indices: Sequence[int], span: str) -> np.ndarray:
    """(n, 3) tokens of prompt, chosen and rejected that a loss with that span reads, of n pairs."""
    lengths: np.ndarray = store.lengths[list(indices)]
    if span == "aligned":
        lengths[:, 1:] = lengths[:, 1:].min(axis=1, keepdims=True)
    elif span == "chosen":
        lengths[:, 2] = 0
    return lengths


def longest_sequence(stores: Iterable[PairStore]) -> int:
    """Tokens of the longest prompt with one of its responses."""
    lengths = np.concatenate([store.lengths for store in stores])
    return int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())


def collate_all(
    store: PairStore, indices: Sequence[int], max_tokens: int, span: str, layout: str
) -> Iterator[PairBatch]:
    """The micro-batches of some pairs, cut to the span; see `micro_batches`."""
    for group in micro_batches(span_lengths(store, indices, span), max_tokens, layout):
        places = tuple(indices[number] for number in group)
        yield collate([cut_to_span(store[place], span) for place in places], layout, places)


@functools.lru_cache(maxsize=2)
def epoch_order(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the pairs: a function of its arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_pairs)


def step_indices(num_pairs: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The pairs of an optimiser step (from 0). Epochs follow one another without a gap, so every step is full."""
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
    """A step's pairs, sorted by length and cut so that no batch has more tokens than allowed, padding included.

    A pair that is longer on its own stays alone.

    Args:
        lengths: (n, 3) tokens of prompt, chosen and rejected, from `span_lengths`.

    Returns:
        The numbers of the pairs of each micro-batch, within 0 … n − 1; no micro-batch without pairs.
    """
    order = np.argsort(lengths.sum(axis=1), kind="stable")
    cuts, first = [], 0
    for last in range(1, len(order)):
        if LAYOUTS[layout].num_tokens(lengths[order[first : last + 1]]) > max_tokens:
            cuts.append(last)
            first = last
    return np.split(order, cuts) if len(order) else []
