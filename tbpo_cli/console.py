"""What a person sees. Results that one would pipe go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

T = TypeVar("T")

QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "critical",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",
}

# Each (metric, what a person reads, how it is written, whether it means something before the first
# step).
Summary = tuple[tuple[str, str, str, bool], ...]

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Before they are imported: no advice or telemetry of the libraries, only their errors; bars
    only at a terminal.
    """
    for name, value in QUIET_LIBRARIES.items():
        if not (
            name.endswith("PROGRESS_BARS") and sys.stderr.isatty() and "--quiet" not in sys.argv
        ):
            os.environ.setdefault(name, value)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # about the insides of libraries, nothing a user can act on


def say(text: str) -> None:
    """A line for the person who waits."""
    err.print(text, markup=False)


def show_table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is text, the others are figures."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table, soft_wrap=False)


def show_evaluations(title: str, metrics: list[dict[str, Any]], summary: Summary) -> None:
    """The held-out figures of a training (its metrics.jsonl), before and after; nothing if no pair
    was held out.
    """
    if evaluations := [line for line in metrics if line["split"] == "eval"]:
        before, after = evaluations[0], evaluations[-1]
        rows = [
            [label, form.format(before[name]) if at_start else "–", form.format(after[name])]
            for name, label, form, at_start in summary
            if name in after
        ]
        show_table(title, ["", "before", "after"], rows)


@contextmanager
def progress(
    label: str, total: int | None, done: int = 0, every: int = 1
) -> Iterator[Callable[[int, str], None]]:
    """Progress of `total` steps: a live bar at a terminal, else a plain line every `every` steps
    and at the end.

    Args:
        total: None if it is not known.

    Yields:
        update(done, note): tell how far it is, with a few words about it.
    """
    started, first = time.monotonic(), done

    def rate(done: int) -> tuple[float, str]:
        value = (done - first) / max(1e-9, time.monotonic() - started)
        return value, f"{value:,.0f}/s" if value >= 10 else f"{value:.2g}/s"

    if err.is_terminal and not err.quiet:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (
            "{task.description}",
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, "{task.fields[note]}", console=err, transient=True) as bar:
            task = bar.add_task(label, total=total, completed=done, note="")
            yield lambda done, note: bar.update(
                task, completed=done, note=f"{note}  {rate(done)[1]}".strip()
            )
        return

    def update(done: int, note: str) -> None:
        if done % every == 0 or done == total:
            value, text = rate(done)
            left = f", {(total - done) / max(1e-9, value):.0f} s left" if total is not None else ""
            say(f"{label} {done}{f'/{total}' if total is not None else ''}  {note}  ({text}{left})")

    yield update


def track(items: Iterable[T], label: str, total: int, every: int) -> Iterator[T]:
    """Yields the items, `total` of them, with the progress of what is done with each."""
    with progress(label, total, every=every) as update:
        for done, item in enumerate(items, 1):
            yield item
            update(done, "")
