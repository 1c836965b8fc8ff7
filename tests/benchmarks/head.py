"""Peak memory and time of token statistics + loss + backward, chunked against dense logits.

    python tests/benchmarks/head.py                # about 15 minutes and 20 GB on two CPU cores

N = 4,096 response tokens of 8 pairs, H = 1,024, V = 32,000 and 128,256, fp32, frozen output head
(LoRA). Every measurement is a process of its own; the two ways alternate, and the ratio of each
pair of runs is reported. Memory is the growth of the resident set over weights, hidden states and a
warm-up. Writes results/head.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from common import write_results

from tbpo_cli.core import PairScores, SideScores, StateBaseline, build_loss
from tbpo_cli.core.head import Head, token_statistics
from tbpo_cli.core.losses import Loss

PAIRS, LENGTH, HIDDEN = 8, 256, 1024
VOCABULARIES = (32_000, 128_256)
LOSSES = {
    "tbpo_a": {},
    "tdpo (1)": {"version": 1},
    "tbpo_q": {},
    "dpo": {},
    "tdpo (2)": {"version": 2},
    "simpo": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--one", nargs=3, metavar=("WAY", "LOSS", "V"), help="one measurement, as JSON"
    )
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.one:
        way, name, vocabulary = arguments.one
        print(json.dumps(measure(way, name, int(vocabulary))))
        return
    rows = []
    for vocabulary in VOCABULARIES:
        for name in LOSSES:
            runs = [
                [child(way, name, vocabulary) for way in ("chunked", "dense")]
                for _ in range(arguments.repeats)
            ]
            rows.append({"loss": name, "V": vocabulary, "runs": runs})
            print(line(rows[-1]), flush=True)
    heading = (
        "| loss | V | dense s | chunked s | ratio | dense GB | chunked GB | ratio |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    about = (
        f"N = {2 * PAIRS * LENGTH:,} response tokens, H = {HIDDEN:,}, fp32, frozen head; medians."
    )
    title = "Token statistics + loss + backward: dense logits against core/head.py"
    write_results("head", title, rows, "\n".join([about, "", heading, *map(line, rows)]))


def child(way: str, name: str, vocabulary: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", way, name, str(vocabulary)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(way: str, name: str, vocabulary: int) -> dict[str, float]:
    """Seconds, peak growth in GB, and the loss (so that both ways can be seen to agree)."""
    loss = build_loss(name.split()[0], **LOSSES[name])
    baseline = StateBaseline(HIDDEN)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, HIDDEN, generator=generator) / HIDDEN**0.5
    reference = torch.randn(2 * PAIRS * LENGTH, HIDDEN, generator=generator)
    policy = (reference + 0.1 * torch.randn(reference.shape, generator=generator)).requires_grad_()
    tokens = torch.randint(vocabulary, (2 * PAIRS * LENGTH,), generator=generator)
    statistics = {"chunked": chunked, "dense": dense}[way]
    step(
        statistics, loss, baseline, Head(weight), policy[:64], reference[:64], tokens[:64], pairs=1
    )
    policy.grad = None
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak mark starts again from here
    started = time.perf_counter()
    value = step(statistics, loss, baseline, Head(weight), policy, reference, tokens, pairs=PAIRS)
    return {
        "seconds": time.perf_counter() - started,
        "gb": resident("VmHWM") - before,
        "loss": value,
    }


def step(
    statistics,
    loss: Loss,
    baseline: StateBaseline,
    head: Head,
    policy,
    reference,
    tokens,
    pairs: int,
) -> float:
    columns = statistics(loss.needs - {"state_baseline"}, tokens, policy, head, reference)
    if "state_baseline" in loss.needs:
        columns["state_baseline"] = baseline(policy)
    shaped = {name: values.reshape(2, pairs, -1) for name, values in columns.items()}
    mask = torch.ones(shaped[next(iter(shaped))].shape[1:], dtype=torch.bool)
    sides = [
        SideScores(mask, **{name: values[side] for name, values in shaped.items()})
        for side in (0, 1)
    ]
    value = loss(PairScores(*sides)).per_pair.mean()
    value.backward()
    return value.item()


def chunked(needs, tokens, policy, head, reference) -> dict[str, torch.Tensor]:
    computed = token_statistics(needs, tokens, policy, head, reference, head)
    return {name: getattr(computed, name) for name in needs}


def dense(needs, tokens, policy, head, reference) -> dict[str, torch.Tensor]:
    """The usual way: both models' logits at once, and no more of them than the loss needs."""
    log_policy = (policy @ head.weight.T).log_softmax(-1)
    columns = {"logps": log_policy.gather(-1, tokens[:, None]).squeeze(-1)}
    if needs == {"logps"}:
        return columns
    with torch.no_grad():
        log_reference = (reference @ head.weight.T).log_softmax(-1)
        reference_logps = log_reference.gather(-1, tokens[:, None]).squeeze(-1)
    columns["log_ratio"] = columns.pop("logps") - reference_logps
    if needs & {"kl", "advantage"}:
        columns["kl"] = (log_reference.exp() * (log_reference - log_policy)).sum(-1)
        columns["advantage"] = columns["log_ratio"] + columns["kl"]
    return {name: columns[name] for name in needs}


def resident(mark: str) -> float:
    """GB, from the kernel's account of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{mark}:")[1].split()[0]) * 1024 / 1e9


def line(row: dict) -> str:
    pairs = row["runs"]
    assert all(abs(c["loss"] - d["loss"]) < 1e-4 * (1 + abs(d["loss"])) for c, d in pairs), (
        "the two ways disagree"
    )
    figures = [
        median(run[side][name] for run in pairs) for side in (1, 0) for name in ("seconds", "gb")
    ]
    time_ratio = median(chunk["seconds"] / full["seconds"] for chunk, full in pairs)
    gb_ratio = median(chunk["gb"] / full["gb"] for chunk, full in pairs)
    cells = [f"{figures[0]:.1f}", f"{figures[2]:.1f}", f"{time_ratio:.2f}"]
    cells += [f"{figures[1]:.2f}", f"{figures[3]:.2f}", f"1/{1 / gb_ratio:.0f}"]
    return f"| {row['loss']} | {row['V']:,} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
