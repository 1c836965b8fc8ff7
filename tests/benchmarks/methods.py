"""Every loss on the quickstart's world, through the real commands: which one, and at what cost?

    export OMP_NUM_THREADS=1
    python tests/benchmarks/methods.py --part 0/2 &
    python tests/benchmarks/methods.py --part 1/2 & wait
    python tests/benchmarks/methods.py --report    # results/methods.*; also while parts still run

Each method's learning rate, then its β, are those of RATES and MULTIPLES with the highest true
score on validation prompts (seed 0); then it is run with 5 other seeds and measured on test
prompts, which the world makes anew. A run that has been measured stands in the folder, or in
results/methods.json, and is not made again: a part may be stopped at any time, and another machine
goes on from what is committed. About an hour on two quiet cores. `--methods`, `--seeds` and
`--no-tuning` make less of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import matplotlib.pyplot as plt
import numpy as np
from common import RESULTS, write_results

from tbpo_cli import console
from tbpo_cli.cli.main import app
from tbpo_cli.errors import DivergenceError

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "recipes/quickstart"
sys.path.insert(0, str(QUICKSTART))
import world  # noqa: E402

LAMBDAS = {"sba λ −0.5": -0.5, "sba λ 0": 0.0, "sba λ 0.5": 0.5, "sba λ 1": 1.0}
GENERATORS = {
    "logistic": "{name = 'logistic'}",
    **{f"{name}": f"{{name = 'sba', lam = {lam}, scale = 4.0}}" for name, lam in LAMBDAS.items()},
}
METHODS = {  # the fields of [align.loss], beside beta
    "dpo": {"name": "'dpo'"},
    "ipo": {"name": "'ipo'"},
    "hinge": {"name": "'hinge'"},
    "simpo": {"name": "'simpo'"},
    "orpo": {"name": "'orpo'"},
    "tdpo 1": {"name": "'tdpo'", "version": "1"},
    "tdpo 2": {"name": "'tdpo'", "version": "2"},
    "tis_dpo": {"name": "'tis_dpo'"},
    **{
        f"{loss}, {name}": {"name": f"'{loss}'", "generator": text}
        for loss in ("bpo", "tbpo_q", "tbpo_a")
        for name, text in GENERATORS.items()
    },
    "tbpo_q, log w = 0": {"name": "'tbpo_q'", "baseline_clip": "1e-9"},
}
STRENGTH = {
    "simpo": ("beta", 2.0),
    "orpo": ("lam", 0.1),
}  # what β is for the others: (field, default)
RATES, MULTIPLES = (
    (2e-4, 4.5e-4, 1e-3, 2e-3),
    (1.0, 5.0),
)  # learning rates; multiples of the default β
DEFAULT = (4.5e-4, 1.0)
SETTINGS = ("align.max_steps=61", "eval.diversity_prompts=50")  # beside the recipe's: half an epoch
TUNING_SEED, VALIDATION_PROMPTS, TEST_PROMPTS = 0, 200, 400
EVALUATED = ("kl", "entropy", "predictive_entropy", "self_bleu", "distinct_1", "length")
COLUMNS = {  # of the table: figure of a row, what a person reads, how it is written
    "true_score": ("true score", "{:.3f}"),
    "win_rate": ("win rate", "{:.3f}"),
    "right": ("right", "{:.3f}"),
    "rude": ("rude", "{:.3f}"),
    "kl": ("KL", "{:.3f}"),
    "entropy": ("entropy", "{:.3f}"),
    "self_bleu": ("self-BLEU", "{:.1f}"),
    "distinct_1": ("distinct-1", "{:.3f}"),
    "length": ("length", "{:.1f}"),
    "largest_grad_norm": ("largest gradient", "{:.2g}"),
    "clipped": ("clipped", "{:.0f}"),
}
LARGEST = ("largest_grad_norm", "clipped")  # of all seeds, not their mean
SPEED_STEPS = 16  # of which the first two are left out
FAMILIES = {
    "bpo": "tab:orange",
    "tbpo_q": "tab:green",
    "tbpo_a": "tab:blue",
    "": "tab:gray",
}  # of the plot
Choice = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".benchmarks/methods", help="where the runs are kept"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="K/N", help="every N-th method, from the K-th, from 0"
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--no-tuning", action="store_true", help=f"learning rate and multiple of β: {DEFAULT}"
    )
    parser.add_argument(
        "--speed", action="store_true", help="pairs/s of each method, and the base's own answers"
    )
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    take_over(arguments.folder)
    if arguments.report:
        report(arguments.folder)
        return
    write_prompts(arguments.folder)
    if arguments.speed:
        measure_speed(arguments.folder)
        return
    part, parts = map(int, arguments.part.split("/"))
    for method in arguments.methods[part::parts]:
        choice = DEFAULT if arguments.no_tuning else tune(arguments.folder, method)
        for seed in range(1, arguments.seeds + 1):
            run(arguments.folder, method, choice, seed, "test")


def tune(folder: Path, method: str) -> Choice:
    """The best learning rate at the default β, then the best β at that rate."""

    def best(choices: list[Choice]) -> Choice:
        return max(
            choices,
            key=lambda choice: run(folder, method, choice, TUNING_SEED, "validation")["true_score"],
        )

    rate, _ = best([(rate, MULTIPLES[0]) for rate in RATES])
    return best([(rate, multiple) for multiple in MULTIPLES])


def write_prompts(folder: Path) -> None:
    """Fresh prompts of the world that are in none of the quickstart's files."""
    known = {
        json.loads(line)["prompt"]
        for name in ("train", "eval")
        for line in (QUICKSTART / f"{name}.jsonl").open()
    }
    rng = Random(20260101)
    for name, count in (("validation", VALIDATION_PROMPTS), ("test", TEST_PROMPTS)):
        prompts = []
        while len(prompts) < count:
            prompt = world.make_prompt(rng).text
            if prompt not in known:
                known.add(prompt)
                prompts.append(prompt)
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def take_over(folder: Path) -> None:
    """What is committed counts as measured."""
    committed = RESULTS / "methods.json"
    for row in json.loads(committed.read_text())["rows"] if committed.exists() else ():
        choice = (row["rate"], row["multiple"])
        path = folder / f"{label_of(row['method'], choice, row['seed'], row['split'])}.json"
        if not path.exists():
            path.write_text(json.dumps(row), encoding="utf-8")


