"""What a training is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tbpo_cli.batch.batches import epoch_order, num_steps
from tbpo_cli.config.recipe import Align, Sft
from tbpo_cli.core.losses import Loss
from tbpo_cli.data.store import PairStore
from tbpo_cli.model.policy import Policy
from tbpo_cli.train.group import ONE, Group

MIN_EVALUATED = 64  # with fewer pairs, an accuracy says little

# Called with "train" or "eval", the step and its metrics.
TrackMetrics = Callable[[str, int, dict[str, float]], None]


def track_nothing(split: str, step: int, metrics: dict[str, float]) -> None:
    """For a run without trackers."""


@dataclass(frozen=True)
class TrainingRun:
    """A training: what is trained, on which pairs, with which settings, and where it writes.

    Args:
        policy: in its starting state; its weights are all that changes.
        loss: what is minimised.
        settings: the recipe's table of the stage.
        train: the pairs that are trained on.
        evaluation: the held-out pairs; there may be none.
        folder: of the stage, for metrics.jsonl and checkpoints/.
        seed: with the number of a step it decides the order of the pairs and every random number.
        reference: the file for log π_ref of the training pairs; None: it is not kept.
        group: the processes that train together, all with the same arguments.
        track: is given every line of metrics.jsonl.
        ways: how rows, attention and head are computed, for the manifest; `train` fills it in.
        shapes: the policy as it is without sharding, on "meta", where its weights are sharded;
            None: each process has all weights.
    """

    policy: Policy
    loss: Loss
    settings: Sft | Align
    train: PairStore
    evaluation: PairStore
    folder: Path
    seed: int
    reference: Path | None = None
    group: Group = ONE
    track: TrackMetrics = track_nothing
    shapes: Policy | None = None
    ways: dict[str, str] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        settings = self.settings
        return num_steps(len(self.train), settings.batch_size, settings.epochs, settings.max_steps)

    def evaluated_pairs(self, step: int) -> list[int]:
        """The held-out pairs that are measured after a step, by their places in the store.

        The first and the last measurement, which are compared with each other, read all; those in
        between a part of them, which the seed decides and which is always the same.
        """
        num_pairs = len(self.evaluation)
        if step in (0, self.num_steps):
            return list(range(num_pairs))
        order = epoch_order(num_pairs, self.seed, 0)
        return sorted(int(place) for place in order[: num_evaluated(self.settings, num_pairs)])


def num_evaluated(settings: Sft | Align, num_pairs: int) -> int:
    """How many of the held-out pairs a measurement between the first and the last reads.

    A pair that is measured takes about half the time of one that is trained on.
    """
    if settings.eval_pairs == "all":
        return num_pairs
    if settings.eval_pairs != "auto":
        return min(num_pairs, settings.eval_pairs)
    between = settings.eval_every * settings.batch_size
    return min(num_pairs, max(MIN_EVALUATED, between // 10))
