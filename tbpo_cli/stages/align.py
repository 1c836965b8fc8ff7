"""`tbpo align`: preference optimisation against a frozen reference."""

from __future__ import annotations

from tbpo_cli import console
from tbpo_cli.core.generators import build_generator
from tbpo_cli.core.losses import Loss, build_loss
from tbpo_cli.launch import ALONE, Processes, run_or_launch
from tbpo_cli.recipe import Align, Recipe
from tbpo_cli.run import RunDir


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Trains `align/adapter` (or `align/model`)."""
    run_or_launch(work, "align", recipe, run_dir, processes)
    report(recipe, run_dir)


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """The training in this process, which may be one of several."""
    from tbpo_cli.training import train_stage

    train_stage("align", recipe, run_dir, loss_of(recipe.align), "train")


def loss_of(settings: Align) -> Loss:
    """The loss that [align.loss] names."""
    fields = dict(settings.loss)
    if "generator" in fields:
        fields["generator"] = build_generator(**fields["generator"])
    return build_loss(**fields)


# metric, what a person reads, whether it means something while policy and reference are still the same
SUMMARY = (
    ("accuracy", "reward accuracy (chosen above rejected)", "{:.1%}", False),
    ("margin", "reward margin (nats)", "{:.3f}", True),
    ("kl", "KL from the reference (nats a token)", "{:.4f}", True),
    ("entropy", "entropy of the policy (nats a token)", "{:.3f}", True),
    ("logps_chosen", "log-probability of chosen tokens (nats)", "{:.3f}", True),
    ("logps_rejected", "log-probability of rejected tokens (nats)", "{:.3f}", True),
)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the complete stage's result: held-out figures before and after, the files, and what to run next."""
    from tbpo_cli.train.metrics import read_metrics

    evaluations = [line for line in read_metrics(run_dir.stage("align") / "metrics.jsonl") if line["split"] == "eval"]
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        rows = [
            [label, form.format(before[name]) if at_start else "–", form.format(after[name])]
            for name, label, form, at_start in SUMMARY
            if name in after
        ]
        console.show_table(f"{recipe.align.loss['name']} on the held-out pairs", ["", "before", "after"], rows)
    weights, manifest = run_dir.weights("align"), run_dir.manifest("align")
    assert manifest is not None
    kind = "adapter" if recipe.model.lora is not None else "model"
    console.say(f"{kind}: {weights}   ({manifest['seconds']:.0f} s on {manifest['device']})")
    console.say(f"every step: {run_dir.stage('align') / 'metrics.jsonl'}   settings: {run_dir.path / 'recipe.toml'}")
    console.say(f"next: use it, AutoModelForCausalLM.from_pretrained({str(weights)!r}), or compare another loss:")
    console.say("      the same command with --set align.loss.name=dpo --run-dir runs/dpo")
