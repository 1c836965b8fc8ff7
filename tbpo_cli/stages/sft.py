"""`tbpo sft`: supervised fine-tuning on the chosen responses, or on the rows of [sft] train."""

from __future__ import annotations

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.runs.launch import ALONE, Processes, run_or_launch
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage

SUMMARY = (
    ("loss", "loss (nats a token)", "{:.3f}", True),
    ("entropy", "entropy (nats a token)", "{:.3f}", True),
)


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Trains `sft/adapter` (or `sft/model`) of a recipe with an [sft] table."""
    run_or_launch(STAGE, recipe, run_dir, processes)
    run_dir.require(STAGE.name)
    report(recipe, run_dir)


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """The training in this process, which may be one of several."""
    from tbpo_cli.core.losses import build_loss
    from tbpo_cli.train.stage import train_stage

    assert recipe.sft is not None
    train_stage(STAGE, recipe.sft, recipe, run_dir, build_loss("sft"))


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the complete stage's result."""
    from tbpo_cli.train.metrics import read_metrics

    metrics = read_metrics(run_dir.stage("sft") / "metrics.jsonl")
    console.show_evaluations("SFT on the held-out responses", metrics, SUMMARY)
    console.say(f"weights: {console.short(run_dir.weights('sft'))}")


STAGE = Stage(
    name="sft",
    needs=lambda recipe: ("prepare",),
    keys=("run.seed", "model.", "sft."),
    run=run,
    report=report,
    work=work,
)
