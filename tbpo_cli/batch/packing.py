"""Several sequences in one line of the model's input: which tokens each of them attends to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Causal attention within one packed line: which earlier tokens each token sees.

    A token sees its own sequence up to itself, and the whole of the sequence that its own one
    continues.

    Args:
        lengths: tokens of each sequence; their sum is L, the length of the line.
        continues: for each sequence the number of the one it continues (a prompt), or its own
            number.
    """

    lengths: tuple[int, ...]
    continues: tuple[int, ...]


class Segments(NamedTuple):
    """The same attention for a varlen kernel: causal, bottom-right aligned, one segment after the
    other.

    In a segment with q queries and k ≥ q keys, query i sees the first k − q + i + 1 keys.

    Args:
        key_index: (K,) int64, the position in the line of each key. A prompt that several responses
            continue stands once in the segment of each.
        cu_seqlens_q, cu_seqlens_k: (segments + 1,) int32, cumulative numbers of queries and of
            keys, from 0.
        max_seqlen_q, max_seqlen_k: the largest number of queries and of keys of a segment.
        repeats_keys: whether a prompt's keys stand in several segments; else `key_index` counts
            from 0.
    """

    key_index: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    repeats_keys: bool

    def to(self, device: torch.device | str) -> Segments:
        """The same on a device."""
        key_index, cu_seqlens_q, cu_seqlens_k = (part.to(device) for part in self[:3])
        return self._replace(
            key_index=key_index, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
        )


def segments_of(sequences: Sequences) -> Segments:
    """The segments of a packed line.

    1. Find the positions of each sequence in the line.
    2. A sequence that continues nothing opens a segment whose queries and keys are its own
       positions.
    3. A sequence that stands directly behind the one it continues joins that segment: both together
       are plain causal attention, so the prompt's keys are not repeated.
    4. Any other continuing sequence opens a segment: its queries are its own positions, its keys
       are those of the prompt followed by its own.
    5. Queries stay in the order of the line, so only their numbers are kept; keys are kept as an
       index.

    Returns:
        Tensors on the CPU.
    """
    ends = itertools.accumulate(sequences.lengths)
    positions = [
        np.arange(end - length, end) for end, length in zip(ends, sequences.lengths, strict=True)
    ]
    num_queries: list[int] = []
    keys: list[np.ndarray] = []
    for number, prefix in enumerate(sequences.continues):
        own = positions[number]
        if number == prefix:
            num_queries.append(len(own))
            keys.append(own)
        elif number - 1 == prefix:
            num_queries[-1] += len(own)
            keys[-1] = np.concatenate([keys[-1], own])
        else:
            num_queries.append(len(own))
            keys.append(np.concatenate([positions[prefix], own]))
    num_keys = [len(seen) for seen in keys]
    cu_seqlens_q, cu_seqlens_k = (
        torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32))
        for counts in (num_queries, num_keys)
    )
    key_index = torch.from_numpy(np.concatenate(keys))
    repeats = num_keys != num_queries
    return Segments(key_index, cu_seqlens_q, cu_seqlens_k, max(num_queries), max(num_keys), repeats)
