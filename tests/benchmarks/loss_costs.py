"""What a step of each loss costs, as a multiple of dpo's: this project's own steps, side by side.

    python tests/benchmarks/loss_costs.py       # ten minutes on one CPU core

One Llama-shaped model of random weights with LoRA a loss, all on the same UltraFeedback-like pairs.
The losses take turns, step by step; a figure is the median over the rounds of a loss's time over
dpo's in the same round. It is time of the processor, so that other programs do not count. log π_ref
is computed in every step, as in a first epoch. The helpers of tis_dpo and tgdpo are adapters on the
same base. Writes results/loss_costs.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from common import about_lengths, make_store, write_results
from train_step import SHAPES, the_recipe

from tbpo_cli.core.losses import LOSSES
from tbpo_cli.model.load import load_policy
from tbpo_cli.model.policy import POLICY
from tbpo_cli.train.group import Group
from tbpo_cli.train.loop import build_stepper
from tbpo_cli.train.run import TrainingRun
from tbpo_cli.train.step import Stepper

SHAPE, PAIRS, LENGTH, WARM_UP = "cpu-32k", 2, 384, 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    num_steps = arguments.rounds + WARM_UP
    store = make_store(
        Path(tempfile.mkdtemp()), PAIRS * num_steps, LENGTH, vocab_size=SHAPES[SHAPE][5]
    )
    steppers = {name: stepper_of(name, store, num_steps) for name in LOSSES}
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for number in range(num_steps):
        for name, stepper in steppers.items():
            started = time.process_time()
            stepper.step(number)
            seconds[name].append(time.process_time() - started)
            print(f"round {number}: {name} {seconds[name][-1]:.2f} s", flush=True)
    rows = []
    for name, times in seconds.items():
        pairs = list(zip(times, seconds["dpo"], strict=True))[WARM_UP:]
        shares = [own / dpo for own, dpo in pairs]
        row = {"loss": name, "cost": round(median(shares), 2), "lowest": round(min(shares), 2)}
        rows.append({**row, "highest": round(max(shares), 2), "seconds": round(median(times), 2)})
    hidden, _, layers, *_, vocab_size, _ = SHAPES[SHAPE]
    about = f"{layers} layers, hidden size {hidden}, vocabulary {vocab_size:,}; LoRA on the CPU; "
    about += f"steps of {PAIRS} pairs, {arguments.rounds} rounds. {about_lengths(store)}"
    title = "What a step of each loss costs, over dpo's"
    write_results("loss_costs", title, rows, f"{about}\n\n{markdown(rows)}")
    print(json.dumps(rows, indent=1))


def stepper_of(name: str, store, num_steps: int) -> Stepper:
    """A training of one loss, ready for its first step."""
    folder = Path(tempfile.mkdtemp())
    recipe = the_recipe(SHAPE, name, num_steps - WARM_UP, folder, PAIRS)
    group = Group.of_environment()
    loss = LOSSES[name]()
    policy = load_policy(recipe, group.device, None, with_reference=True)
    for helper in loss.helpers:
        policy.model.add_adapter(helper, policy.adapters[POLICY])
        policy.model.set_adapter(POLICY)
    return build_stepper(
        TrainingRun(policy, loss, recipe.align, store, store, folder, seed=0, group=group)
    )


def markdown(rows: list[dict]) -> str:
    lines = ["| loss | over dpo | lowest | highest | seconds a step |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["cost"]):
        figures = (f"{row[key]:.2f}" for key in ("cost", "lowest", "highest", "seconds"))
        lines.append(f"| `{row['loss']}` | {' | '.join(figures)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
