"""Whether a training stays as fast and as small as it began, and how soon it begins.

    python tests/benchmarks/scaling.py             # about 8 minutes on two CPU cores

Time per token with 1,000, 10,000 and 100,000 pairs; resident memory over 500 steps; and the time
from the command `tbpo align` to its first step, on 20,000 prepared pairs. The model is tiny, so
that what does not belong to it shows. Writes results/scaling.{json,md}.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

import torch
from common import make_store, write_results

from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.model.load import load_policy
from tbpo_cli.train import loop
from tbpo_cli.train.run import TrainingRun

QUICKSTART = Path(__file__).parent.parent.parent / "recipes/quickstart"
SIZES, STEPS, LONG = (1_000, 10_000, 100_000), 60, 500
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> None:
    report([*time_per_token(), memory(), start_up()])


def time_per_token() -> list[dict]:
    """The sizes take turns; the fastest of three rounds is the one that was least disturbed."""
    rounds = [[seconds_per_token(size) for size in SIZES] for _ in range(3)]
    return [
        {"pairs": size, "ms_per_1000_tokens": 1e6 * min(seen)}
        for size, seen in zip(SIZES, zip(*rounds, strict=True), strict=True)
    ]


def report(rows: list[dict]) -> None:
    times = [row["ms_per_1000_tokens"] for row in rows[: len(SIZES)]]
    lines = ["| pairs | ms per 1,000 tokens (median step) |", "|---|---|"]
    lines += [
        f"| {row['pairs']:,} | {row['ms_per_1000_tokens']:.1f} |" for row in rows[: len(SIZES)]
    ]
    lines += [
        "",
        f"Largest over smallest: {max(times) / min(times):.3f}. Resident memory: "
        f"{rows[-2]['early_gb']:.3f} GB over steps 50–100, {rows[-2]['late_gb']:.3f} GB over steps "
        f"{LONG - 50}–{LONG}. From the command to the end of the "
        f"first step: {rows[-1]['seconds']:.1f} s.",
    ]
    print("\n".join(lines))
    write_results("scaling", "Scaling of a training", rows, "\n".join(lines))


def train(num_pairs: int, steps: int, track) -> list[dict]:
    """The lines of metrics.jsonl of a TBPO-A training, 4 pairs a step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        (folder / "base/config.json").write_text(json.dumps(CONFIG))
        (folder / "recipe.toml").write_text(
            f'[model]\nbase = "{folder / "base"}"\ninitial_weights = "random"\n'
            '[model.lora]\nr = 4\n[data]\ntrain = "unused"\n'
            f"[align]\nbatch_pairs = 4\nmax_steps = {steps}\ncheckpoint_every = 1000000\n"
        )
        recipe = load_recipe(folder / "recipe.toml")
        stores = (
            make_store(folder / "train", num_pairs, 1024, 2000),
            make_store(folder / "eval", 0, 1, 3),
        )
        (folder / "align").mkdir()
        policy = load_policy(recipe, torch.device("cpu"), None, with_reference=True)
        loss = recipe.align.loss
        run = TrainingRun(policy, loss, recipe.align, *stores, folder / "align", 0, track=track)
        return [
            line for line in loop.train(run).lines if "kl" not in line
        ]  # steps that report all read more


def seconds_per_token(num_pairs: int) -> float:
    lines = train(num_pairs, STEPS, lambda *_: None)
    return median(line["seconds"] / line["tokens"] for line in lines[20:])


def memory() -> dict:
    resident: list[float] = []

    def track(*_) -> None:
        text = Path("/proc/self/status").read_text()
        resident.append(int(text.split("VmRSS:")[1].split()[0]) * 1024 / 1e9)

    train(10_000, LONG, track)
    return {"steps": LONG, "early_gb": fmean(resident[50:100]), "late_gb": fmean(resident[-50:])}


def start_up(num_rows: int = 20_000) -> dict:
    rng = random.Random(0)
    rows = [json.loads(line) for line in (QUICKSTART / "train.jsonl").open(encoding="utf-8")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for number in range(num_rows):
                row = rng.choice(rows)
                file.write(json.dumps({**row, "prompt": f"{row['prompt']} {number}"}) + "\n")
        (folder / "recipe.toml").write_text(
            f'[model]\nbase = "{QUICKSTART}"\n[model.lora]\n'
            f'[data]\ntrain = "{folder / "rows.jsonl"}"\n'
            "eval_fraction = 0.0\n[align]\nbatch_pairs = 4\nmax_steps = 400\n"
        )
        command = [
            sys.executable,
            "-m",
            "tbpo_cli.cli.main",
            "{}",
            str(folder / "recipe.toml"),
            "--run-dir",
            f"{folder}/run",
        ]
        subprocess.run(
            [part.format("prepare") for part in command], check=True, capture_output=True
        )
        started = time.perf_counter()
        process = subprocess.Popen(
            [part.format("align") for part in command], stderr=subprocess.DEVNULL
        )
        log = folder / "run/align/metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.terminate()
        process.wait()
    return {"rows": num_rows, "seconds": seconds}


if __name__ == "__main__":
    main()
