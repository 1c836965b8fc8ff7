"""PairBatch: some pairs as tensors for a model; and LAYOUTS, the ways to arrange them.

A layout is nothing but input ids, position ids, attention, and for every response token the flat
index of the position that predicts it. All layouts give the same scores, but for rounding; a new
one is a function and an entry in the table.

Words: a *sequence* is a run of tokens with positions of its own; a *line* is one index of the first
dimension of the model's input, (lines, L). A padded line holds one sequence; a packed line holds
many, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tbpo_cli.batch.packing import Segments, Sequences, segments_of
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


# The fields of a PairBatch that are tensors; the last two may be None.
TENSORS = (
    "input_ids",
    "position_ids",
    "tokens",
    "predictor",
    "pair_weights",
    "token_keys",
    "reference_logps",
)


@dataclass(frozen=True)
class PairBatch:
    """The model's input for some pairs, and where in it each response token is predicted.

    Args:
        pair_ids: B ids.
        input_ids, position_ids: (lines, L) int64.
        sequences: the attention of a packed line (then there is one line); None where each line is
            one sequence, padded on the right, which causal attention never sees.
        segments: the same as `sequences`, for a varlen kernel.
        tokens: (N,) int64, the response tokens: of all chosen responses, then of all rejected ones.
        predictor: (N,) int64, the flat index (line · L + column) of the position that predicts each
            token.
        chosen, rejected: T may differ; T of the rejected side is 0 if the loss does not read it.
        pair_weights: (B,) fp32, how much each pair counts for in the loss.
        num_tokens: of the pairs, each prompt once, without padding.
        indices: the B indices of the pairs in their store; empty if they come from none.
        token_keys: (lines, L) int64, which token of which pair stands there; None without dropout.
        reference_logps: (N,) fp32, log π_ref of `tokens`, in nats, NaN where it is not known; None
            where nothing reads it.
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
    pair_weights: Tensor
    num_tokens: int
    indices: tuple[int, ...] = ()
    token_keys: Tensor | None = None
    reference_logps: Tensor | None = None

    @property
    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model, which gives some of them to its attention."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
        }
        if self.sequences is not None:
            inputs |= {"sequences": self.sequences, "segments": self.segments}
        return inputs

    def to(self, device: torch.device) -> PairBatch:
        """The batch on a device, by one transfer that the host does not wait for."""
        if device == self.tokens.device:
            return self
        own = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        sides = [part for each in (self.chosen, self.rejected) for part in (each.mask, each.slots)]
        segments = self.segments
        indices = [] if segments is None else list(segments[:3])
        moved = _moved([*own.values(), *sides, *indices], device)
        named: dict[str, Any] = dict(zip(own, moved, strict=False))
        mask, slots, *others = moved[len(own) :]
        chosen = SideBatch(mask, slots)
        rejected = SideBatch(*others[:2])
        if segments is not None:
            key_index, cu_seqlens_q, cu_seqlens_k = others[2:]
            segments = segments._replace(
                key_index=key_index, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
            )
        return replace(self, **named, chosen=chosen, rejected=rejected, segments=segments)


def _moved(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors on a device, by one transfer that the host does not wait for.

    1. Lay them end to end in one int64 tensor; fp32 numbers as the integers of their bits.
    2. Copy it, from pinned memory if the device is a GPU.
    3. Cut it into views, and cast each back to its own type.
    """

    def is_float(part: Tensor) -> bool:
        return part.dtype == torch.float32

    bits = [part.view(torch.int32) if is_float(part) else part for part in parts]
    whole = torch.cat([part.flatten().long() for part in bits])
    if device.type == "cuda":
        whole = whole.pin_memory()
    flats = whole.to(device, non_blocking=True).split([part.numel() for part in parts])
    back = [flat.view(part.shape).to(part.dtype) for flat, part in zip(flats, bits, strict=True)]
    return [
        each.view(torch.float32) if is_float(part) else each
        for each, part in zip(back, parts, strict=True)
    ]


class Arranged(NamedTuple):
    """What a layout makes of pairs: see the fields of the same names of PairBatch."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    sequences: Sequences | None
    predictor: np.ndarray


@dataclass(frozen=True)
class Layout:
    """A layout, and what it costs.

    Args:
        build: pairs → their arrangement.
        num_tokens: (n, 3) lengths of prompt, chosen and rejected of n pairs → tokens that the model
            reads, padding included.
    """

    build: Callable[[Sequence[TokenizedPair]], Arranged]
    num_tokens: Callable[[np.ndarray], int]


def packed(pairs: Sequence[TokenizedPair]) -> Arranged:
    """One packed line, in which each response, behind a copy of its prompt, is a sequence."""
    responses = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    responses += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs if len(pair.rejected_ids)]
    # The last token of a response predicts nothing.
    texts = [np.concatenate([prompt, response[:-1]]) for prompt, response in responses]
    starts = np.cumsum([0, *map(len, texts)])
    predictor = [
        np.arange(len(response)) + start + len(prompt) - 1  # the token before y_t predicts y_t
        for (prompt, response), start in zip(responses, starts, strict=False)
    ]
    positions = np.concatenate([np.arange(len(text)) for text in texts])
    sequences = Sequences(tuple(map(len, texts)), tuple(range(len(texts))))
    ids = np.concatenate(texts)
    return Arranged(ids[None], positions[None], sequences, np.concatenate(predictor))


