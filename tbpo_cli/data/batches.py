"""PairBatch: pairs as tensors. Which pairs a step holds, and how it is cut, are pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokens import TokenizedPair


@dataclass(frozen=True)
class SideBatch:
    """One side of a batch of pairs, response-relative.

    Args:
        tokens: (B, T) int64 response tokens, 0 where the mask is False.
        mask: (B, T) bool, left-aligned.
        predictor: (B, T) int64, the flat index (row · L + column) of the position that predicts each token.
    """

    tokens: Tensor
    mask: Tensor
    predictor: Tensor


@dataclass(frozen=True)
class PairBatch:
    """Rows for the model, and where in them each response token is predicted.

    Args:
        pair_ids: B ids.
        input_ids: (R, L) int64. Rows are padded on the right, where causal attention never looks.
        position_ids: (R, L) int64.
        chosen, rejected: T may differ; T of the rejected side is 0 if the loss does not read it.
    """

    pair_ids: tuple[str, ...]
    input_ids: Tensor
    position_ids: Tensor
    chosen: SideBatch
    rejected: SideBatch

    def to(self, device: torch.device) -> PairBatch:
        def side(batch: SideBatch) -> SideBatch:
            return SideBatch(*(getattr(batch, name).to(device) for name in ("tokens", "mask", "predictor")))

        return PairBatch(
            self.pair_ids,
            self.input_ids.to(device),
            self.position_ids.to(device),
            side(self.chosen),
            side(self.rejected),
        )


def cut_to_span(pair: TokenizedPair, span: str) -> TokenizedPair:
    """Only what a loss with that span reads: with causal attention, a dropped tail cannot matter."""
    if span == "aligned":
        length = pair.aligned_length
        return TokenizedPair(pair.pair_id, pair.prompt_ids, pair.chosen_ids[:length], pair.rejected_ids[:length])
    if span == "chosen":
        return TokenizedPair(pair.pair_id, pair.prompt_ids, pair.chosen_ids, ())
    return pair


def collate_padded(pairs: Sequence[TokenizedPair]) -> PairBatch:
    """One row a response, padded on the right: all chosen rows, then all rejected ones (if there are any)."""
    rows: list[np.ndarray] = []
    sides = []
    for responses in ([pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]):
        if any(len(response) for response in responses):
            sides.append((responses, len(rows)))
            rows += [np.concatenate([pair.prompt_ids, r]) for pair, r in zip(pairs, responses, strict=True)]
        else:
            sides.append((responses, 0))
    # The last token of a row predicts nothing.
    length = max(len(row) for row in rows) - 1
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row) - 1] = row[:-1]
    positions = torch.arange(length).expand(len(rows), length)
    chosen, rejected = (_side(pairs, responses, first, length) for responses, first in sides)
    return PairBatch(tuple(pair.pair_id for pair in pairs), torch.from_numpy(input_ids), positions, chosen, rejected)


def _side(
    pairs: Sequence[TokenizedPair], responses: Sequence[Sequence[int]], first_row: int, row_length: int
) -> SideBatch:
    width = max(len(response) for response in responses)
    tokens = np.zeros((len(pairs), width), dtype=np.int64)
    mask = np.zeros((len(pairs), width), dtype=bool)
    predictor = np.zeros((len(pairs), width), dtype=np.int64)
    for number, (pair, response) in enumerate(zip(pairs, responses, strict=True)):
        count = len(response)
        tokens[number, :count] = response
        mask[number, :count] = True
        start = (first_row + number) * row_length + len(pair.prompt_ids) - 1  # the token before y_t predicts y_t
        predictor[number, :count] = np.arange(start, start + count)
    return SideBatch(torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(predictor))


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
    return max_steps if max_steps is not None else max(1, round(epochs * num_pairs / batch_size))


def micro_batches(store: PairStore, indices: Sequence[int], max_tokens: int, span: str) -> list[list[TokenizedPair]]:
    """A step's pairs, cut to the span, sorted by length and split so that no batch has more padded tokens than allowed
    (a pair that is longer on its own stays alone)."""
    pairs = [cut_to_span(store[index], span) for index in indices]
    pairs.sort(key=lambda pair: (_row_length(pair), pair.pair_id))
    batches: list[list[TokenizedPair]] = []
    for pair in pairs:
        rows = 1 + bool(len(pair.rejected_ids))
        if batches and (len(batches[-1]) + 1) * rows * _row_length(pair) <= max_tokens:
            batches[-1].append(pair)
        else:
            batches.append([pair])
    return batches


def _row_length(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
