"""`tbpo prepare` against the bare fast tokenizer: pairs a second, and peak memory over rows.

    python tests/benchmarks/prepare.py             # about 8 minutes on two CPU cores

Pairs of UltraFeedback's lengths (prompt mean 180 tokens, σ of log 0.8; chosen 300, 0.6; rejected
270, 0.7) of words of Zipf frequencies; a byte-level BPE of 16,000 tokens trained on them. "Bare" is
`tokenizer(texts)` on the same texts, 1,000 rows at a time, without reading, templates, checks or
writing. Every measurement is a process of its own, and the two alternate. Writes
results/prepare.{json,md}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from common import write_results

LENGTHS = {
    "prompt": (180, 0.8),
    "chosen": (300, 0.6),
    "rejected": (270, 0.7),
}  # mean tokens, σ of the log
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--one",
        nargs=4,
        metavar=("WAY", "FOLDER", "ROWS", "WORKERS"),
        help="one measurement, as JSON",
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), 100_000)
        rows = []
        for workers in (1, os.cpu_count()):
            runs = [
                {way: child(way, folder, 10_000, workers) for way in ("bare", "prepare")}
                for _ in range(arguments.repeats)
            ]
            rows.append({"rows": 10_000, "workers": workers, "runs": runs})
            print(line(rows[-1]), flush=True)
        rows.append(
            {
                "rows": 100_000,
                "workers": 1,
                "runs": [{w: child(w, folder, 100_000, 1) for w in ("bare", "prepare")}],
            }
        )
        print(line(rows[-1]), flush=True)
    heading = (
        "| rows | workers | bare pairs/s | prepare pairs/s | ratio | prepare's peak MB |\n"
        "|---|---|---|---|---|---|"
    )
    write_results(
        "prepare",
        "tbpo prepare against the bare tokenizer",
        rows,
        "\n".join([heading, *map(line, rows)]),
    )


def make_inputs(folder: Path, num_rows: int) -> None:
    """A tokenizer, and rows.jsonl with words of Zipf frequencies."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(rng.choice(letters, size=rng.integers(1, 11))) for _ in range(30_000)]
    frequencies = 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(len(words), size=5_000_000, p=frequencies / frequencies.sum())

    def text(num_words: int) -> str:
        start = rng.integers(len(drawn) - num_words)
        return " ".join(words[i] for i in drawn[start : start + num_words])

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=16_000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((text(300) for _ in range(2_000)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.save_pretrained(folder / "base")
    sample = text(10_000)
    words_per_token = 10_000 / len(fast(sample)["input_ids"])
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(num_rows):
            row = {
                side: text(
                    max(1, int(words_per_token * rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)))
                )
                for side, (mean, sigma) in LENGTHS.items()
            }
            file.write(json.dumps(row) + "\n")


def child(way: str, folder: str, num_rows: int, workers: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", way, folder, str(num_rows), str(workers)]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def measure(way: str, folder: str, num_rows: str, workers: str) -> dict[str, float]:
    """Seconds after start-up; the peak resident MB of this process and of its largest worker."""
    import resource

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    seconds = {"bare": bare, "prepare": prepare}[way](Path(folder), int(num_rows), int(workers))
    peaks = [
        resource.getrusage(who).ru_maxrss / 1e3
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return {"seconds": seconds, "mb": peaks[0], "worker_mb": peaks[1]}


def bare(folder: Path, num_rows: int, workers: int) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    seconds = 0.0
    for rows in batches(folder / "rows.jsonl", num_rows):
        texts = [text for row in rows for text in row.values()]
        started = time.perf_counter()
        tokenizer(texts, add_special_tokens=False)
        seconds += time.perf_counter() - started
    return seconds


def batches(path: Path, num_rows: int) -> Iterator[list[dict[str, str]]]:
    rows = []
    with path.open() as file:
        for line in itertools.islice(file, num_rows):
            rows.append(json.loads(line))
            if len(rows) == 1000:
                yield rows
                rows = []


def prepare(folder: Path, num_rows: int, workers: int) -> float:
    from tbpo_cli.config.recipe import load_recipe
    from tbpo_cli.data.tokenizer import load_tokenizer
    from tbpo_cli.runs.run_dir import RunDir
    from tbpo_cli.stages import prepare

    rows = folder / f"rows-{num_rows}.jsonl"
    if not rows.exists():
        with (folder / "rows.jsonl").open() as file, rows.open("w") as first:
            first.writelines(itertools.islice(file, num_rows))
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'[model]\nbase = "{folder}/base"\n[data]\ntrain = "{rows}"\nworkers = {workers}\n'
    )
    settings = load_recipe(recipe)
    load_tokenizer(
        settings.model
    )  # the imports are not measured, as they are not for the bare tokenizer
    with tempfile.TemporaryDirectory() as run:
        started = time.perf_counter()
        prepare.run(settings, RunDir(Path(run)))
        return time.perf_counter() - started


def line(row: dict) -> str:
    bare, prepare = (
        median(run[way]["seconds"] for run in row["runs"]) for way in ("bare", "prepare")
    )
    peak = max(max(run["prepare"]["mb"], run["prepare"]["worker_mb"]) for run in row["runs"])
    ratio = median(run["bare"]["seconds"] / run["prepare"]["seconds"] for run in row["runs"])
    speeds = f"{row['rows'] / bare:,.0f} | {row['rows'] / prepare:,.0f} | {ratio:.2f}"
    return f"| {row['rows']:,} | {row['workers']} | {speeds} | {peak:,.0f} |"


if __name__ == "__main__":
    main()
