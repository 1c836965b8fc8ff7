"""Output for a person. Results that may be piped go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import re
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
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

# Each: metric, its label, its format, whether it has a meaning before the first step.
Summary = tuple[tuple[str, str, str, bool], ...]

# C0 but newline and tab, DEL, C1, the marks of direction (U+061C, U+200E to U+202E, U+2066 to
# U+2069), line separators, and surrogates, which no valid text has.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
BAR = 16  # columns of a live bar

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Before they are imported: no advice or telemetry of the libraries, only their errors."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    # They are about the insides of libraries: nothing that a user can act on.
    warnings.simplefilter("ignore", FutureWarning)


def short(path: Path) -> str:
    """A path as one would type it: relative to the current folder if it is in it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def plain(text: str) -> str:
    """A text without characters that control a terminal or the direction of writing.

    Control characters but newline and tab, marks of direction, and halves of surrogate pairs are
    written as their codes, such as \\x1b.
    """
    return CONTROLS.sub(_code, text.replace("\r\n", "\n"))


def _code(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def at_width(text: str) -> str:
    """Prose in lines that a terminal of stderr, or COLUMNS below 80, has space for.

    Elsewhere the lines stay whole, for programs that search them.
    """
    if not err.is_terminal and err.width >= 80:
        return text
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines += textwrap.wrap(
            line,
            err.width,
            subsequent_indent=indent,
            break_long_words=False,  # a path or a command can be copied
            break_on_hyphens=False,
            drop_whitespace=True,
        ) or [""]
    return "\n".join(lines)


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
    """The held-out figures of a training, before and after; nothing if no pair was held out.

    Args:
        metrics: the lines of its metrics.jsonl.
    """
    evaluations = [line for line in metrics if line["split"] == "eval"]
    if not evaluations:
        return
    before, after = evaluations[0], evaluations[-1]
    rows = []
    for name, label, form, has_meaning_before in summary:
        if name in after:
            first = form.format(before[name]) if has_meaning_before else "–"
            rows.append([label, first, form.format(after[name])])
    if not rows:
        say("the held-out pairs all have the weight 0: there are no figures of them")
        return
    show_table(title, ["", "before", "after"], rows)


def counted(number: int, noun: str) -> str:
    """How many there are: "1 prompt", "1,388 prompts"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def progress(
    label: str, total: int | None, done: int = 0, every: int = 1
) -> Iterator[Callable[[int, str], None]]:
    """Progress of `total` steps: a live bar at a terminal, else a plain line every `every` steps.

    Args:
        label: what is done.
        total: None if it is not known.
        done: what was done before.
        every: steps between two plain lines; there is one at the end, too.

    Yields:
        update(done, note): how far it is, and some figures about it, two spaces between them. At a
        narrow terminal the rate is left out first, then the last figures; step, total and the time
        left stay.
    """
    started = time.monotonic()
    first = done
    label = plain(label)

    def rate(done: int) -> float:
        return (done - first) / max(1e-9, time.monotonic() - started)

    def left(done: int) -> str:
        if total is None or done == first:
            return ""
        return f"{duration((total - done) / max(1e-9, rate(done)))} left"

    if err.is_terminal and not err.quiet:
        from rich.progress import BarColumn, Progress, TextColumn

        text = TextColumn("{task.fields[text]}", markup=False)
        with Progress(BarColumn(bar_width=BAR), text, console=err, transient=True) as bar:
            begin = one_line(label, done, total, "", "", "", err.width - BAR - 1)
            task = bar.add_task("", total=total, completed=done, text=begin)

            def draw(done: int, note: str) -> None:
                speed = _rate(rate(done))
                width = err.width - BAR - 1
                line = one_line(label, done, total, left(done), plain(note), speed, width)
                bar.update(task, completed=done, text=line)

            yield draw
        return

    def update(done: int, note: str) -> None:
        if done % every == 0 or done == total:
            speed = ", ".join(filter(None, [_rate(rate(done)), left(done)]))
            say(f"{label} {done}{f'/{total}' if total is not None else ''}  {note}  ({speed})")

    yield update


def _rate(value: float) -> str:
    return f"{value:,.0f}/s" if value >= 10 else f"{value:.2g}/s"


def one_line(
    label: str, done: int, total: int | None, left: str, note: str, rate: str, width: int
) -> str:
    """The text beside a progress bar: as many of its parts as fit into `width` columns.

    Args:
        left: the time that is left, in words.
        note: figures with two spaces between them, the most important first.
        rate: steps a second.
    """
    count = f"{done}/{total}" if total is not None else f"{done}"
    line = "  ".join(filter(None, [f"{label} {count}", left]))
    for part in [*filter(None, note.split("  ")), rate]:
        if part and len(line) + 2 + len(part) <= width:
            line += f"  {part}"
    return line


def track(items: Iterable[T], label: str, total: int, every: int) -> Iterator[T]:
    """Yields the items, `total` of them, with the progress of what is done with each."""
    with progress(label, total, every=every) as update:
        for done, item in enumerate(items, 1):
            yield item
            update(done, "")
