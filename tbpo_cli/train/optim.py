"""Optimizers, and the learning rate as a function of the step, which has no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer, RMSprop

from tbpo_cli.config.recipe import Training

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "rmsprop": RMSprop}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def build_optimizer(settings: Training, parameters: Iterable[nn.Parameter]) -> Optimizer:
    return OPTIMIZERS[settings.optimizer](
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


@torch.no_grad()
def make_moments(optimizer: Optimizer) -> None:
    """Makes an optimizer's moments, as zeros; torch makes them in the first step.

    So a device that has no memory for them is noticed before the training, and what is left for
    activations is known. Weights do not change.

    1. A step with gradients of zero and a rate of 0.
    2. Everything that the step has left is set to 0, the number of steps as well.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def build_baseline_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The state baseline's own: AdamW with a constant rate of 1e-3 and no weight decay.

    Source: arXiv 2605.12288, the released code's setting.
    """
    return AdamW(parameters, lr=1e-3, weight_decay=0.0)


def learning_rate(settings: Training, step: int, num_steps: int) -> float:
    """The rate of a step, from 0: a linear rise over the warm-up, then the schedule.

    A falling schedule reaches zero after the last step.
    """
    warmup = math.ceil(settings.warmup * num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * SCHEDULES[settings.schedule](
        (step - warmup) / max(1, num_steps - warmup)
    )
