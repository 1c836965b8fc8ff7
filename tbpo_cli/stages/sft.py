"""`tbpo sft`: supervised fine-tuning on the chosen responses, or on the rows of [sft] train."""

from __future__ import annotations

from tbpo_cli import console
from tbpo_cli.launch import ALONE, Processes, run_or_launch
from tbpo_cli.recipe import Recipe
from tbpo_cli.run import RunDir


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Trains `sft/adapter` (or `sft/model`) of a recipe with an [sft] table."""
    run_or_launch(work, "sft", recipe, run_dir, processes)
    report(recipe, run_dir)


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """The training in this process, which may be one of several."""
    from tbpo_cli.core.losses import build_loss
    from tbpo_cli.training import train_stage

    split = "sft" if recipe.sft is not None and recipe.sft.train is not None else "train"
    train_stage("sft", recipe, run_dir, build_loss("sft"), split)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the complete stage's result."""
    from tbpo_cli.train.metrics import read_metrics

    evaluations = [line for line in read_metrics(run_dir.stage("sft") / "metrics.jsonl") if line["split"] == "eval"]
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        rows = [
            ["loss (nats a token)", f"{before['loss']:.3f}", f"{after['loss']:.3f}"],
            ["entropy (nats a token)", f"{before['entropy']:.3f}", f"{after['entropy']:.3f}"],
        ]
        console.show_table("SFT on the held-out responses", ["", "before", "after"], rows)
    console.say(f"weights: {run_dir.weights('sft')}")