def padded(pairs: Sequence[TokenizedPair]) -> Arranged:
    """One line a response, behind a copy of its prompt, padded on the right."""
    ids, _, sequences, predictor = packed(pairs)
    assert sequences is not None
    lengths = np.array(sequences.lengths)
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.zeros(mask.shape, dtype=np.int64)
    input_ids[mask] = ids[0]
    positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    return Arranged(input_ids, positions, None, np.flatnonzero(mask)[predictor])


def shared_prompt(pairs: Sequence[TokenizedPair]) -> Arranged:
    """One packed line: [prompt | chosen | rejected] of each pair, positions going on from the
    prompt in both.

    The rejected response continues the prompt and does not see the chosen one.

    1. Append the prompt as a sequence; remember its number and where it ends.
    2. For each response that is there: its first token is predicted by the last token of the
       prompt, the others by the ones before them; all but its last token are appended as a sequence
       that continues the prompt.
    3. Predictors are collected apart for the two sides, and put together as chosen, then rejected.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    lengths: list[int] = []
    continues: list[int] = []
    predictors: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    end = 0
    for pair in pairs:
        prompt_number = len(lengths)
        prompt_length = len(pair.prompt_ids)
        ids.append(np.asarray(pair.prompt_ids))
        positions.append(np.arange(prompt_length))
        lengths.append(prompt_length)
        continues.append(prompt_number)
        end += prompt_length
        last_of_prompt = end - 1
        responses = (pair.chosen_ids, pair.rejected_ids)
        for response, predictor in zip(responses, predictors, strict=True):
            if not len(response):
                continue
            rest = len(response) - 1
            predictor.append(np.concatenate([[last_of_prompt], np.arange(end, end + rest)]))
            if rest:
                ids.append(np.asarray(response[:-1]))
                positions.append(np.arange(prompt_length, prompt_length + rest))
                lengths.append(rest)
                continues.append(prompt_number)
                end += rest
    return Arranged(
        np.concatenate(ids)[None],
        np.concatenate(positions)[None],
        Sequences(tuple(lengths), tuple(continues)),
        np.concatenate([*predictors[0], *predictors[1]]),
    )


def _padded_tokens(lengths: np.ndarray) -> int:
    return int((lengths[:, 1:] > 0).sum() * (lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())


LAYOUTS = {  # the first that a model can take is the fastest
    "shared_prompt": Layout(shared_prompt, lambda lengths: lengths.sum()),
    "packed": Layout(packed, lambda lengths: lengths.sum() + lengths[lengths[:, 2] > 0, 0].sum()),
    "padded": Layout(padded, _padded_tokens),
}


def collate(
    pairs: Sequence[TokenizedPair],
    layout: str,
    indices: tuple[int, ...] = (),
    with_token_keys: bool = False,
) -> PairBatch:
    """The tensors of some pairs in the named layout.

    Args:
        pairs: at least one.
        layout: a name in LAYOUTS.
        indices: those of the pairs in their store.
        with_token_keys: whether `token_keys` is made; then `indices` must be given.
    """
    input_ids, position_ids, sequences, predictor = LAYOUTS[layout].build(pairs)
    responses = [[pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]]
    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for side in responses for ids in side])
    chosen, rejected = (_side(np.array([len(ids) for ids in side])) for side in responses)
    return PairBatch(
        tuple(pair.pair_id for pair in pairs),
        torch.from_numpy(input_ids.astype(np.int64)),
        torch.from_numpy(np.array(position_ids, order="C")),
        sequences,
        None if sequences is None else segments_of(sequences),
        torch.from_numpy(tokens),
        torch.from_numpy(predictor),
        chosen,
        rejected,
        torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
        num_tokens=len(tokens) + sum(len(pair.prompt_ids) for pair in pairs),
        indices=indices,
        token_keys=_token_keys(pairs, layout, indices) if with_token_keys else None,
    )


def _token_keys(pairs: Sequence[TokenizedPair], layout: str, indices: tuple[int, ...]) -> Tensor:
    """(lines, L): a number for each token, made of pair, part (prompt or side) and position.

    They are arranged by the layout as if they were token ids.
    """
    keyed = []
    for pair, index in zip(pairs, indices, strict=True):
        prompt, chosen, rejected = (
            range(first, first + len(ids))
            for first, ids in (
                (index << 26, pair.prompt_ids),
                ((index << 26) + (1 << 24), pair.chosen_ids),
                ((index << 26) + (2 << 24), pair.rejected_ids),
            )
        )
        keyed.append(TokenizedPair(pair.pair_id, prompt, chosen, rejected))
    return torch.from_numpy(LAYOUTS[layout].build(keyed).input_ids.astype(np.int64))


def _side(lengths: np.ndarray) -> SideBatch:
    mask = np.arange(lengths.max()) < lengths[:, None]
    return SideBatch(torch.from_numpy(mask), torch.from_numpy(np.flatnonzero(mask)))


def blank_batch() -> PairBatch:
    """A batch without pairs, with one token for the model: its forward and backward pass adds
    nothing to the sums.
    """
    no_tokens = torch.zeros(0, dtype=torch.int64)
    one_token = torch.zeros(1, 1, dtype=torch.int64)
    side = SideBatch(torch.zeros(0, 0, dtype=torch.bool), no_tokens)
    return PairBatch(
        pair_ids=(),
        input_ids=one_token,
        position_ids=one_token,
        sequences=None,
        segments=None,
        tokens=no_tokens,
        predictor=no_tokens,
        chosen=side,
        rejected=side,
        pair_weights=torch.zeros(0),
        num_tokens=0,
    )
