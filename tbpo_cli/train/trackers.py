"""run.trackers: the lines of metrics.jsonl, live in TensorBoard, W&B or Trackio."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.train.group import Group
from tbpo_cli.train.run import TrackMetrics, track_nothing


@contextmanager
def open_trackers(recipe: Recipe, folder: Path, group: Group) -> Iterator[TrackMetrics]:
    """Yields what gives a line of metrics to all trackers, in the first process; elsewhere nothing.

    Raises:
        TbpoError: if the package of a tracker is not installed.
    """
    names = recipe.run.trackers if group.is_main else ()
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TbpoError(
                f"{name} is not installed", "run.trackers", "its package", f"pip install {name}"
            )
    if not names:
        yield track_nothing
        return
    accelerator = Accelerator(log_with=list(names), project_dir=folder)
    settings = {
        key: value if isinstance(value, (bool, int, float)) else str(value)
        for key, value in recipe.settings().items()
    }
    accelerator.init_trackers(recipe.run.name, settings)  # shown beside the curves

    def track(split: str, step: int, metrics: dict[str, float]) -> None:
        accelerator.log({f"{split}/{name}": value for name, value in metrics.items()}, step)

    try:
        yield track
    finally:
        # accelerator.end_training() would end the process group, which has yet to save the weights.
        for tracker in accelerator.trackers:
            tracker.finish()
