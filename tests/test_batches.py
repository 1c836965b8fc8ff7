"""The batches of a step: which pairs, how long, and how they are cut into micro-batches."""

import numpy as np
import pytest
import torch

from tbpo_cli.batch.batches import (
    collate_all,
    deal,
    longest_sequence,
    micro_batches,
    num_steps,
    span_lengths,
)
from tbpo_cli.batch.layouts import LAYOUTS, blank_batch
from tbpo_cli.batch.packing import Sequences, segments_of
from tbpo_cli.data.store import PairStore, pair_writer, record_batch
from tbpo_cli.data.tokens import TokenizedPair

LENGTHS = [(3, 2, 4), (5, 6, 1), (2, 2, 2)]  # tokens of prompt, chosen, rejected


def make_store(folder, lengths):
    pairs = [
        TokenizedPair(str(number), *(list(range(1, length + 1)) for length in of_pair))
        for number, of_pair in enumerate(lengths)
    ]
    with pair_writer(folder) as writer:
        writer.write_batch(record_batch(pairs))
    return PairStore(folder)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "pairs", LENGTHS)


@pytest.mark.parametrize(
    ("span", "lengths"),
    [
        ("aligned", [[5, 1, 1], [3, 2, 2]]),
        ("chosen", [[5, 6, 0], [3, 2, 0]]),
        ("response", [[5, 6, 1], [3, 2, 4]]),
    ],
)
def test_a_loss_reads_the_tokens_of_its_span(store, span, lengths):
    """Of pairs 1 and 0, in this order; the store itself keeps the whole lengths."""
    assert span_lengths(store, [1, 0], span).tolist() == lengths
    assert store.lengths.tolist() == [list(of_pair) for of_pair in LENGTHS]
    (batch,) = collate_all(store, [1, 0], 1000, span, "padded")
    places = dict(zip(batch.indices, range(2), strict=True))
    for index, (_, chosen, rejected) in zip((1, 0), lengths, strict=True):
        row = places[index]
        assert batch.pair_ids[row] == str(index)
        assert (batch.chosen.mask[row].sum(), batch.rejected.mask[row].sum()) == (chosen, rejected)
    assert batch.num_tokens == sum(map(sum, lengths))


def test_the_longest_sequence_is_a_prompt_with_one_of_its_responses(tmp_path, store):
    """5 + 6 = 11 tokens in one store, 4 + 9 = 13 in the other."""
    other = make_store(tmp_path / "other", [(4, 1, 9), (10, 1, 1)])
    assert longest_sequence([store]) == 11
    assert longest_sequence([store, other]) == 13


def test_micro_batches_take_pairs_by_length_and_are_filled_to_the_last_token():
    """By size: pair 2 (6 tokens), 0 (9), 1 (12). 15 tokens hold the first two, 14 do not."""
    lengths = np.array(LENGTHS)

    def groups(max_tokens):
        found = micro_batches(lengths, max_tokens, "shared_prompt")
        return [group.tolist() for group in found]

    assert groups(27) == [[2, 0, 1]]
    assert groups(15) == [[2, 0], [1]]
    assert groups(14) == [[2], [0], [1]]
    assert groups(1) == [[2], [0], [1]], "a pair with more tokens is a group of its own"
    assert micro_batches(np.zeros((0, 3), dtype=np.int64), 10, "padded") == []


@pytest.mark.parametrize(
    ("layout", "comparisons", "demonstrations"),
    [("shared_prompt", 9 + 13, 5 + 12), ("packed", 12 + 18, 5 + 12), ("padded", 4 * 12, 2 * 12)],
)
def test_a_layout_counts_a_response_that_is_not_there_as_no_line(
    layout, comparisons, demonstrations
):
    """Two pairs, with and without their rejected responses."""
    lengths = np.array([(3, 2, 4), (5, 7, 1)])
    assert LAYOUTS[layout].num_tokens(lengths) == comparisons
    lengths[:, 2] = 0
    assert LAYOUTS[layout].num_tokens(lengths) == demonstrations


def test_a_blank_batch_has_a_token_for_the_model_and_none_for_the_loss():
    batch = blank_batch()
    assert batch.input_ids.tolist() == batch.position_ids.tolist() == [[0]]
    assert (batch.pair_ids, batch.indices, batch.num_tokens) == ((), (), 0)
    for tensor in (batch.tokens, batch.predictor, batch.chosen.slots, batch.rejected.slots):
        assert (tensor.shape, tensor.dtype) == ((0,), torch.int64)
    for side in (batch.chosen, batch.rejected):
        assert (side.mask.shape, side.mask.dtype) == ((0, 0), torch.bool)


def test_pairs_of_one_length_stay_in_their_order():
    lengths = np.array([(1, 1, 1)] * 40)
    (group,) = micro_batches(lengths, 1000, "packed")
    assert group.tolist() == list(range(40))


def test_a_response_right_behind_its_prompt_shares_the_segment_of_the_prompt():
    """[prompt 3 | chosen 2 | rejected 2]: 5 queries on 5 keys, then 2 queries on 3 + 2 keys."""
    segments = segments_of(Sequences((3, 2, 2), (0, 0, 0)))
    assert segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6]
    assert segments.cu_seqlens_q.tolist() == [0, 5, 7]
    assert segments.cu_seqlens_k.tolist() == [0, 5, 10]
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (5, 5)


def test_sequences_that_continue_nothing_are_segments_of_their_own():
    segments = segments_of(Sequences((3, 2), (0, 1)))
    assert segments.key_index.tolist() == [0, 1, 2, 3, 4]
    assert segments.cu_seqlens_q.tolist() == segments.cu_seqlens_k.tolist() == [0, 3, 5]
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (3, 3)


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.0, 2), (2.0, 5), (0.01, 1), (1.5, 4)], ids=lambda value: str(value)
)
def test_the_number_of_steps_is_rounded_and_at_least_one(epochs, steps):
    """10 pairs, 4 a step: 2.5 steps an epoch."""
    assert num_steps(10, 4, epochs, None) == steps
    assert num_steps(10, 4, None, 7) == 7


def test_pairs_are_dealt_to_processes_by_length_the_longest_first():
    """9, 7, 5, 4, 3, 1 to two: 9 | 7, 5 after 7, 4 after 9, 3 after 12, 1 after 13."""
    lengths = np.array([1, 7, 9, 3, 5, 4])
    assert deal(lengths, 2) == [[0, 2, 5], [1, 3, 4]]
    assert [sum(lengths[hand]) for hand in deal(lengths, 2)] == [14, 15]


def test_every_pair_is_dealt_once_also_to_more_processes_than_pairs():
    lengths = np.array([5, 5, 5])
    hands = deal(lengths, 5)
    assert sorted(place for hand in hands for place in hand) == [0, 1, 2]
    assert len(hands) == 5 and max(map(len, hands)) == 1
    assert deal(np.array([], dtype=int), 2) == [[], []]
