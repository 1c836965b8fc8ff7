"""What a training is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from tbpo_cli.batch.batches import num_steps
from tbpo_cli.config.recipe import Align, Sft
from tbpo_cli.core.losses import Loss
from tbpo_cli.data.store import PairStore
from tbpo_cli.model.policy import Policy
from tbpo_cli.train.group import ONE, Group

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
        mesh: the processes over which the weights are sharded; None: each has all weights.
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
    mesh: DeviceMesh | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        settings = self.settings
        return num_steps(len(self.train), settings.batch_size, settings.epochs, settings.max_steps)
