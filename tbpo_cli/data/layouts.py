"""Row layouts: how the prompts and responses of some pairs become rows for a model, and the LAYOUTS table.

A layout is nothing but input ids, position ids, attention, and for every response token the flat index of the position
that predicts it. All layouts give the same scores; a new one is a function and a line in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

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


@dataclass(frozen=True)
class Rows:
    """What a layout makes of some pairs.

    Args:
        input_ids, position_ids: (R, L) int64.
        sequences: what sees what in the one row (R = 1); None for plain causal attention in rows of one sequence each,
            padded on the right, where causal attention never looks.
        predictor: (N,) int64, for each response token the flat index (row · L + column) of the position that predicts
            it: the chosen responses of all pairs, then the rejected ones.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    sequences: Sequences | None
    predictor: np.ndarray


@dataclass(frozen=True)
class Layout:
    """A layout, and what it costs.

    Args:
        build: pairs → rows.
        num_tokens: (n, 3) lengths of prompt, chosen and rejected of n pairs → tokens of their rows, padding included.
    """

    build: Callable[[Sequence[TokenizedPair]], Rows]
    num_tokens: Callable[[np.ndarray], int]


def packed(pairs: Sequence[TokenizedPair]) -> Rows:
    """One row for everything: each response behind a copy of its prompt."""
    texts = [(pair.prompt_ids, ids) for side in ("chosen_ids", "rejected_ids") for pair in pairs
             if len(ids := getattr(pair, side))]  # fmt: skip
    rows = [np.concatenate([prompt, response[:-1]]) for prompt, response in texts]  # the last token predicts nothing
    starts = np.cumsum([0, *map(len, rows)])
    predictor = [
        np.arange(len(response)) + start + len(prompt) - 1  # the token before y_t predicts y_t
        for (prompt, response), start in zip(texts, starts, strict=False)
    ]
    positions = np.concatenate([np.arange(len(row)) for row in rows])
    sequences = Sequences(tuple(map(len, rows)), tuple(range(len(rows))))
    return Rows(np.concatenate(rows)[None], positions[None], sequences, np.concatenate(predictor))


def padded(pairs: Sequence[TokenizedPair]) -> Rows:
    """One row a response, padded on the right."""
    whole = packed(pairs)
    assert whole.sequences is not None
    lengths = np.array(whole.sequences.lengths)
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.zeros(mask.shape, dtype=np.int64)
    input_ids[mask] = whole.input_ids[0]
    position_ids = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    return Rows(input_ids, position_ids, None, np.flatnonzero(mask)[whole.predictor])


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
        for response, predictor in zip((pair.chosen_ids, pair.rejected_ids), predictors, strict=True):
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
    return Rows(np.concatenate(ids)[None], np.concatenate(positions)[None], sequences, predictor)


def _padded_tokens(lengths: np.ndarray) -> int:
    return int((lengths[:, 1:] > 0).sum() * (lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())


LAYOUTS = {  # the first that a model can take is the fastest
    "shared_prompt": Layout(shared_prompt, lambda lengths: lengths.sum()),
    "packed": Layout(packed, lambda lengths: lengths.sum() + lengths[lengths[:, 2] > 0, 0].sum()),
    "padded": Layout(padded, _padded_tokens),
}
