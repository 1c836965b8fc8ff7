"""What a loss that compares position with position loses where the answers are shifted, and how often they agree.

    OMP_NUM_THREADS=1 python tests/benchmarks/reasons.py          # about 10 minutes of one CPU core

On the quickstart's pairs. In half of the pairs, "Okay! " is put before answers: in `straight` pairs before both or
neither, so that position t of one still means position t of the other; in `shifted` pairs before one of the two, a
random one. Either way as many answers have it, chosen and rejected ones alike; the scorer takes it away again. Each
loss is trained at the rate and β that results/methods.json found for it. And of the pairs as they are: how much of the
aligned length the two responses have in common before they part, where log R_t = 0 says nothing. Writes
results/reasons.{json,md}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from statistics import fmean, stdev

import methods
import numpy as np
from common import RESULTS, write_results

from tbpo_cli.data.store import PairStore

LOSSES = ("tbpo_a, sba λ 0", "tbpo_q, sba λ 0", "tdpo 1", "dpo")
EXTRA, SEEDS = "Okay! ", (1, 2, 3)
COUNTS = {"straight": (0, 2), "shifted": (1,)}  # of the two answers, how many get it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=methods.ROOT / ".benchmarks/reasons", help="of the runs")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    methods.write_prompts(folder)
    rows = [
        {"loss": loss, "pairs": kind, "seed": seed} | measured(folder, loss, kind, seed)
        for loss in LOSSES for kind in COUNTS for seed in SEEDS
    ]  # fmt: skip
    table = ["| loss | straight pairs | shifted pairs | lost |", "|---|---|---|---|"]
    for loss in LOSSES:
        scores = [[row["true_score"] for row in rows if (row["loss"], row["pairs"]) == (loss, kind)] for kind in COUNTS]
        means = [f"{fmean(each):.3f} ± {stdev(each):.3f}" for each in scores]
        table.append(f"| {loss} | {' | '.join(means)} | {fmean(scores[0]) - fmean(scores[1]):.3f} |")
    about = f"True scores, means ± standard deviations of {len(SEEDS)} seeds. {in_common(folder)}"
    print("\n".join([about, "", *table]))
    write_results(
        "reasons", "Positions that are shifted, prefixes that are shared", rows, "\n".join([about, "", *table])
    )


def measured(folder: Path, loss: str, kind: str, seed: int) -> dict[str, float]:
    """A training on pairs of a kind, and the true score of its answers to the test prompts."""
    rows = [json.loads(line) for line in (methods.QUICKSTART / "train.jsonl").open(encoding="utf-8")]
    rng = Random(seed)
    for row in rows:
        sides = rng.sample(("chosen", "rejected"), rng.choice(COUNTS[kind]))
        row |= {side: EXTRA + row[side] for side in sides}
    data = folder / f"{kind}-{seed}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    known = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))["rows"]
    best = next(row for row in known if (row["method"], row["split"]) == (loss, "test"))
    fields = methods.METHODS[loss] | {"beta": str(0.1 * best["multiple"])}
    sets = [f"align.loss={{{', '.join(f'{key} = {value}' for key, value in fields.items())}}}", f"data.train={data}"]
    sets += [f"align.learning_rate={best['rate']}", f"sample.prompts={folder}/test.jsonl", "sample.models=['policy']"]
    directory = folder / f"{loss}-{kind}-{seed}".replace(" ", "")
    methods.tbpo("sample", directory, seed, *sets)
    samples = directory / "sample/samples.jsonl"
    lines = [json.loads(line) for line in samples.open(encoding="utf-8")]
    for line in lines:
        bare = line["completion"].removeprefix(EXTRA)
        line["completion"] = (
            bare if bare.startswith(tuple(sum(methods.world.OPENINGS.values(), ()))) else line["completion"]
        )
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return methods.true_scores(samples, "policy")


def in_common(folder: Path) -> str:
    """How much of the aligned length lies before the first position at which the two responses differ."""
    methods.tbpo("prepare", folder / "as-they-are", 0)
    store, shares, same_length = PairStore(folder / "as-they-are/prepare/train"), [], []
    for pair in map(store.__getitem__, range(len(store))):
        length = pair.aligned_length
        differs = np.flatnonzero(np.asarray(pair.chosen_ids[:length]) != np.asarray(pair.rejected_ids[:length]))
        shares.append((differs[0] if len(differs) else length) / length)
        same_length.append(len(pair.chosen_ids) == len(pair.rejected_ids))
    return (
        f"Of the pairs as they are, the responses share the first {np.mean(shares):.0%} of the aligned length, and "
        f"{np.mean(same_length):.0%} have the same number of tokens."
    )


if __name__ == "__main__":
    main()
