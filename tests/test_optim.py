"""The learning rate as a function of the step, and what the optimizers do with it."""

import math

import pytest
import torch

from tbpo_cli.config.recipe import Align
from tbpo_cli.train.optim import (
    build_baseline_optimizer,
    build_optimizer,
    learning_rate,
    make_moments,
)

FALLS = {  # the share of the rate after 0, 1/8, 4/8 and 7/8 of the steps that follow the warm-up
    "constant": (1, 1, 1, 1),
    "linear": (1, 7 / 8, 1 / 2, 1 / 8),
    "cosine": (1, (1 + math.cos(math.pi / 8)) / 2, 1 / 2, (1 + math.cos(math.pi * 7 / 8)) / 2),
}


@pytest.mark.parametrize("schedule", FALLS)
def test_the_rate_rises_in_a_line_over_the_warm_up_and_then_follows_the_schedule(schedule):
    """Ten steps, two of them warm-up: 1/2 and all of the rate, then eight steps of the schedule."""
    settings = Align(learning_rate=0.4, warmup=0.15, schedule=schedule)  # 1.5 steps, rounded up
    assert [learning_rate(settings, step, 10) for step in (0, 1)] == pytest.approx([0.2, 0.4])
    found = [learning_rate(settings, step, 10) for step in (2, 3, 6, 9)]
    assert found == pytest.approx([0.4 * share for share in FALLS[schedule]])


def test_without_a_warm_up_the_first_step_has_the_whole_rate_also_if_it_is_the_only_one():
    settings = Align(learning_rate=0.4, warmup=0.0)
    assert learning_rate(settings, 0, 10) == learning_rate(settings, 0, 1) == 0.4


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_the_optimizer_is_the_one_that_the_recipe_names_with_its_rate_and_decay(name):
    """One step from 2 with gradient 1: AdamW moves by the rate, RMSprop by 1/√(1 − 0.99) of it."""
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    settings = Align(optimizer=name, learning_rate=0.01)
    decayed = build_optimizer(Align(optimizer=name, learning_rate=0.01, weight_decay=0.5), [weight])
    assert decayed.param_groups[0]["weight_decay"] == 0.5
    optimizer = build_optimizer(settings, [weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.item() == pytest.approx(2 - {"adamw": 0.01, "rmsprop": 0.1}[name], abs=1e-6)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_moments_that_are_made_before_the_first_step_change_none_of_the_steps(name):
    """Three steps with weight decay, with moments made before and without: the same bits."""
    results = []
    for is_made_before in (True, False):
        weight = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
        settings = Align(optimizer=name, learning_rate=0.01, weight_decay=0.5)
        optimizer = build_optimizer(settings, [weight])
        if is_made_before:
            make_moments(optimizer)
            assert weight.tolist() == [2.0, -3.0]
            assert weight.grad is None
            assert (
                "exp_avg_sq" in optimizer.state[weight] or "square_avg" in optimizer.state[weight]
            )
        for gradient in ([1.0, 2.0], [0.5, -1.0], [-3.0, 0.1]):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)


def test_the_baselines_optimizer_has_the_rate_of_the_released_code_and_no_decay():
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = build_baseline_optimizer([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.item() == pytest.approx(2 - 1e-3, abs=1e-8)
