"""Where the time of a training step goes: torch's profile of its kernels, on the device at hand.

    python tests/benchmarks/profile_step.py --shapes qwen2.5-0.5b llama-3.2-1b llama-3-8b mistral-7b

The pairs, weights and settings are those of train_step.py. A step is profiled after two others.
`busy` is the share of the step's time in which a kernel ran. The results/profile.{json,md} are
written anew after each shape.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import make_store, write_results
from torch.profiler import ProfilerActivity, profile
from train_step import DEVICE, LOSSES, ON_GPU, SHAPES, TRAINED, the_policy, the_recipe, the_store

from tbpo_cli.train.group import Group
from tbpo_cli.train.loop import build_stepper
from tbpo_cli.train.run import TrainingRun

STEPS = 2
SHOWN = 25  # kernels a shape


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=["cpu-32k"], choices=list(SHAPES))
    parser.add_argument("--loss", default="tbpo_a", choices=LOSSES)
    parser.add_argument("--trained", default="adapter", choices=TRAINED)
    parser.add_argument("--name", default="profile", help="of the files under results/")
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shapes:
        rows.append(profiled(shape, arguments.loss, arguments.trained))
        table = "\n\n".join(map(section, rows))
        write_results(arguments.name, "Kernels of a training step", rows, table)
        print(section(rows[-1]), flush=True)
        if ON_GPU:
            torch.cuda.empty_cache()


def profiled(shape: str, loss: str, trained: str) -> dict:
    """Milliseconds and calls of each kernel of the third step, the slowest first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = the_recipe(shape, loss, STEPS, folder, trained=trained)
        nothing = make_store(folder / "nothing", 0, 1, 3)
        (folder / "align").mkdir()
        run = TrainingRun(
            the_policy(recipe), recipe.align.loss, recipe.align, the_store(STEPS), nothing,
            folder / "align", 0, group=Group(device=DEVICE),
        )  # fmt: skip
        stepper = build_stepper(run)
        for number in range(STEPS):
            stepper.step(number)
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_GPU
        with profile(activities=kinds) as found:
            started = time.perf_counter()
            stepper.step(STEPS)
            if ON_GPU:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        stepper.prefetcher.close()
    kernels = []
    for event in found.key_averages():
        of_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        spent = event.self_device_time_total if ON_GPU else event.self_cpu_time_total
        if spent and of_gpu == ON_GPU:
            kernels.append({"kernel": event.key, "ms": spent / 1e3, "calls": event.count})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {
        "shape": shape,
        "loss": loss,
        "trained": trained,
        "ms": 1e3 * seconds,
        "busy": sum(kernel["ms"] for kernel in kernels) / (1e3 * seconds),
        "calls": sum(kernel["calls"] for kernel in kernels),
        "kernels": kernels,
    }


def section(row: dict) -> str:
    lines = [
        f"## {row['shape']}, {row['loss']}, {row['trained']}",
        "",
        f"{row['ms']:.0f} ms, {row['calls']:,} calls, busy {row['busy']:.0%}.",
        "",
        "| kernel | ms | calls | share of the step |",
        "|---|---|---|---|",
    ]
    for kernel in row["kernels"][:SHOWN]:
        name = kernel["kernel"].replace("|", "/")[:90]
        share = kernel["ms"] / row["ms"]
        lines.append(f"| `{name}` | {kernel['ms']:.2f} | {kernel['calls']:,} | {share:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
