"""Self-contained HTML pages. What is put into one is escaped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_cli.files import write_whole

NUM_BINS = 40


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width, for the page's `histogram` macro.

    Args:
        title: what was counted, with its unit.
        low, high: the first and the last bin's outer edge.
        heights: count of each bin over the largest count, 0 to 1.
        tallest: the largest count.
        mean: of the values.
    """

    title: str
    low: float
    high: float
    heights: tuple[float, ...]
    tallest: int
    mean: float

    @classmethod
    def of(cls, title: str, values: np.ndarray) -> Histogram:
        counts, edges = np.histogram(values, bins=NUM_BINS)
        heights = tuple((counts / counts.max()).tolist())
        return cls(title, float(edges[0]), float(edges[-1]), heights, int(counts.max()), float(values.mean()))


def write_page(path: Path, template: str, **values: Any) -> None:
    """Renders `templates/TEMPLATE` with the values to a file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tbpo_cli"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    write_whole(path, environment.get_template(template).render(values))
