"""The search of tests/benchmarks/methods.py, on scores that are known."""

import pytest
from benchmarks.search import (
    LEVELS,
    Axis,
    due_of_envelope,
    next_step,
    num_runs,
    points_of,
    score_at,
    share_within,
)

LADDER = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def searched(grid, score):
    """The last step of a search in which every due run is made, and all runs."""
    runs = {}
    while (step := next_step(grid, runs)).due:
        point, seed = step.due[0]
        runs[point, seed] = score(point, seed)
    return step, runs


def test_all_points_run_once_the_better_half_twice_and_the_better_quarter_four_times():
    grid = (Axis("rate", LADDER, 0, 5), Axis("β", (1.0, 3.0), 0, 1))
    step, runs = searched(grid, lambda point, seed: -abs(point[0] - 8) - abs(point[1] - 1))
    counts = {point: sum(each == point for each, _ in runs) for point in points_of(grid)}
    assert sorted(counts.values()) == [1] * 6 + [2] * 3 + [4] * 3
    assert len(runs) == num_runs(grid) == 12 + 6 + 2 * 3
    assert {point for point, count in counts.items() if count == 4} == {(8, 1), (8, 3), (4, 1)}
    assert step.best == (8.0, 1.0)


def test_a_point_that_was_lucky_with_its_first_seed_loses_to_a_better_mean():
    grid = (Axis("rate", LADDER, 0, 5),)
    lucky = {(2.0, LEVELS[0][1][0]): 1.0}
    scores = {2.0: 0.3, 4.0: 0.8, 8.0: 0.7}
    step, _ = searched(
        grid, lambda point, seed: lucky.get((point[0], seed), scores.get(point[0], 0.1))
    )
    assert step.best == (4.0,)


def test_a_level_waits_until_the_one_before_is_complete():
    grid = (Axis("rate", LADDER, 0, 3),)
    first = LEVELS[0][1][0]
    step = next_step(grid, {((rate,), first): rate for rate in LADDER[:3]})
    assert (step.level, step.due, step.best) == (0, (((8.0,), first),), None)
    step = next_step(grid, {((rate,), first): -rate for rate in LADDER[:4]})
    second = LEVELS[1][1][0]
    assert (step.level, step.due) == (1, (((1.0,), second), ((2.0,), second)))


@pytest.mark.parametrize(("peak", "widened"), [(16.0, (2, 5)), (1.0, (0, 3)), (4.0, (1, 3))])
def test_a_grid_whose_best_is_at_an_edge_is_widened_there_until_it_is_inside(peak, widened):
    grid = (Axis("rate", LADDER, 2, 3),) if peak == 16.0 else (Axis("rate", LADDER, 1, 3),)
    step, runs = searched(grid, lambda point, seed: -abs(point[0] - peak))
    assert step.best == (peak,)
    assert (step.grid[0].first, step.grid[0].last) == widened
    assert step.at_limit == (("rate",) if peak == 1.0 else ())
    assert {point[0] for point, _ in runs} == set(LADDER[widened[0] : widened[1] + 1])


def test_an_axis_without_a_choice_or_that_ends_by_its_nature_is_not_widened():
    grid = (Axis("floor", (0.0, 0.6, 0.8), 0, 1, open_below=False), Axis("β", LADDER, 2, 2))
    step, _ = searched(grid, lambda point, seed: -point[0])
    assert (step.best, step.grid, step.at_limit) == ((0.0, 4.0), grid, ())


PLACES = {(1.0,): (0.1, 0.4), (2.0,): (0.2, 0.3), (3.0,): (0.3, 0.6), (4.0,): (0.9, 0.5)}


@pytest.mark.parametrize(
    ("kl", "score"), [(0.0, 0.2), (0.05, 0.3), (0.1, 0.4), (0.2, 0.5), (0.3, 0.6), (2.0, 0.6)]
)
def test_the_score_at_a_kl_lies_on_the_upper_envelope_that_begins_at_the_base(kl, score):
    """The point of KL 0.2 is under the line between its neighbours; past 0.3 nothing is higher."""
    assert score_at(PLACES, 0.2, kl) == pytest.approx(score)


def test_the_points_that_decide_the_score_at_a_kl_get_the_seeds_that_they_lack():
    first, *others = (seed for _, seeds in LEVELS for seed in seeds)
    made = {(point, first): score for point, (_, score) in PLACES.items()}
    assert list(due_of_envelope(PLACES, 0.2, [0.05], made)) == [((1.0,), s) for s in others]
    assert {point for point, _ in due_of_envelope(PLACES, 0.2, [0.2, 0.4], made)} == {(1,), (3,)}


def test_how_forgiving_a_loss_is_counts_the_settings_near_the_best_with_the_same_seed():
    first = LEVELS[0][1][0]
    scores = {((1.0,), first): 0.70, ((2.0,), first): 0.68, ((4.0,), first): 0.60}
    scores[(4.0,), LEVELS[1][1][0]] = 0.75
    points = [(1.0,), (2.0,), (4.0,), (8.0,)]
    assert share_within(scores, points, best=0.7, margin=0.03) == 0.5
