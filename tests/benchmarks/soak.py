"""Kills trainings at random moments until each has ended; compares with ones left alone.

    python tests/benchmarks/soak.py                # about 15 minutes on two CPU cores
    python tests/benchmarks/soak.py --fuzz 5000  # then damaged recipes, rows, checkpoints

Four kinds of training on the quickstart's base: tbpo_q with AdamW and dpo with RMSprop, LoRA with
dropout, several micro-batches a step and several epochs; sft; two processes. Each is killed
(SIGKILL, all its processes) at random moments, KILLS in all; then it may end. Weights must be the
same to the bit, and the metrics too, but for timings. Writes results/soak.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import write_results

ROOT = Path(__file__).parent.parent.parent
KILLS, NUM_STEPS = 24, 120
TIMINGS = {"seconds", "pairs_per_s", "tokens_per_s", "peak_memory_gb"}
RECIPE = """
[model]
base = "{root}/recipes/quickstart"
[model.lora]
r = 8
dropout = 0.1
[data]
train = "{rows}"
eval = "{root}/recipes/quickstart/eval.jsonl"
[sft]
batch_examples = 16
max_steps = {num_steps}
checkpoint_every = 7
eval_every = 50
max_tokens_per_device = 256
[align]
batch_pairs = 16
max_steps = {num_steps}
learning_rate = 1e-3
checkpoint_every = 7
eval_every = 50
max_tokens_per_device = 256
"""
KINDS = {
    "tbpo_q, AdamW": ("align", ["align.loss.name=tbpo_q"], []),
    "dpo, RMSprop": ("align", ["align.loss.name=dpo", "align.optimizer=rmsprop"], []),
    "sft": ("sft", [], []),
    "tbpo_q, two processes": ("align", ["align.loss.name=tbpo_q"], ["--gpus", "2", "--cpu"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fuzz", type=int, default=0, help="examples a fuzzing test, after the kills"
    )
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        rows = [run_kind(name, Path(folder), rng) for name in KINDS]
    heading = (
        "| training | kills | moments (steps done) | same weights | same metrics |\n"
        "|---|---|---|---|---|"
    )
    write_results(
        "soak", "Trainings killed at random moments", rows, "\n".join([heading, *map(line, rows)])
    )
    if not all(row["same_weights"] and row["same_metrics"] for row in rows):
        sys.exit("a killed training did not end as the one that was left alone")
    if arguments.fuzz:
        environment = {**os.environ, "FUZZ_EXAMPLES": str(arguments.fuzz)}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests/test_run.py",
            "-k",
            "damaged or any_values",
        ]
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


def run_kind(name: str, folder: Path, rng: random.Random) -> dict:
    stage, overrides, flags = KINDS[name]
    recipe = write_recipe(folder)
    sets = [part for override in overrides for part in ("--set", override)]
    runs = {kind: folder / f"{name}-{kind}" for kind in ("alone", "killed")}
    commands = {
        kind: [
            sys.executable,
            "-m",
            "tbpo_cli.cli.main",
            stage,
            str(recipe),
            "--run-dir",
            str(run),
            *sets,
            *flags,
        ]
        for kind, run in runs.items()
    }
    subprocess.run(commands["alone"], check=True, capture_output=True)
    moments = []
    for target in sorted(rng.randrange(NUM_STEPS) for _ in range(KILLS // len(KINDS))):
        process = subprocess.Popen(
            commands["killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while num_steps(runs["killed"] / stage) < target and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))  # anywhere within a step, a checkpoint or an evaluation
        kill_all(process)
        moments.append(num_steps(runs["killed"] / stage))
    subprocess.run(commands["killed"], check=True, capture_output=True)
    weights = [
        (run / stage / "adapter/adapter_model.safetensors").read_bytes() for run in runs.values()
    ]
    logs = [metrics(run / stage) for run in runs.values()]
    row = {
        "training": name,
        "kills": len(moments),
        "moments": moments,
        "same_weights": weights[0] == weights[1],
        "same_metrics": logs[0] == logs[1],
    }
    print(line(row), flush=True)
    return row


def write_recipe(folder: Path) -> Path:
    rows = folder / "rows.jsonl"
    lines = (ROOT / "recipes/quickstart/train.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:500]))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(root=ROOT, rows=rows, num_steps=NUM_STEPS))
    return recipe


def kill_all(process: subprocess.Popen) -> None:
    try:
        family = [
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ]
        for member in family:
            member.kill()
        psutil.wait_procs(family)
    except psutil.NoSuchProcess:  # it had ended
        process.wait()


def num_steps(stage: Path) -> int:
    path = stage / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def metrics(stage: Path) -> list[dict]:
    lines = [json.loads(text) for text in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in one.items() if key not in TIMINGS} for one in lines]


def line(row: dict) -> str:
    same = " | ".join("yes" if row[key] else "NO" for key in ("same_weights", "same_metrics"))
    return (
        f"| {row['training']} | {row['kills']} | {', '.join(map(str, row['moments']))} | {same} |"
    )


if __name__ == "__main__":
    main()
