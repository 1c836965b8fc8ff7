"""How evenly the pairs of a step are divided among processes: by turns, and longest first.

    python tests/benchmarks/deal.py      seconds

A step takes as long as its busiest process, so its efficiency is the mean share of the tokens over
the largest. The lengths are assumed, not measured: log-normal, with a median of 900 tokens and
σ = 0.5 (two thirds between 550 and 1,480), cut at 4,096.
"""

import numpy as np
from common import RESULTS

from tbpo_cli.batch.batches import deal

MEDIAN, SPREAD, LONGEST = 900, 0.5, 4096
SETTINGS = ((32, 8), (64, 8), (128, 32), (256, 8))
NUM_STEPS = 2000


def efficiency(lengths, hands):
    totals = [lengths[hand].sum() for hand in hands]
    return np.mean(totals) / max(totals)


def main():
    generator = np.random.default_rng(0)
    lines = []
    for num_pairs, num_processes in SETTINGS:
        found = []
        for _ in range(NUM_STEPS):
            draws = generator.lognormal(np.log(MEDIAN), SPREAD, num_pairs)
            lengths = np.minimum(draws, LONGEST).astype(int)
            turns = [list(range(rank, num_pairs, num_processes)) for rank in range(num_processes)]
            dealt = deal(lengths, num_processes)
            found.append((efficiency(lengths, turns), efficiency(lengths, dealt)))
        by_turns, longest_first = np.mean(found, axis=0)
        gain = longest_first / by_turns
        lines.append(
            f"| {num_pairs} | {num_processes} | {by_turns:.0%} | {longest_first:.0%} | {gain:.2f} |"
        )
    head = "| pairs a step | processes | by turns | longest first | gain |"
    text = "\n".join([head, "| --- | --- | --- | --- | --- |", *lines, ""])
    (RESULTS / "deal.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
