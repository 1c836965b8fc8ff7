"""Why a loss does as it does on the quickstart: shifted positions, shared prefixes, a floor of R.

    export OMP_NUM_THREADS=1
    python tests/benchmarks/reasons.py --part 0/2 &
    python tests/benchmarks/reasons.py --part 1/2 & wait
    python tests/benchmarks/reasons.py --report    # results/reasons.*; 15 minutes on two cores

Three questions, each over SEEDS, by the true score of answers to the test prompts of
quickstart_run.py; the rate 1e-3 and β 0.5 are the best of results/methods_small_grid.md.

- Positions. "Okay! " is put before answers: in `straight` pairs before both or neither, so that
  position t of one still means position t of the other; in `shifted` pairs before one of the two, a
  random one. Either way half of the answers have it, chosen and rejected ones alike; the scorer
  takes it away again.
- Prefixes. How much of the aligned length the two responses have in common before they part: log
  R_t = 0 there.
- A floor. TBPO-A at the learning rates where it begins to break, with and without `min_ratio`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from statistics import fmean, stdev

import numpy as np
from common import write_results
from quickstart_run import QUICKSTART, ROOT, tbpo, true_scores, world, write_prompts

from tbpo_cli.data.store import PairStore

EXTRA, SEEDS = "Okay! ", (1, 2, 3)
OPENINGS = tuple(text for texts in world.OPENINGS.values() for text in texts)
PAIRS = {"straight": (0, 2), "shifted": (1,)}  # of the two answers, how many get it
LOSSES = {
    "tbpo_a, sba λ 0": "name = 'tbpo_a'",
    "tbpo_q, sba λ 0": "name = 'tbpo_q'",
    "tdpo 1": "name = 'tdpo', version = 1",
    "dpo": "name = 'dpo'",
}
POSITIONS = [(loss, kind) for loss in LOSSES for kind in PAIRS]
FLOORS = [(rate, floor) for rate in (1e-3, 2e-3) for floor in (0.0, 0.6)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".benchmarks/reasons", help="of the runs"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="K/N", help="every N-th run, from the K-th, from 0"
    )
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder)
    if arguments.report:
        report(folder)
        return
    part, parts = map(int, arguments.part.split("/"))
    work = [(question, seed) for question in [*POSITIONS, *FLOORS] for seed in SEEDS]
    for (first, second), seed in work[part::parts]:
        print(first, second, seed, scored(folder, first, second, seed), flush=True)


def scored(folder: Path, first: str | float, second: str | float, seed: int) -> float:
    """The true score of one training; read from the folder if it is there."""
    label = f"{first}-{second}-{seed}".replace(" ", "")
    found = folder / f"{label}.json"
    if not found.exists():
        sets = (
            positions(folder, str(first), str(second), seed)
            if isinstance(first, str)
            else floor(first, second)
        )
        sets += [
            f"sample.prompts={folder}/test.jsonl",
            "sample.models=['policy']",
            "eval.opponents=['reference']",
        ]
        tbpo("sample", folder / label, seed, *sets)
        samples = folder / label / "sample/samples.jsonl"
        lines = [json.loads(line) for line in samples.open(encoding="utf-8")]
        for line in lines:
            bare = line["completion"].removeprefix(EXTRA)
            line["completion"] = bare if bare.startswith(OPENINGS) else line["completion"]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        found.write_text(json.dumps(true_scores(samples, "policy")["true_score"]), encoding="utf-8")
    return json.loads(found.read_text())


def positions(folder: Path, method: str, kind: str, seed: int) -> list[str]:
    rows = [json.loads(line) for line in (QUICKSTART / "train.jsonl").open(encoding="utf-8")]
    rng = Random(seed)
    for row in rows:
        row |= {
            side: EXTRA + row[side]
            for side in rng.sample(("chosen", "rejected"), rng.choice(PAIRS[kind]))
        }
    data = folder / f"{kind}-{seed}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        f"align.loss={{{LOSSES[method]}, beta = 0.5}}",
        f"data.train={data}",
        "align.learning_rate=1e-3",
    ]


def floor(rate: float, min_ratio: float) -> list[str]:
    return [
        f"align.loss={{name = 'tbpo_a', min_ratio = {min_ratio}}}",
        f"align.learning_rate={rate}",
    ]


def report(folder: Path) -> None:
    rows = [
        {
            "question": [first, second],
            "true_scores": [scored(folder, first, second, seed) for seed in SEEDS],
        }
        for first, second in [*POSITIONS, *FLOORS]
    ]
    cells = {
        tuple(row["question"]): f"{fmean(row['true_scores']):.3f} ± {stdev(row['true_scores']):.3f}"
        for row in rows
    }
    means = {tuple(row["question"]): fmean(row["true_scores"]) for row in rows}
    lines = [
        f"True scores, means ± standard deviations of {len(SEEDS)} seeds.",
        "",
        in_common(folder),
        "",
    ]
    lines += ["| loss | straight pairs | shifted pairs | lost |", "|---|---|---|---|"]
    for loss in dict.fromkeys(loss for loss, _ in POSITIONS):
        both = [(loss, kind) for kind in PAIRS]
        lines.append(
            f"| {loss} | {' | '.join(map(cells.get, both))} "
            f"| {means[both[0]] - means[both[1]]:.3f} |"
        )
    lines += ["", "| tbpo_a, learning rate | no floor | min_ratio 0.6 |", "|---|---|---|"]
    for rate in dict.fromkeys(rate for rate, _ in FLOORS):
        lines.append(f"| {rate:g} | {cells[rate, 0.0]} | {cells[rate, 0.6]} |")
    print("\n".join(lines))
    write_results(
        "reasons", "Why a loss does as it does on the quickstart's world", rows, "\n".join(lines)
    )


def in_common(folder: Path) -> str:
    """The share of the aligned length before the first position at which the responses differ."""
    tbpo("prepare", folder / "as-they-are", 0)
    store, shares, same_length = PairStore(folder / "as-they-are/prepare/train"), [], []
    for pair in map(store.__getitem__, range(len(store))):
        length = pair.aligned_length
        differs = np.flatnonzero(
            np.asarray(pair.chosen_ids[:length]) != np.asarray(pair.rejected_ids[:length])
        )
        shares.append((differs[0] if len(differs) else length) / length)
        same_length.append(len(pair.chosen_ids) == len(pair.rejected_ids))
    return (
        f"Of the pairs as they are, the responses share the first {np.mean(shares):.0%} of the "
        "aligned length, and "
        f"{np.mean(same_length):.0%} of the pairs have responses of the same number of tokens."
    )


if __name__ == "__main__":
    main()
