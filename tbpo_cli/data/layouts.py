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


def padded(pairs: Sequence[TokenizedPair]) -> Rows:
    """One row a response, padded on the right."""
    sides = _sides(pairs)
    rows = [_row(pair, response) for responses in sides for pair, response in zip(pairs, responses, strict=True)]
    length = max(map(len, rows))
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = row
    position_ids = np.broadcast_to(np.arange(length), input_ids.shape)
    return Rows(input_ids, position_ids, None, _predictors(pairs, sides, range(0, length * len(rows), length)))


def packed(pairs: Sequence[TokenizedPair]) -> Rows:
    """One row for everything: each response behind a copy of its prompt."""
    sides = _sides(pairs)
    rows = [_row(pair, response) for responses in sides for pair, response in zip(pairs, responses, strict=True)]
    lengths = [len(row) for row in rows]
    positions = np.concatenate([np.arange(length) for length in lengths])
    starts = np.cumsum([0, *lengths[:-1]])
    sequences = Sequences(tuple(lengths), tuple(range(len(lengths))))
    return Rows(np.concatenate(rows)[None], positions[None], sequences, _predictors(pairs, sides, starts))


def shared_prompt(pairs: Sequence[TokenizedPair]) -> Rows:
    """One row for everything: [prompt | chosen | rejected] of each pair, positions restarting after the prompt.

    The rejected response continues the prompt and does not see the chosen one.
    """
    ids, positions, lengths, continues = [], [], [], []
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


def _sides(pairs: Sequence[TokenizedPair]) -> list[list[Sequence[int]]]:
    """The chosen responses, and the rejected ones if there are any."""
    sides = [[pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]]
    return sides if any(map(len, sides[1])) else sides[:1]


def _row(pair: TokenizedPair, response: Sequence[int]) -> np.ndarray:
    """Prompt and response without its last token, which predicts nothing."""
    return np.concatenate([pair.prompt_ids, response[:-1]]).astype(np.int64)


def _predictors(
    pairs: Sequence[TokenizedPair], sides: list[list[Sequence[int]]], starts: Sequence[int] | np.ndarray
) -> np.ndarray:
    """For rows that begin at `starts`: the token before y_t predicts y_t."""
    prompts = [len(pair.prompt_ids) for _ in sides for pair in pairs]
    responses = [len(response) for responses in sides for response in responses]
    firsts = (start + prompt - 1 for start, prompt in zip(starts, prompts, strict=True))
    return np.concatenate([np.arange(first, first + n) for first, n in zip(firsts, responses, strict=True)])


def _num_responses(lengths: np.ndarray) -> int:
    return 1 + bool(lengths[:, 2].any())


LAYOUTS = {  # the first that a model can take is the fastest
    "shared_prompt": Layout(shared_prompt, lambda lengths: int(lengths.sum())),
    "packed": Layout(packed, lambda lengths: int((lengths[:, 0] * (lengths[:, 2] > 0)).sum() + lengths.sum())),
    "padded": Layout(
        padded,
        lambda lengths: (
            len(lengths) * _num_responses(lengths) * int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())
        ),
    ),
}
