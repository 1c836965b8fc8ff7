"""Pairs of the policy's own answers in rounds, in one round, and fixed pairs: what do they reach?

    export OMP_NUM_THREADS=1
    python tests/benchmarks/rounds.py --part 0/2 &
    python tests/benchmarks/rounds.py --part 1/2 & wait
    python tests/benchmarks/rounds.py --report        # results/rounds.*

recipes/rounds.toml through the real commands, with TBPO-A and DPO. All settings train on as many
pairs, in as many steps, at the same learning rate and β: those of results/methods_small_grid.md
for both losses. The judge is the noisy one of the recipe; what is measured is the true score
of five answers to each of 100 held-out prompts. A run that has been measured stands in the folder,
and is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from common import write_results

from tbpo_cli import console
from tbpo_cli.cli.main import app

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "recipes/quickstart"
sys.path.insert(0, str(QUICKSTART))
import world  # noqa: E402

LOSSES = {"tbpo_a": "{name = 'tbpo_a', beta = 0.5}", "dpo": "{name = 'dpo', beta = 0.5}"}
ROUNDS, PROMPTS, ANSWERS = 3, 320, 5  # rounds, prompts of each, answers to each
SETTINGS = ("three rounds", "one round", "fixed pairs")
COMMON = ("align.batch_pairs=16", "align.learning_rate=1e-3", "align.checkpoint_every=1000")
SEEDS = (1, 2, 3)
T = {2: 12.706, 3: 4.303}  # Student's t for 95 %, by the number of seeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".benchmarks/rounds")
    parser.add_argument("--part", default="0/1", metavar="K/N")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        report(arguments.folder)
        return
    part, parts = map(int, arguments.part.split("/"))
    runs = [(loss, name, seed) for seed in SEEDS for name in SETTINGS for loss in LOSSES]
    for loss, name, seed in runs[part::parts]:
        run(arguments.folder, loss, name, seed)


def run(folder: Path, loss: str, name: str, seed: int) -> None:
    """One alignment and its measurement, unless it is in the folder."""
    label = f"{loss}-{name.replace(' ', '-')}-{seed}"
    found, directory = folder / f"{label}.json", folder / label
    if found.exists():
        return
    started = time.monotonic()
    sets = [*COMMON, f"align.loss={LOSSES[loss]}", f"run.seed={seed}"]
    sets += [f"data.eval={few_rows(folder, 'eval', 100)}"]
    row = {"loss": loss, "setting": name, "seed": seed}
    if name == "fixed pairs":
        rows = few_rows(folder, "train", ROUNDS * PROMPTS)
        sets.append(f"data.train={rows}")
        tbpo("align", "quickstart", directory, *sets)
        prompts = directory / "prompts.jsonl"
        prompts.write_text((folder / "eval-100.jsonl").read_text(encoding="utf-8"))
        asked = (f"sample.prompts={prompts}", f"sample.num_samples={ANSWERS}")
        tbpo("sample", "quickstart", directory, *sets, *asked, "sample.models=['policy']")
        row["scores"] = [true_score(directory / "sample/samples.jsonl")]
        row["kl"] = [last_kl(directory / "align/metrics.jsonl")]
    else:
        number = ROUNDS if name == "three rounds" else 1
        each = PROMPTS * ROUNDS // number
        sets += [f"rounds.number={number}", f"rounds.prompts={each}", f"rounds.answers={ANSWERS}"]
        tbpo("align", "rounds", directory, *sets)
        rounds = directory / "rounds"
        policies = [rounds / "0", *(rounds / f"{n}/after" for n in range(1, number + 1))]
        row["scores"] = [true_score(path / "sample/samples.jsonl") for path in policies]
        row["kl"] = [last_kl(rounds / f"{n}/align/metrics.jsonl") for n in range(1, number + 1)]
        row["pairs"] = [pairs_of(rounds / f"{n}/prepare") for n in range(1, number + 1)]
    row["seconds"] = time.monotonic() - started
    found.write_text(json.dumps(row), encoding="utf-8")
    shutil.rmtree(directory)
    print(
        label, [round(score, 3) for score in row["scores"]], f"{row['seconds']:.0f} s", flush=True
    )


def tbpo(command: str, recipe: str, directory: Path, *sets: str) -> None:
    """A command, in this process."""
    console.err.quiet = console.out.quiet = True
    flags = [part for each in sets for part in ("--set", each)]
    arguments = [command, f"{ROOT}/recipes/{recipe}.toml", "--quiet", "--run-dir", str(directory)]
    app([*arguments, *flags], standalone_mode=False)


def few_rows(folder: Path, name: str, number: int) -> Path:
    """A file with the first rows of one of the quickstart's."""
    path = folder / f"{name}-{number}.jsonl"
    if not path.exists():
        lines = (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:number]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def true_score(path: Path) -> float:
    """The mean over all answers of a file."""
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scores = [world.score(one["messages"][-1]["content"], one["completion"]) for one in samples]
    return float(np.mean(scores))


def last_kl(path: Path) -> float:
    """KL(ref ‖ policy) on the held-out pairs at the end, nats a token."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return float([line for line in lines if line["split"] == "eval"][-1]["kl"])


def pairs_of(folder: Path) -> int:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return sum(count["kept"].get("train", 0) for count in manifest["counts"])


def report(folder: Path) -> None:
    """results/rounds.{json,md}, of all runs in the folder."""
    found = [path for path in sorted(folder.glob("*.json")) if path.stem.count("-") > 1]
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    lines = ["| loss | pairs | base | round 1 | round 2 | round 3 | KL at the end | seeds |"]
    lines.append("|---" * 8 + "|")
    for loss in LOSSES:
        for name in SETTINGS:
            of_both = [row for row in rows if (row["loss"], row["setting"]) == (loss, name)]
            if not of_both:
                continue
            columns = [*zip(*(row["scores"] for row in of_both), strict=True)]
            cells = [interval([*column]) for column in columns]
            if name == "fixed pairs":
                cells = ["", cells[0]]
            cells += [""] * (ROUNDS + 1 - len(cells))
            kl = interval([row["kl"][-1] for row in of_both])
            lines.append(f"| {loss} | {name} | {' | '.join(cells)} | {kl} | {len(of_both)} |")
    about = (
        f"True score of {ANSWERS} answers to each of 100 held-out prompts; means over the seeds ± "
        f"95 % intervals by Student's t. {ROUNDS * PROMPTS} prompts in all settings, "
        f"{ANSWERS} answers each where the answers are the policy's own, whose best and worst by "
        "a noisy mark make the pair; the fixed pairs are two answers of the base, labelled by a "
        "noisy comparison. Steps of 16 pairs, learning rate 1e-3, β 0.5. What has one round stands "
        "under round 1."
    )
    table = "\n".join(lines)
    print(table)
    write_results("rounds", "Pairs from the policy's own answers", rows, f"{about}\n\n{table}")


def interval(values: list[float]) -> str:
    """The mean and the half width of its interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = T[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
