"""PairBatch: pairs as tensors. Which pairs a step holds, and how it is cut, are pure functions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tbpo_cli.data.layouts import LAYOUTS, Sequences
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokens import TokenizedPair


@dataclass(frozen=True)
class SideBatch:
    """Where the response tokens of one side belong.

    Args:
        mask: (B, T) bool, left-aligned.
        slots: the flat indices (pair · T + t) of the True values of the mask, int64.
    """

    mask: Tensor
    slots: Tensor


@dataclass(frozen=True)
class PairBatch:
    """Rows for the model, and where in them each response token is predicted.

    Args:
        pair_ids: B ids.
        input_ids, position_ids: (R, L) int64.
        sequences: what sees what within a row; None for rows of one sequence each (see `data/layouts.py`).
        tokens: (N,) int64 response tokens: those of all chosen responses, then those of the rejected ones.
        predictor: (N,) int64, the flat index (row · L + column) of the position that predicts each token.
        chosen, rejected: T may differ; T of the rejected side is 0 if the loss does not read it.
        num_tokens: of the pairs, each prompt once, without padding.
        indices: the B places of the pairs in their store, if they are from one.
    """

    pair_ids: tuple[str, ...]
    input_ids: Tensor
    position_ids: Tensor
    sequences: Sequences | None
    tokens: Tensor
    predictor: Tensor
    chosen: SideBatch
    rejected: SideBatch
    num_tokens: int
    indices: tuple[int, ...] = ()

    def to(self, device: torch.device) -> PairBatch:
        """The batch on a device, by one transfer that the host does not wait for."""
        if device.type == "cpu":
            return self
        sides = (self.chosen, self.rejected)
        parts = [self.input_ids, self.position_ids, self.tokens, self.predictor]
        parts += [part for side in sides for part in (side.mask, side.slots)]
        whole = torch.cat([part.flatten().long() for part in parts])
        whole = (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
        moved = [
            flat.view(part.shape).to(part.dtype)
            for flat, part in zip(whole.split([part.numel() for part in parts]), parts, strict=True)
        ]
        names = ("input_ids", "position_ids", "tokens", "predictor")
        chosen, rejected = SideBatch(*moved[4:6]), SideBatch(*moved[6:8])
        return replace(self, **dict(zip(names, moved, strict=False)), chosen=chosen, rejected=rejected)


def cut_to_span(pair: TokenizedPair, span: str) -> TokenizedPair:
    """Only what a loss with that span reads: with causal attention, a dropped tail cannot matter."""
    if span == "aligned":
        length = pair.aligned_length
        return TokenizedPair(pair.pair_id, pair.prompt_ids, pair.chosen_ids[:length], pair.rejected_ids[:length])
    if span == "chosen":
        return TokenizedPair(pair.pair_id, pair.prompt_ids, pair.chosen_ids, ())
    return pair


def span_lengths(store: PairStore, indices: Sequence[int], span: str) -> np.ndarray:
    """(n, 3) tokens of prompt, chosen and rejected that a loss with that span reads, of n pairs."""
    index = np.asarray(indices, dtype=np.int64)
    columns = (store.prompt_lengths, store.chosen_lengths, store.rejected_lengths)
    lengths = np.stack([column[index] for column in columns], axis=1).astype(np.int64)
    if span == "aligned":
        lengths[:, 1:] = lengths[:, 1:].min(axis=1, keepdims=True)
    elif span == "chosen":
        lengths[:, 2] = 0
    return lengths


def longest_sequence(stores: Iterable[PairStore]) -> int:
    """Tokens of the longest prompt with one of its responses."""
    lengths = [span_lengths(store, range(len(store)), "response") for store in stores if len(store)]
    return max(int((each[:, 0] + each[:, 1:].max(axis=1)).max()) for each in lengths)


def collate(pairs: Sequence[TokenizedPair], layout: str) -> PairBatch:
    """The tensors of some pairs, in rows of the named layout."""
    rows = LAYOUTS[layout].build(pairs)
    responses = [[pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]]
    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for side in responses for ids in side])
    chosen, rejected = (_side(np.array([len(ids) for ids in side])) for side in responses)
    return PairBatch(
        tuple(pair.pair_id for pair in pairs),
        torch.from_numpy(rows.input_ids.astype(np.int64)),
        torch.from_numpy(np.array(rows.position_ids)),
        rows.sequences,
        torch.from_numpy(tokens),
        torch.from_numpy(rows.predictor),
        chosen,
        rejected,
        num_tokens=len(tokens) + sum(len(pair.prompt_ids) for pair in pairs),
    )


def blank_batch() -> PairBatch:
    """No pair, in a row of one token: a pass through the model, forward and backward, that adds nothing to a sum."""
    none, row = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    side = SideBatch(torch.zeros(0, 0, dtype=torch.bool), none)
    return PairBatch((), row, row, None, none, none, side, side, num_tokens=0)


def collate_all(
    store: PairStore, indices: Sequence[int], max_tokens: int, span: str, layout: str
) -> Iterator[PairBatch]:
    """The micro-batches of some pairs, cut to the span; see `micro_batches`."""
    for group in micro_batches(span_lengths(store, indices, span), max_tokens, layout):
        places = tuple(indices[number] for number in group)
        yield replace(collate([cut_to_span(store[place], span) for place in places], layout), indices=places)


def _side(lengths: np.ndarray) -> SideBatch:
    mask = np.arange(lengths.max()) < lengths[:, None]
    return SideBatch(torch.from_numpy(mask), torch.from_numpy(np.flatnonzero(mask)))


@functools.lru_cache(maxsize=2)
def epoch_order(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the pairs: a function of its arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_pairs)


def step_indices(num_pairs: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The pairs of an optimiser step (from 0). Epochs follow one another without a gap, so every step is full."""
    first = step * batch_size
    indices = []
    for position in range(first, first + batch_size):
        epoch, offset = divmod(position, num_pairs)
        indices.append((epoch, offset))
    orders = {epoch: epoch_order(num_pairs, seed, epoch) for epoch, _ in indices}
    return [int(orders[epoch][offset]) for epoch, offset in indices]


def num_steps(num_pairs: int, batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Optimiser steps of a training."""
    if max_steps is not None:
        return max_steps
    assert epochs is not None
    return max(1, round(epochs * num_pairs / batch_size))


def micro_batches(lengths: np.ndarray, max_tokens: int, layout: str) -> list[np.ndarray]:
    """A step's pairs, sorted by length and cut so that no batch has more tokens than allowed, padding included (a pair
    that is longer on its own stays alone).

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