def label_of(method: str, choice: Choice, seed: int, split: str) -> str:
    return f"{method}-{choice[0]:g}-{choice[1]:g}-{seed}-{split}".replace(" ", "").replace("=", "")


def run(folder: Path, method: str, choice: Choice, seed: int, split: str) -> dict:
    """One training and its measurement; read from the folder if it is there."""
    rate, multiple = choice
    label = label_of(method, choice, seed, split)
    found = folder / f"{label}.json"
    if found.exists():
        return json.loads(found.read_text())
    directory, started = folder / label, time.monotonic()
    sets = [f"align.loss={loss_of(folder, method, choice, seed)}", f"align.learning_rate={rate}"]
    sets += [f"sample.prompts={folder / split}.jsonl", "eval.opponents=['reference']"]
    row = {
        "method": method,
        "rate": rate,
        "multiple": multiple,
        "seed": seed,
        "split": split,
        "diverged": False,
    }
    try:
        train(folder, directory, seed, sets)
    except DivergenceError:
        row |= {"diverged": True, "true_score": 0.0}
    else:
        row |= stability(directory / "align/metrics.jsonl")
        if split == "validation":
            tbpo("sample", directory, seed, *sets, "sample.models=['policy']")
        else:
            tbpo("eval", directory, seed, *sets)
            row |= evaluation(directory / "eval/results.json")
        row |= true_scores(directory / "sample/samples.jsonl", "policy")
    found.write_text(json.dumps(row), encoding="utf-8")
    shutil.rmtree(directory)
    print(
        f"{label}: true score {row['true_score']:.3f}, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return row


def loss_of(folder: Path, method: str, choice: Choice, seed: int) -> str:
    """[align.loss] as an inline table."""
    fields, (strength, default) = METHODS[method], STRENGTH.get(method, ("beta", 0.1))
    fields = fields | {strength: str(default * choice[1])}
    if method == "tis_dpo":
        fields |= {name: f"'{helper(folder, name, seed)}'" for name in ("positive", "negative")}
    return f"{{{', '.join(f'{key} = {value}' for key, value in fields.items())}}}"


def train(folder: Path, directory: Path, seed: int, sets: list[str]) -> None:
    """`tbpo align`, with the pairs that `tbpo prepare` makes for the seed once."""
    prepared = folder / f"prepared-{seed}-{os.getpid()}"
    tbpo("prepare", prepared, seed)
    shutil.copytree(prepared, directory, dirs_exist_ok=True)
    tbpo("align", directory, seed, *sets)


def measure_speed(folder: Path) -> None:
    """Pairs a second of each method's steps, one method after the other on a machine that does
    nothing else.
    """
    for method in METHODS:
        directory, loss = folder / "speed", loss_of(folder, method, DEFAULT, TUNING_SEED)
        sets = [f"align.loss={loss}", f"align.max_steps={SPEED_STEPS}"]
        train(folder, directory, TUNING_SEED, sets)
        steps = [
            json.loads(line) for line in (directory / "align/metrics.jsonl").open(encoding="utf-8")
        ]
        speeds = [line["pairs_per_s"] for line in steps if line["split"] == "train"][2:]
        row = {"method": method, "rate": 0, "multiple": 0, "seed": 0, "split": "speed"}
        row |= {"pairs_per_s": float(np.median(speeds))}
        if method == next(iter(METHODS)):
            sets += [
                f"sample.prompts={folder}/test.jsonl",
                "sample.models=['reference']",
                "sample.num_samples=3",
                "eval.opponents=['reference']",
            ]
            tbpo("sample", directory, TUNING_SEED, *sets)
            row |= {"base": true_scores(directory / "sample/samples.jsonl", "reference")}
        (folder / f"{label_of(method, (0, 0), 0, 'speed')}.json").write_text(
            json.dumps(row), encoding="utf-8"
        )
        shutil.rmtree(directory)
        print(f"{method}: {row['pairs_per_s']:.1f} pairs/s", flush=True)


def helper(folder: Path, name: str, seed: int) -> Path:
    """TIS-DPO's helper of a seed: DPO at its defaults, on the pairs or on the reversed ones."""
    directory = folder / f"helper-{name}-{seed}"
    train(
        folder,
        directory,
        seed,
        ["align.loss={name = 'dpo'}", f"align.reverse={str(name == 'negative').lower()}"],
    )
    return directory


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
        "true_score": float(
            np.mean([world.score(*each) for each in zip(prompts, answers, strict=True)])
        ),
        "right": float(np.mean([reading.correct for reading in readings])),
        "rude": float(np.mean([reading.rude > 0 for reading in readings])),
    }


