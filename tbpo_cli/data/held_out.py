"""Held-out pairs: an exact share of the prompts, and none that the training rows repeat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tbpo_cli.data.pairs import draw
from tbpo_cli.data.store import PairStore, pair_writer

LEAST_PROMPTS = 20
LEAST_SHARE = 0.05
NGRAM = 8
ROWS = 10_000  # written at a time


def held_out_prompts(prompts: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The prompts that are held out: round(fraction · all), those that the seed draws first.

    At least 20, or 5 % where that is fewer; at least one, and not all.

    Args:
        prompts: hashes, each as often as it occurs.
    """
    drawn = sorted({*prompts}, key=lambda prompt: (draw(seed, prompt), prompt))
    if fraction == 0:
        return set()
    least = min(LEAST_PROMPTS, round(LEAST_SHARE * len(drawn)))
    number = max(round(fraction * len(drawn)), least, 1)
    return {*drawn[: min(number, len(drawn) - 1)]}


def split_off(folder: Path, into: Path, is_held_out: np.ndarray) -> None:
    """Moves pairs of one split to another.

    Args:
        folder, into: of the two splits; the second is made.
        is_held_out: (n,) bool, of each pair.
    """
    pairs = PairStore(folder).table
    for target, mask in ((into, is_held_out), (folder, ~is_held_out)):
        with pair_writer(target) as writer:
            for start in range(0, len(mask), ROWS):
                part = pairs.slice(start, ROWS).filter(mask[start : start + ROWS])
                writer.write_table(part.combine_chunks())


def drop_overlapping(evaluation: Path, training: Path, threshold: float) -> np.ndarray:
    """Leaves out the held-out pairs whose prompts occur in the training pairs.

    1. Take away what all held-out prompts begin and end with: that is the template's.
    2. Hash each run of 8 tokens of every prompt.
    3. Hash those of each training pair, its prompt and both responses, and mark the ones found.
    4. Leave out a prompt of which at least the share `threshold` is found. One of fewer than 8
       tokens is never left out.

    Source: the decontamination of Tulu 3, arXiv 2411.15124, section 3.2: 8-grams of tokens, more
    than half of them found; here of all training pairs together, not of a single one.

    Returns:
        (n,) bool, the pairs that were left out.
    """
    store = PairStore(evaluation)
    train = PairStore(training)
    prompts = [np.asarray(store[index].prompt_ids) for index in range(len(store))]
    start, end = _shared(prompts)
    grams = [_ngrams(ids[start : len(ids) - end]) for ids in prompts]
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *grams]))
    found = np.zeros(len(wanted), dtype=bool)
    for index in range(len(train)):
        pair = train[index]
        for response in (pair.chosen_ids, pair.rejected_ids):
            text = np.concatenate([np.asarray(pair.prompt_ids)[start:], np.asarray(response)])
            found |= np.isin(wanted, _ngrams(text))
    known = wanted[found]
    overlaps = np.array(
        [len(gram) > 0 and float(np.isin(gram, known).mean()) >= threshold for gram in grams],
        dtype=bool,
    )
    if overlaps.any():
        aside = evaluation.with_name(f".{evaluation.name}-left-out")
        split_off(evaluation, aside, overlaps)
        (aside / "pairs.arrow").unlink()
        aside.rmdir()
    return overlaps


def _shared(prompts: Sequence[np.ndarray]) -> tuple[int, int]:
    """Numbers of tokens that all prompts begin with, and end with; none where there is but one."""
    if len(prompts) < 2:
        return 0, 0
    shortest = min(map(len, prompts))
    first, last = (
        np.stack([ids[:shortest] for ids in prompts]),
        np.stack([ids[len(ids) - shortest :][::-1] for ids in prompts]),
    )
    counts = [
        int((~np.append((table == table[0]).all(axis=0), False)).argmax())
        for table in (first, last)
    ]
    return counts[0], min(counts[1], shortest - counts[0])


def _ngrams(ids: np.ndarray) -> np.ndarray:
    """(m,) uint64, a hash of each run of 8 tokens, modulo 2⁶⁴."""
    if len(ids) < NGRAM:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64) + np.uint64(1), NGRAM)
    powers = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(1, NGRAM + 1)], np.uint64)
    hashes: np.ndarray = (windows * powers).sum(axis=1, dtype=np.uint64)
    return hashes
