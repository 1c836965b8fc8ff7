"""What a person sees. Results that one would pipe go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

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

# C0 but newline and tab, DEL, C1, the marks of direction (U+061C, U+200E to U+202E, U+2066 to
# U+2069), line separators, and surrogates, of which a text that is whole has none.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

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


def plain(text: str) -> str:
    """A text without what a terminal, or a reader's eye, would obey.

    Control characters but newline and tab, marks that turn the direction of writing, and halves of
    surrogate pairs are written as their codes, such as \\x1b.
    """
    return CONTROLS.sub(_code, text.replace("\r\n", "\n"))


def _code(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def say(text: str) -> None:
    """A line for the person who waits."""
    err.print(plain(text), markup=False)


def show(text: str, style: str = "") -> None:
    """A text on stdout, of whatever origin."""
    out.print(Text(plain(text), style))


def show_table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is text, the others are figures."""
    table = Table(
        title=Text(plain(title)),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for number, heading in enumerate(headings):
        justify: Any = "left" if number == 0 else "right"
        table.add_column(Text(plain(heading)), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
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
            task = bar.add_task(escape(plain(label)), total=total, completed=done, note="")

            def move(done: int, note: str) -> None:
                words = escape(plain(f"{note}  {rate(done)[1]}".strip()))
                bar.update(task, completed=done, note=words)

            yield move
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