def evaluation(path: Path) -> dict[str, float]:
    """What `tbpo eval` says of the policy; and of the base, whose names begin with "base_"."""
    results = json.loads(path.read_text(encoding="utf-8"))
    found = {"win_rate": results["win_rates"][0]["raw"]["value"]}
    for prefix, model in (("", "policy"), ("base_", "reference")):
        figures = (
            results["models"][model]["preference"]["all"] | results["models"][model]["diversity"]
        )
        found |= {
            f"{prefix}{name}": figures[name]["value"] for name in EVALUATED if name in figures
        }
    return found


def stability(path: Path) -> dict[str, float]:
    steps = [
        line for line in map(json.loads, path.open(encoding="utf-8")) if line["split"] == "train"
    ]
    curve = [line for line in steps if "kl" in line and "accuracy" in line]
    return {
        "largest_grad_norm": max(line["grad_norm"] for line in steps),
        "clipped": sum(line.get("num_clipped", 0) for line in steps),
        "curve": [[line["step"], line["kl"], line["accuracy"]] for line in curve],
    }


def report(folder: Path) -> None:
    rows = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*-*-*-*-*.json"))
    ]
    of_split = {
        split: [row for row in rows if row["split"] == split] for split in ("test", "speed")
    }
    finished = [row for row in of_split["test"] if not row.get("diverged")]
    tested = {method: [row for row in finished if row["method"] == method] for method in METHODS}
    tested = {method: found for method, found in tested.items() if found}
    speeds = {row["method"]: row["pairs_per_s"] for row in of_split["speed"]}
    base = next((row["base"] for row in of_split["speed"] if "base" in row), {})
    failed = Counter(row["method"] for row in of_split["test"] if row.get("diverged"))
    table = markdown(tested, speeds, base, failed)
    print(table)
    write_results("methods", "Every loss on the quickstart's world", rows, table)
    plot(tested)


