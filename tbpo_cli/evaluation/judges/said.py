"""What a judge has said before, in a file with a line for each thing it was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.runs.files import sealed_lines


def lines_of(cache: Path) -> list[dict[str, Any]]:
    """The lines of a file of what a judge has said, but those that are damaged.

    What they said is asked for again, and then stands in a line of its own.
    """
    lines, damaged = sealed_lines(cache)
    keys = {line.get("key") for line in lines}
    if missing := [line for line in damaged if str(line.get("key")) not in keys]:
        what = f"{console.counted(len(missing), 'line')} of what the judge has said"
        console.say(f"WARNING: not as written, and left out: {what}, in {cache}")
    return lines
