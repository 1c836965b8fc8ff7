"""Kills trainings at random moments until each has ended; compares with ones left alone.

    python tests/benchmarks/soak.py                # about 15 minutes on two CPU cores
    python tests/benchmarks/soak.py --fuzz 5000  # then damaged recipes, rows, checkpoints

Four kinds of training on the quickstart's base: tbpo_q with AdamW and dpo with RMSprop, LoRA with
dropout, several micro-batches a step and several epochs; sft; two processes. Each is killed
(SIGKILL, all its processes) at random moments, KILLS in all; then it may end. Weights must be the
same to the bit, and the metrics too, but for timings; no file may be left over. Writes
results/soak.{json,md}.

    python tests/benchmarks/soak.py --long 9     # a training of so many minutes, watched

Small steps with many evaluations and checkpoints, until SIGTERM. Memory, open files, threads and
processes in the last fifth of the time are compared with those in the second one; then no file may
be left over. Writes results/soak_long.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
from common import write_results

ROOT = Path(__file__).parent.parent.parent
KILLS, NUM_STEPS = 24, 120
SAME = ("weights", "metrics", "files")
FIGURES = ("memory_mb", "files", "threads", "processes")
LONG = (  # what is set for the training that is watched
    "sft=none",
    "align.loss.name=tbpo_q",
    "align.batch_pairs=2",
    "align.max_steps=1000000",
    "align.eval_every=10",
    "align.eval_pairs=4",
    "align.checkpoint_every=5",
)
MEMORY_GROWTH, FILE_GROWTH = 0.05, 2  # that is still none: a share of the bytes; open files
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
    parser.add_argument("--long", type=float, default=0, help="minutes of a training, instead")
    arguments = parser.parse_args()
    if arguments.long:
        watch_long(arguments.long)
        return
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        rows = [run_kind(name, Path(folder), rng) for name in KINDS]
    heading = (
        "| training | kills | moments (steps done) | same weights | same metrics | same files |\n"
        "|---|---|---|---|---|---|"
    )
    write_results(
        "soak", "Trainings killed at random moments", rows, "\n".join([heading, *map(line, rows)])
    )
    if not all(all(row[f"same_{what}"] for what in SAME) for row in rows):
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
        "same_files": names(runs["alone"]) == names(runs["killed"]),
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


def names(run: Path) -> list[str]:
    """The files and folders of a run; without the hash that names log π_ref, which has timings."""
    paths = (path.relative_to(run) for path in run.rglob("*"))
    return sorted(str(path.with_stem("logps") if path.suffix == ".f32" else path) for path in paths)


def watch_long(minutes: float) -> None:
    """A training with its memory, open files, threads and processes over time."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        recipe = write_recipe(Path(name))
        overrides = [part for override in LONG for part in ("--set", override)]
        module = [sys.executable, "-m", "tbpo_cli.cli.main"]
        command = [*module, "align", str(recipe), "--run-dir", str(run), *overrides]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            drain = threading.Thread(target=lambda: [*process.stderr], daemon=True)
            drain.start()
            samples = [*watch(process, run / "align", minutes * 60)]
        assert process.returncode == 128 + signal.SIGTERM
        lines = metrics(run / "align")
        left = [one for one in names(run) if "partial" in one or Path(one).name.startswith(".")]
    steps, evaluations = (sum(one["split"] == kind for one in lines) for kind in ("train", "eval"))
    fifth = len(samples) // 5
    early, late = (
        {key: median(one[key] for one in part) for key in FIGURES}
        for part in (samples[fifth : 2 * fifth], samples[-fifth:])
    )
    row = {"minutes": minutes, "steps": steps, "evaluations": evaluations, "left": left}
    table = "\n".join(
        [
            "| of one process | second fifth of the time | last fifth |",
            "|---|---|---|",
            *(f"| {key} | {early[key]:.0f} | {late[key]:.0f} |" for key in FIGURES),
            "",
            f"{steps:,} steps, {evaluations:,} evaluations, {steps // 5:,} checkpoints; "
            f"files left over: {', '.join(left) or 'none'}",
        ]
    )
    rows = [row | {"samples": len(samples), "early": early, "late": late}]
    write_results("soak_long", f"A training of {minutes:g} minutes, watched", rows, table)
    print(table)
    is_more_memory = late["memory_mb"] > early["memory_mb"] * (1 + MEMORY_GROWTH)
    is_more = is_more_memory or late["files"] > early["files"] + FILE_GROWTH or left
    if is_more or any(late[key] > early[key] for key in ("threads", "processes")):
        sys.exit("something grows with the steps, or is left over")


def watch(process: subprocess.Popen, stage: Path, seconds: float) -> Iterator[dict]:
    """What a process uses, twice a second while it trains, until SIGTERM after some seconds."""
    watched = psutil.Process(process.pid)
    while not num_steps(stage) and process.poll() is None:
        time.sleep(0.5)
    end = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > end:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return
        with suppress(psutil.NoSuchProcess):
            yield {
                "memory_mb": watched.memory_info().rss / 2**20,
                "files": watched.num_fds(),
                "threads": watched.num_threads(),
                "processes": 1 + len(watched.children(recursive=True)),
            }
        time.sleep(0.5)


def num_steps(stage: Path) -> int:
    path = stage / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def metrics(stage: Path) -> list[dict]:
    lines = [json.loads(text) for text in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in one.items() if key not in TIMINGS} for one in lines]


def line(row: dict) -> str:
    same = " | ".join("yes" if row[key] else "NO" for key in (f"same_{what}" for what in SAME))
    return (
        f"| {row['training']} | {row['kills']} | {', '.join(map(str, row['moments']))} | {same} |"
    )


if __name__ == "__main__":
    main()