def markdown(
    tested: dict[str, list[dict]],
    speeds: dict[str, float],
    base: dict[str, float],
    failed: Counter[str],
) -> str:
    """Means and 95 % intervals over the seeds that did not diverge, the best true score first."""
    lines = [
        f"| method | rate, × β | {' | '.join(name for name, _ in COLUMNS.values())} | pairs/s |"
    ]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    base = base | {
        key.removeprefix("base_"): value
        for key, value in next(iter(tested.values()))[0].items()
        if key.startswith("base_")
    }
    cells = [form.format(base[name]) if name in base else "" for name, (_, form) in COLUMNS.items()]
    lines.append(f"| the base | | {' | '.join(cells)} | |")
    for method, rows in sorted(
        tested.items(), key=lambda item: -np.mean([row["true_score"] for row in item[1]])
    ):
        cells = [
            form.format(max(row[name] for row in rows))
            if name in LARGEST
            else interval([row[name] for row in rows], form)
            for name, (_, form) in COLUMNS.items()
        ]
        speed = f"{speeds[method]:.0f}" if method in speeds else ""
        name = f"{method} ({failed[method]} diverged)" if failed[method] else method
        lines.append(
            f"| {name} | {rows[0]['rate']:g}, {rows[0]['multiple']:g} "
            f"| {' | '.join(cells)} | {speed} |"
        )
    return "\n".join(lines)


def interval(values: list[float], form: str) -> str:
    """The mean and the half width of its 95 % interval by Student's t, over the seeds."""
    if len(values) < 2:
        return form.format(values[0])
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[len(values)]
    half = t * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{form.format(np.mean(values))} ± {form.format(half)}"


def plot(tested: dict[str, list[dict]]) -> None:
    """The frontier with its spread, and the KL of the training pairs over the training; names where
    they fit.
    """
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "tbpo"})
    figure, (frontier, curves) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(3, 2))
    points, ends = {}, {}
    for method, rows in tested.items():
        colour = next(colour for family, colour in FAMILIES.items() if method.startswith(family))
        kl, score = ([row[name] for row in rows] for name in ("kl", "true_score"))
        spread = np.std(score, ddof=1) if len(score) > 1 else 0.0
        points[method] = (np.mean(kl), np.mean(score))
        frontier.errorbar(
            *points[method], yerr=spread, fmt="o", markersize=4, linewidth=0.8, color=colour
        )
        steps, kls = zip(*((step, kl) for step, kl, _ in rows[0]["curve"]), strict=True)
        ends[method] = (steps[-1], kls[-1])
        curves.plot(steps, kls, linewidth=0.9, color=colour)
    frontier.set(
        xlabel="KL from the reference (nats a token)",
        ylabel="true score (± standard deviation of the seeds)",
    )
    curves.set(
        xlabel="step",
        ylabel="KL from the reference (nats a token)",
        title="over training (first seed)",
    )
    for panel, places in ((frontier, points), (curves, ends)):
        panel.spines[["top", "right"]].set_visible(False)
        name_apart(panel, places)
    for family, colour in FAMILIES.items():
        frontier.plot(
            [], [], "o", color=colour, label=f"{family}, by generator" if family else "others"
        )
    frontier.legend(frameon=False, fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(RESULTS / "methods.svg", metadata={"Date": None})


def name_apart(panel, places: dict[str, tuple[float, float]]) -> None:
    """Names the places from the outside in, but none that would cover the name of another."""
    shown = {name: panel.transLimits.transform(place) for name, place in places.items()}
    middle, named = np.median(list(shown.values()), axis=0), []
    for name, place in sorted(shown.items(), key=lambda item: -np.abs(item[1] - middle).sum()):
        if all(
            abs(place[1] - other[1]) > 0.03 or abs(place[0] - other[0]) > 0.25 for other in named
        ):
            named.append(place)
            panel.annotate(name, places[name], (4, 2), textcoords="offset points", fontsize=7)


if __name__ == "__main__":
    main()
