"""`tbpo align`: preference optimisation against a frozen reference."""

from __future__ import annotations

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.evaluation.measures import PREFERENCE
from tbpo_cli.report.diagnoses import AFTER, diagnose
from tbpo_cli.report.facts import Facts, after_training
from tbpo_cli.runs.launch import ALONE, Processes, run_or_launch
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage

SHOWN = ("accuracy", "margin", "kl", "entropy", "logps_chosen", "logps_rejected")
# While policy and reference are still the same, the accuracy means nothing.
SUMMARY = tuple((name, *PREFERENCE[name], name != "accuracy") for name in SHOWN)


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Trains `align/adapter` (or `align/model`)."""
    run_or_launch(STAGE, recipe, run_dir, processes)
    run_dir.require(STAGE.name)
    report(recipe, run_dir)


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """The training in this process, which may be one of several."""
    from tbpo_cli.train.stage import train_stage

    train_stage(STAGE, recipe.align, recipe, run_dir, recipe.align.loss)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the complete stage's result.

    Held-out figures before and after, what went wrong, the files, and what to type next.
    """
    from tbpo_cli.train.metrics import read_metrics

    folder = run_dir.stage("align")
    metrics = read_metrics(folder / "metrics.jsonl")
    title = f"{recipe.align.loss_name} on the held-out pairs"
    console.show_evaluations(title, metrics, SUMMARY)
    weights = run_dir.weights("align")
    manifest = run_dir.manifest("align")
    before = Facts(
        stage="align",
        lora=recipe.model.lora is not None,
        rate=recipe.align.learning_rate,
        weights=manifest.get("num_weights", Facts.weights),  # an earlier version leaves none
        batch=recipe.align.batch_size,
        pairs=_kept(run_dir, "train"),
        held_out=_kept(run_dir, "eval"),
    )
    for sentence in diagnose(after_training(metrics, before), AFTER):
        console.say(f"WARNING: {sentence}")
    took = console.duration(manifest["seconds"])
    console.say(
        f"{weights.name}: {console.short(weights)} (trained in {took} on {manifest['device']})"
    )
    console.say(f"every step: {console.short(folder / 'metrics.jsonl')}")
    console.say(f"settings: {console.short(run_dir.path / 'recipe.toml')}")
    console.say(f"load it: AutoModelForCausalLM.from_pretrained({console.short(weights)!r})")


def _kept(run_dir: RunDir, split: str) -> int:
    """The pairs of a split that `tbpo prepare` has kept."""
    return sum(each["kept"].get(split, 0) for each in run_dir.manifest("prepare")["counts"])


STAGE = Stage(
    name="align",
    needs=lambda recipe: ("prepare", *recipe.training_stages[:-1]),
    keys=("run.seed", "model.", "align."),
    run=run,
    report=report,
    work=work,
)
