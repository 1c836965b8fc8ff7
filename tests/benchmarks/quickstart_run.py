"""One training on the quickstart's world and its measurement, by the real commands."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from random import Random
from statistics import fmean

from torch import Tensor

from tbpo_cli import console
from tbpo_cli.batch.layouts import PairBatch
from tbpo_cli.cli.main import app
from tbpo_cli.errors import DivergenceError
from tbpo_cli.model.policy import REFERENCE
from tbpo_cli.model.scoring import Scorer

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "recipes/quickstart"
sys.path.insert(0, str(QUICKSTART))
import world  # noqa: E402

SPLITS = {"validation": 400, "test": 400, "new": 400}  # prompts; "test" is for reasons.py
HELD_OUT_PAIRS = 150  # by which the KL is measured
SETTINGS = (  # beside the recipe's: half an epoch
    "align.max_steps=61",
    "align.checkpoint_every=1000",
    "align.max_tokens_per_device=4096",
    "align.log_every=61",
    "eval.diversity_prompts=50",
)
EVALUATED = ("kl", "entropy", "predictive_entropy", "self_bleu", "distinct_1", "length")
KEPT_BATCHES = 600  # of a megabyte each: two seeds, for losses of tokens and of responses


def measured(folder: Path, directory: Path, seed: int, sets: list[str], split: str) -> dict:
    """What a run came to: the search needs the true score and the KL, the table more."""
    try:
        train(folder, directory, seed, sets)
    except DivergenceError:
        return {"diverged": True, "true_score": 0.0}
    found = of_training(directory / "align/metrics.jsonl")
    if split == "validation":
        tbpo("sample", directory, seed, *sets, "sample.models=['policy']")
    else:
        tbpo("eval", directory, seed, *sets)
        found |= evaluation(directory / "eval/results.json")
    return found | true_scores(directory / "sample/samples.jsonl", "policy")


def write_prompts(folder: Path) -> None:
    """Fresh prompts of the world that are in none of the quickstart's files; and held-out pairs."""
    known = {
        json.loads(line)["prompt"]
        for name in ("train", "eval")
        for line in (QUICKSTART / f"{name}.jsonl").open(encoding="utf-8")
    }
    for name, count in SPLITS.items():
        rng, prompts = Random(f"methods, {name}"), []
        while len(prompts) < count:
            prompt = world.make_prompt(rng).text
            if prompt not in known:
                known.add(prompt)
                prompts.append(prompt)
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        _write_once(folder / f"{name}.jsonl", lines)
    pairs = (QUICKSTART / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    _write_once(folder / "held-out.jsonl", "".join(pairs[:HELD_OUT_PAIRS]))


def _write_once(path: Path, text: str) -> None:
    """Other parts may be reading the file."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def train(folder: Path, directory: Path, seed: int, sets: list[str]) -> None:
    """`tbpo align`, with the pairs that `tbpo prepare` makes for the seed once."""
    prepared = folder / f"prepared-{seed}"
    with (folder / "preparing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other parts wait for what they share
        tbpo("prepare", prepared, seed, *(one for one in sets if one.startswith("data.")))
    shutil.copytree(prepared, directory, dirs_exist_ok=True)
    tbpo("align", directory, seed, *sets)


def share_reference() -> None:
    """From here on, the frozen base reads a batch once in this process, and not once a run.

    Its hidden states are kept, by what it reads.
    """
    compute, known = Scorer._view_states, OrderedDict()

    def view_states(scorer: Scorer, name: str, batch: PairBatch) -> Tensor:
        if name != REFERENCE:
            return compute(scorer, name, batch)
        inputs = (value for value in batch.model_inputs.values() if isinstance(value, Tensor))
        key = tuple(value.numpy().tobytes() for value in (*inputs, batch.predictor))
        known[key] = known.pop(key) if key in known else compute(scorer, name, batch)
        if len(known) > KEPT_BATCHES:
            known.popitem(last=False)
        return known[key]

    Scorer._view_states = view_states


def tbpo(stage: str, directory: Path, seed: int, *sets: str) -> None:
    """The command, called in this process: its libraries are imported once."""
    console.err.quiet = console.out.quiet = True
    flags = [part for one in (*SETTINGS, f"run.seed={seed}", *sets) for part in ("--set", one)]
    recipe = ROOT / "recipes/quickstart.toml"
    app([stage, str(recipe), "--quiet", "--run-dir", str(directory), *flags], standalone_mode=False)


def true_scores(path: Path, model: str) -> dict[str, float]:
    """Mean true score, and the shares of right and of rude answers, as the world sees them."""
    samples = [
        each for each in map(json.loads, path.open(encoding="utf-8")) if each["model"] == model
    ]
    prompts = [each["messages"][-1]["content"] for each in samples]
    answers = [each["completion"] for each in samples]
    readings = [world.parse_response(*each) for each in zip(prompts, answers, strict=True)]
    return {
        "true_score": fmean(reading.score for reading in readings),
        "right": fmean(reading.correct for reading in readings),
        "rude": fmean(reading.rude > 0 for reading in readings),
    }


def evaluation(path: Path) -> dict[str, float]:
    """What `tbpo eval` says of the policy."""
    results = json.loads(path.read_text(encoding="utf-8"))
    policy = results["models"]["policy"]
    figures = policy["preference"]["all"] | policy["diversity"]
    found = {name: figures[name]["value"] for name in EVALUATED if name in figures}
    return {"win_rate": results["win_rates"][0]["raw"]["value"]} | found


def of_training(path: Path) -> dict[str, float]:
    """The KL and the accuracy on held-out pairs at the end, and the largest gradient."""
    steps = [json.loads(line) for line in path.open(encoding="utf-8")]
    last = [step for step in steps if step["split"] == "eval"][-1]
    trained = [step for step in steps if step["split"] == "train"]
    return {
        "kl": last["kl"],
        "accuracy": last["accuracy"],
        "largest_grad_norm": max(step["grad_norm"] for step in trained),
    }
