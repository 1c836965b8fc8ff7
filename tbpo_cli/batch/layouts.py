"""PairBatch: pairs as tensors, in rows for a model; and the LAYOUTS table of such rows.

A layout is nothing but input ids, position ids, attention, and for every response token the flat index of the position
that predicts it. All layouts give the same scores; a new one is a function and a line in the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tbpo_cli.data.tokens import TokenizedPair


@dataclass(frozen=True)
class Sequences:
    """Attention within one row of several sequences, written one after the other without padding.

    Each token sees its own sequence up to itself, and the whole sequence that its own one continues; nothing else.

    Args:
        lengths: tokens of each sequence; their sum is the length of the row.
        continues: for each sequence the number of the one it continues, or its own number.
    """

    lengths: tuple[int, ...]
    continues: tuple[int, ...]


class Segments(NamedTuple):
    """Sequences as queries that each see some keys: their last query the last key, the one before it all but that.

    Args:
        keys: (K,) int64 places in the row of the keys, those of one segment after the other; a prefix stands in each
            segment that continues it.
        query_ends, key_ends: (segments + 1,) int32, the cumulated numbers of queries and of keys, from 0.
        most_queries, most_keys: of a segment.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    def to(self, device: torch.device | str) -> Segments:
        keys, query_ends, key_ends = (part.to(device) for part in self[:3])
        return self._replace(keys=keys, query_ends=query_ends, key_ends=key_ends)


def segments_of(sequences: Sequences) -> Segments:
    """The segments of a row: a sequence right behind the one that it continues shares its segment."""
    ends = itertools.accumulate(sequences.lengths)
    places = [
        np.arange(end - length, end) for end, length in zip(ends, sequences.lengths, strict=True)
    ]
    queries: list[int] = []
    keys: list[np.ndarray] = []
    for number, prefix in enumerate(sequences.continues):
        own = places[number]
        if number != prefix and number - 1 == prefix:
            queries[-1] += len(own)
            keys[-1] = np.concatenate([keys[-1], own])
        else:
            queries.append(len(own))
            keys.append(own if number == prefix else np.concatenate([places[prefix], own]))
    counts = (queries, [len(seen) for seen in keys])
    query_ends, key_ends = (
        torch.from_numpy(np.cumsum([0, *count], dtype=np.int32)) for count in counts
    )
    return Segments(torch.from_numpy(np.concatenate(keys)), query_ends, key_ends, *map(max, counts))


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
        sequences: what sees what in the one row (R = 1); None for plain causal attention in rows of one sequence each,
            padded on the right, where causal attention never looks.
        segments: of the sequences, for a kernel that takes all of them at once.
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
    segments: Segments | None
    tokens: Tensor
    predictor: Tensor
    chosen: SideBatch
    rejected: SideBatch
    num_tokens: int
    indices: tuple[int, ...] = ()

    @property
    def rows(self) -> dict[str, Any]:
        """What a model reads of it; `sequences` and `segments` are on their way to `attend_by_sequence`."""
        inputs = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
        }
        return (
            inputs
            if self.sequences is None
            else inputs | {"sequences": self.sequences, "segments": self.segments}
        )

    def to(self, device: torch.device) -> PairBatch:
        """The batch on a device, by one transfer that the host does not wait for."""
        if device.type == "cpu":
            return self
        sides = (self.chosen, self.rejected)
        parts = [self.input_ids, self.position_ids, self.tokens, self.predictor]
        parts += [part for side in sides for part in (side.mask, side.slots)]
        parts += [] if self.segments is None else self.segments[:3]
        whole = torch.cat([part.flatten().long() for part in parts])
        whole = (whole.pin_memory() if device.type == "cuda" else whole).to(
            device, non_blocking=True
        )
        moved = [
            flat.view(part.shape).to(part.dtype)
            for flat, part in zip(whole.split([part.numel() for part in parts]), parts, strict=True)
        ]
        names = ("input_ids", "position_ids", "tokens", "predictor")
        chosen, rejected = SideBatch(*moved[4:6]), SideBatch(*moved[6:8])
        segments = self.segments
        if segments is not None:
            keys, query_ends, key_ends = moved[8:]
            segments = segments._replace(keys=keys, query_ends=query_ends, key_ends=key_ends)
        moved_rows = dict(zip(names, moved, strict=False))
        return replace(self, **moved_rows, chosen=chosen, rejected=rejected, segments=segments)


