"""One architecture through the product's stages, against plain transformers (tests/plain.py)."""

import json
from dataclasses import dataclass, field

import plain
import tomli_w
import torch
from conftest import command, preference_rows, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM
from zoo import families

LOSSES = ("tbpo_a", "tbpo_q", "dpo")
LAYOUTS = ("auto", "packed", "padded")
NUM_STEPS = 3
NUM_PAIRS = 4
NUM_PROMPTS = 3
NEW_TOKENS = 6
RATE = 1e-4
TOLERANCE = 2e-4  # of figures that are about 1, after three steps of AdamW in fp32
# The first gradient of tbpo_q's baseline is rounding alone, and AdamW makes whole steps of it.
TOLERANCES = {"tbpo_q": 1e-3}
ROUNDING = 1e-6
NO_BASELINE = "the state baseline needs a model with a linear output head"
CANNOT = "the model cannot take rows of several sequences"


@dataclass
class Found:
    """What became of an architecture: a line of the table."""

    kind: str
    layout: str = ""  # how its rows are laid out, and why
    refused: str = ""  # the error that a user sees, where the product does not take the model
    no_baseline: bool = False  # whether losses with a state baseline are refused
    faults: list[str] = field(default_factory=list)


class RefusedError(Exception):
    """The product says, in an error message, that it cannot do this."""


def tbpo(folder, *arguments):
    """The command; returns what it printed.

    Raises:
        RefusedError: with the message, if it ends with one.
        AssertionError: if it ends in any other way.
    """
    done = command(*arguments, cwd=folder)
    if done.returncode == 2 and done.stderr.rstrip().rpartition("error: ")[1]:
        raise RefusedError("error: " + done.stderr.rpartition("error: ")[2])
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-500:]}"
    return done.stdout + done.stderr


def write_recipe(folder, **tables):
    recipe = {
        "run": {"seed": 7},
        "model": {"base": "base"},
        "data": {"train": "rows.jsonl", "eval": "eval.jsonl"},
        "align": {
            "max_steps": NUM_STEPS,
            "batch_pairs": NUM_PAIRS,
            "learning_rate": RATE,
            "warmup": 0.0,
            "schedule": "linear",
            "log_every": 1,
            "eval_every": NUM_STEPS,
        },
        "sample": {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "models": ["policy"]},
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe | tables))


def make(folder, kind, tokenizer):
    """The checkpoint and rows of unequal lengths; also writes recipe.toml.

    Raises:
        families.NotBuiltError: if there is no small checkpoint.
    """
    model = families.build(kind, tokenizer)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = preference_rows(NUM_PAIRS, seed=5)
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", preference_rows(NUM_PROMPTS, seed=6))
    write_recipe(folder)
    return rows


def examine(kind, folder, tokenizer):
    """All comparisons of one architecture.

    Raises:
        families.NotBuiltError: if there is no small checkpoint.
    """
    found = Found(kind)
    rows = make(folder, kind, tokenizer)
    try:
        for check in (check_training, check_samples, check_adapter):
            found.faults += check(folder, rows, found)
        tbpo(folder, "show", "recipe.toml")
    except RefusedError as refusal:
        found.refused = str(refusal).splitlines()[0].removeprefix("error: ")
    except AssertionError as error:
        found.faults.append(str(error))
    return found


def check_training(folder, rows, found):
    """Losses, log-probabilities and KL of three steps of all weights, by loss and layout."""
    faults = []
    for loss in LOSSES:
        settings = plain.Settings(
            loss, NUM_STEPS, learning_rate=RATE, warmup=0.0, weight_decay=0.0, max_grad_norm=10.0
        )
        want = None
        for layout in LAYOUTS if loss == "dpo" else LAYOUTS[:1]:
            sets = (
                f"align.loss={{name = '{loss}', beta = {settings.beta}}}",
                f"align.layout={layout}",
            )
            arguments = [part for one in sets for part in ("--set", one)]
            try:
                said = tbpo(folder, "align", "recipe.toml", "--restart", *arguments)
            except RefusedError as refusal:
                if CANNOT in str(refusal) and layout == "packed":
                    continue
                if NO_BASELINE in str(refusal):
                    found.no_baseline = True
                    continue
                raise
            found.layout = found.layout or said.partition("rows are ")[2].splitlines()[0]
            want = want or plain.train(folder / "base", rows, settings)
            faults += compare(folder, want, loss, layout)
    return faults


