"""Where benchmark results are written, and what is said of how they came about."""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, title: str, rows: list[dict], table: str) -> None:
    """results/NAME.json with the raw rows and results/NAME.md with the table, both dated."""
    libraries = {library: version(library) for library in ("torch", "transformers", "peft")}
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", f"tests/benchmarks/{name}.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **libraries},
        "threads": torch.get_num_threads(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    said = "; ".join(f"{key}: {value}" for key, value in about.items())
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n{said}\n\n{table}\n", encoding="utf-8")