Rows = tuple[np.ndarray, np.ndarray, Sequences | None, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """A layout, and what it costs.

    Args:
        build: pairs → `input_ids`, `position_ids`, `sequences` and `predictor` of a PairBatch.
        num_tokens: (n, 3) lengths of prompt, chosen and rejected of n pairs → tokens of their rows, padding included.
    """

    build: Callable[[Sequence[TokenizedPair]], Rows]
    num_tokens: Callable[[np.ndarray], int]


def packed(pairs: Sequence[TokenizedPair]) -> Rows:
    """One row for everything: each response behind a copy of its prompt."""
    texts = [(pair.prompt_ids, ids) for side in ("chosen_ids", "rejected_ids") for pair in pairs
             if len(ids := getattr(pair, side))]  # fmt: skip
    rows = [
        np.concatenate([prompt, response[:-1]]) for prompt, response in texts
    ]  # the last token predicts nothing
    starts = np.cumsum([0, *map(len, rows)])
    predictor = [
        np.arange(len(response)) + start + len(prompt) - 1  # the token before y_t predicts y_t
        for (prompt, response), start in zip(texts, starts, strict=False)
    ]
    positions = np.concatenate([np.arange(len(row)) for row in rows])
    sequences = Sequences(tuple(map(len, rows)), tuple(range(len(rows))))
    return np.concatenate(rows)[None], positions[None], sequences, np.concatenate(predictor)


def padded(pairs: Sequence[TokenizedPair]) -> Rows:
    """One row a response, padded on the right."""
    ids, _, sequences, predictor = packed(pairs)
    assert sequences is not None
    lengths = np.array(sequences.lengths)
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.zeros(mask.shape, dtype=np.int64)
    input_ids[mask] = ids[0]
    return (
        input_ids,
        np.broadcast_to(np.arange(mask.shape[1]), mask.shape),
        None,
        np.flatnonzero(mask)[predictor],
    )


def shared_prompt(pairs: Sequence[TokenizedPair]) -> Rows:
    """One row for everything: [prompt | chosen | rejected] of each pair, positions restarting after the prompt.

    The rejected response continues the prompt and does not see the chosen one.
    """
    ids, positions = [], []
    lengths: list[int] = []
    continues: list[int] = []
    predictors: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    end = 0
    for pair in pairs:
        prompt, prompt_length = len(lengths), len(pair.prompt_ids)
        ids.append(np.asarray(pair.prompt_ids))
        positions.append(np.arange(prompt_length))
        lengths.append(prompt_length)
        continues.append(prompt)
        end += prompt_length
        last_of_prompt = end - 1
        for response, predictor in zip(
            (pair.chosen_ids, pair.rejected_ids), predictors, strict=True
        ):
            if not len(response):
                continue
            rest = len(response) - 1
            predictor.append(np.concatenate([[last_of_prompt], np.arange(end, end + rest)]))
            if rest:
                ids.append(np.asarray(response[:-1]))
                positions.append(np.arange(prompt_length, prompt_length + rest))
                lengths.append(rest)
                continues.append(prompt)
                end += rest
    sequences = Sequences(tuple(lengths), tuple(continues))
    predictor = np.concatenate([*predictors[0], *predictors[1]])
    return np.concatenate(ids)[None], np.concatenate(positions)[None], sequences, predictor


def _padded_tokens(lengths: np.ndarray) -> int:
    return int((lengths[:, 1:] > 0).sum() * (lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())


LAYOUTS = {  # the first that a model can take is the fastest
    "shared_prompt": Layout(shared_prompt, lambda lengths: lengths.sum()),
    "packed": Layout(packed, lambda lengths: lengths.sum() + lengths[lengths[:, 2] > 0, 0].sum()),
    "padded": Layout(padded, _padded_tokens),
}


def collate(
    pairs: Sequence[TokenizedPair], layout: str, indices: tuple[int, ...] = ()
) -> PairBatch:
    """The tensors of some pairs, in rows of the named layout; `indices` are the pairs' places in their store."""
    input_ids, position_ids, sequences, predictor = LAYOUTS[layout].build(pairs)
    responses = [[pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]]
    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for side in responses for ids in side])
    chosen, rejected = (_side(np.array([len(ids) for ids in side])) for side in responses)
    return PairBatch(
        tuple(pair.pair_id for pair in pairs),
        torch.from_numpy(input_ids.astype(np.int64)),
        torch.from_numpy(np.array(position_ids)),
        sequences,
        None if sequences is None else segments_of(sequences),
        torch.from_numpy(tokens),
        torch.from_numpy(predictor),
        chosen,
        rejected,
        num_tokens=len(tokens) + sum(len(pair.prompt_ids) for pair in pairs),
        indices=indices,
    )


def _side(lengths: np.ndarray) -> SideBatch:
    mask = np.arange(lengths.max()) < lengths[:, None]
    return SideBatch(torch.from_numpy(mask), torch.from_numpy(np.flatnonzero(mask)))


def blank_batch() -> PairBatch:
    """No pair, in a row of one token: a pass through the model, forward and backward, that adds nothing to a sum."""
    none, row = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    side = SideBatch(torch.zeros(0, 0, dtype=torch.bool), none)
    return PairBatch((), row, row, None, None, none, none, side, side, num_tokens=0)
