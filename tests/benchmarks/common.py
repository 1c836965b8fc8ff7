"""Where benchmark results are written, and what is said of how they came about."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from tbpo_cli.data.store import PairStore, pair_writer, record_batch
from tbpo_cli.data.tokens import TokenizedPair

RESULTS = Path(__file__).parent / "results"


def why_failed(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process ended, in a line: its signal, or the last line that it wrote to stderr."""
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    *_, last = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return last[:200]


def write_results(name: str, title: str, rows: list[dict], table: str) -> None:
    """results/NAME.json with the raw rows and results/NAME.md with the table, both dated."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({**_about(), "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    write_table(name, title, table)


def write_table(name: str, title: str, table: str) -> None:
    """results/NAME.md with the table, dated."""
    said = "; ".join(f"{key}: {value}" for key, value in _about().items())
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n{said}\n\n{table}\n", encoding="utf-8")


def _about() -> dict:
    """When, how and with what something was measured."""
    libraries = {library: version(library) for library in ("torch", "transformers", "peft")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(
            ["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        ),
        "versions": {"python": platform.python_version(), **libraries},
        "threads": torch.get_num_threads(),
    }


# UltraFeedback-like token counts: mean, σ of the log
LENGTHS = {"prompt": (180, 0.8), "chosen": (300, 0.6), "rejected": (270, 0.7)}


def make_store(
    folder: Path, num_pairs: int, max_length: int, vocab_size: int, seed: int = 0
) -> PairStore:
    """Random pairs of UltraFeedback-like lengths, at most `max_length`; token 2 ends a response."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(num_pairs):
        prompt, *responses = (
            max(2, round(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma)))
            for mean, sigma in LENGTHS.values()
        )
        prompt = min(prompt, max_length // 2)
        ids = [
            rng.integers(3, vocab_size, size=min(length, max_length - prompt))
            for length in responses
        ]
        ids = [np.append(response[:-1], 2) for response in ids]
        pairs.append(TokenizedPair(f"{number:06d}", rng.integers(3, vocab_size, size=prompt), *ids))
    with pair_writer(folder) as writer:
        for start in range(0, num_pairs, 1000):
            writer.write_batch(record_batch(pairs[start : start + 1000]))
    return PairStore(folder)


def about_lengths(store: PairStore) -> str:
    means = [
        lengths.mean()
        for lengths in (store.prompt_lengths, store.chosen_lengths, store.rejected_lengths)
    ]
    words = ", ".join(f"{name} {mean:.0f}" for name, mean in zip(LENGTHS, means, strict=True))
    return f"{len(store):,} pairs; mean tokens of {words}."
