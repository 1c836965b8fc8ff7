"""The shapes that scores must have, and the two reductions over a response."""

import math

import pytest
import torch

from tbpo_cli.core import PairScores, SideScores
from tbpo_cli.core.types import mean_over_response, sum_over_response, sums_over_response

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    ("mask", "statistics", "message"),
    [
        (MASK.float(), {}, r"^mask must be a \(B, T\) bool tensor, got torch.float32 \(3, 3\)"),
        (MASK[0], {}, r"^mask must be a \(B, T\) bool tensor, got torch.bool \(3,\)"),
        (MASK, {"kl": torch.zeros(3, 2)}, r"^kl \(3, 2\) differs from the mask \(3, 3\)"),
        (
            MASK,
            {"kl": torch.zeros(3, 3), "entropy": torch.zeros(3)},
            r"^entropy \(3,\) differs from the mask",
        ),
    ],
)
def test_scores_of_another_shape_than_their_mask_are_refused(mask, statistics, message):
    with pytest.raises(ValueError, match=message):
        SideScores(mask, **statistics)


def test_both_sides_have_as_many_responses():
    with pytest.raises(ValueError, match=r"^3 chosen, but 2 rejected responses"):
        PairScores(SideScores(MASK), SideScores(MASK[:2]))


def test_aligned_are_the_positions_at_which_both_responses_have_a_token():
    wide = torch.tensor(
        [[True, False, False, False], [True, True, True, True], [True, True, False, False]]
    )
    expected = [[True, False, False], [True, False, False], [False, False, False]]
    for chosen, rejected in ((MASK, wide), (wide, MASK)):
        assert (
            PairScores(SideScores(chosen), SideScores(rejected)).aligned_mask.tolist() == expected
        )


def test_sum_and_mean_are_over_the_response_whatever_stands_beside_it():
    """(1 + 4) and 5 / 2; a lone token; a row without one has 0 for both."""
    values = torch.tensor(
        [[1.0, 4.0, math.nan], [7.0, math.inf, -3.0], [math.nan, 1.0, 1.0]], requires_grad=True
    )
    assert sum_over_response(values, MASK).tolist() == [5.0, 7.0, 0.0]
    assert mean_over_response(values, MASK).tolist() == [2.5, 7.0, 0.0]
    mean_over_response(values, MASK).sum().backward()
    assert values.grad.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_sums_of_a_side_are_of_what_it_has_and_give_no_gradient():
    kl = torch.tensor([[1.0, 2.0, math.nan], [3.0, 9.0, 9.0]], requires_grad=True)
    sums = sums_over_response(SideScores(MASK[:2], kl=kl, entropy=2 * kl))
    found = {name: values.tolist() for name, values in sums.items()}
    assert found == {"kl": [3.0, 3.0], "entropy": [6.0, 6.0], "tokens": [2, 1]}
    assert not any(values.requires_grad for values in sums.values())