def compare(folder, want, loss_name, layout):
    lines = (folder / "runs/recipe/align/metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, lines) if line["split"] == "train"]
    faults = []
    within = TOLERANCES.get(loss_name, TOLERANCE)
    for step, (line, loss, figures) in enumerate(
        zip(lines, want.losses, want.figures, strict=True), 1
    ):
        for name, value in {"loss": loss, **figures}.items():
            if name == "accuracy" and abs(figures["margin"]) < ROUNDING:
                continue  # policy and reference are the same but for rounding: it says nothing
            if abs(line[name] - value) > within * max(1, abs(value)):
                where = f"{loss_name}, {layout}, step {step}"
                faults.append(f"{where}: {name} is {line[name]:.6f}, not {value:.6f}")
    return faults


def check_samples(folder, rows, found):
    """Greedy answers of the saved model at two batch sizes, and by plain passes without a cache."""
    answers = {}
    for size in (1, NUM_PROMPTS):
        sets = ("align.loss={name = 'dpo', beta = 0.3}", f"sample.batch_size={size}")
        arguments = [part for one in sets for part in ("--set", one)]
        tbpo(folder, "sample", "recipe.toml", "--restart", *arguments)
        path = folder / "runs/recipe/sample/samples.jsonl"
        answers[size] = [json.loads(line) for line in path.read_text().splitlines()]
    faults = []
    saved = folder / "runs/recipe/align/model"
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    tokenizer = plain.AutoTokenizer.from_pretrained(saved)
    for one, other in zip(answers[1], answers[NUM_PROMPTS], strict=True):
        if one["token_ids"] != other["token_ids"]:
            faults.append(f"batch sizes: {one['token_ids']} alone, {other['token_ids']} in a batch")
        prompt = tokenizer.encode(one["prompt"], add_special_tokens=False)
        want = plain.greedy(model, prompt, {tokenizer.eos_token_id}, NEW_TOKENS)
        if one["token_ids"] != want:
            faults.append(f"sample: {one['token_ids']}, by plain passes {want}")
    return faults


def check_adapter(folder, rows, found):
    """LoRA: the saved adapter and the merged model have the figures of the trained policy."""
    from tbpo_cli.config.recipe import load_recipe
    from tbpo_cli.model.merge import merge_adapter

    write_recipe(folder, model={"base": "base", "lora": {"r": 4, "dropout": 0.0}})
    sets = ("--set", "align.loss={name = 'dpo'}", "--set", "align.learning_rate=1e-2")
    tbpo(folder, "align", "recipe.toml", "--run-dir", "lora", *sets)
    lines = [json.loads(line) for line in (folder / "lora/align/metrics.jsonl").open()]
    want = [line for line in lines if line["split"] == "eval"][-1]
    recipe = load_recipe(folder / "recipe.toml")
    adapter = folder / "lora/align/adapter"
    merge_adapter(recipe.model, adapter, folder / "merged", "5GB")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    faults = []
    before = figures(base, folder)
    if all(abs(want[key] - value) < TOLERANCE for key, value in before.items()):
        faults.append(f"LoRA has changed nothing: {before}")
    for name, model in (("merged", merged), ("adapter", PeftModel.from_pretrained(base, adapter))):
        for key, value in figures(model, folder).items():
            if abs(value - want[key]) > TOLERANCE * max(1, abs(value)):
                faults.append(f"{name}: {key} is {value:.6f}, in training {want[key]:.6f}")
    return faults


def figures(model, folder):
    """Mean log-probability of the held-out chosen and rejected tokens."""
    tokenizer = plain.AutoTokenizer.from_pretrained(folder / "base")
    sums = {"chosen": 0.0, "rejected": 0.0}
    counts = dict.fromkeys(sums, 0)
    for row in map(json.loads, (folder / "eval.jsonl").open()):
        prompt, responses = plain.tokenize(tokenizer, row)
        for side, ids in responses.items():
            with torch.no_grad():
                sums[side] += plain.read(model.eval(), prompt, ids).logps.sum().item()
            counts[side] += len(ids)
    return {f"logps_{side}": sums[side] / counts[side] for side in sums}
