"""Experiment trackers, through accelerate: what metrics.jsonl holds, live in tensorboard, wandb or trackio."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tbpo_cli.errors import TbpoError

Tell = Callable[[str, int, dict[str, float]], None]


@contextmanager
def open_trackers(names: tuple[str, ...], project: str, folder: Path, settings: dict[str, Any]) -> Iterator[Tell]:
    """Opens the named trackers for the time of the context; yields tell("train" or "eval", step, metrics).

    They write files into the folder and show the settings beside the curves. Raises TbpoError if the package of one is
    not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TbpoError(f"{name} is not installed", "run.trackers", "its package", f"pip install {name}")
    if not names:
        yield lambda split, step, values: None
        return
    accelerator = Accelerator(log_with=list(names), project_dir=folder)
    shown = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in settings.items()}
    accelerator.init_trackers(project, shown)
    try:
        yield lambda split, step, values: accelerator.log({f"{split}/{key}": v for key, v in values.items()}, step)
    finally:
        accelerator.end_training()
