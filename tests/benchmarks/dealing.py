"""How evenly a step's pairs are divided among processes, on lengths like those of UltraFeedback.

    python tests/benchmarks/dealing.py             # a few seconds

A step takes as long as the process with the most tokens: the efficiency of a division is the mean
of the processes' tokens over the largest. The lengths are drawn, independent and log-normal, as in
the other benchmarks; pairs of more than 2,048 tokens are left out.
Writes results/dealing.{json,md}.
"""

from __future__ import annotations

import numpy as np
from common import LENGTHS, write_results

from tbpo_cli.batch.batches import deal

SPANS = ("response", "aligned")
SETTINGS = ((32, 8), (32, 4), (128, 32), (128, 16))  # pairs of a step, processes
NUM_STEPS = 500
MAX_LENGTH = 2048


def draw_lengths(num_pairs: int, random: np.random.Generator) -> np.ndarray:
    """(n, 3) tokens of prompt, chosen and rejected."""
    columns = [
        random.lognormal(np.log(mean) - spread**2 / 2, spread, 2 * num_pairs)
        for mean, spread in LENGTHS.values()
    ]
    lengths = np.maximum(1, np.stack(columns, axis=1)).astype(int)
    fit = lengths[:, 0] + lengths[:, 1:].max(axis=1) <= MAX_LENGTH
    return lengths[fit][:num_pairs]


def efficiency(costs: np.ndarray, parts: list[list[int]]) -> float:
    loads = [costs[part].sum() for part in parts]
    return float(np.mean(loads) / np.max(loads))


def main() -> None:
    random = np.random.default_rng(0)
    rows = []
    for span in SPANS:
        for num_pairs, processes in SETTINGS:
            found: dict[str, list[float]] = {"in turn": [], "by length": []}
            for _ in range(NUM_STEPS):
                lengths = draw_lengths(num_pairs, random)
                if span == "aligned":
                    lengths[:, 1:] = lengths[:, 1:].min(axis=1, keepdims=True)
                costs = lengths.sum(axis=1)
                in_turn = [[*range(rank, num_pairs, processes)] for rank in range(processes)]
                found["in turn"].append(efficiency(costs, in_turn))
                found["by length"].append(efficiency(costs, deal(costs, processes)))
            means = {name: float(np.mean(values)) for name, values in found.items()}
            gain = means["by length"] / means["in turn"]
            about = {"span": span, "pairs": num_pairs, "processes": processes}
            rows.append({**about, **means, "gain": gain})
    table = [
        "| tokens that the loss reads | pairs | processes | in turn | by length | gain |",
        "|---|---|---|---|---|---|",
    ]
    table += [
        f"| {row['span']} | {row['pairs']} | {row['processes']} | {row['in turn']:.0%} "
        f"| {row['by length']:.0%} | {row['gain']:.2f} × |"
        for row in rows
    ]
    title = f"Dividing a step's pairs among processes, mean of {NUM_STEPS} steps"
    write_results("dealing", title, rows, "\n".join(table))


if __name__ == "__main__":
    main()
