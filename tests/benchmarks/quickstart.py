"""What each loss reaches on the quickstart: the true score of sampled answers, over seeds.

    python tests/benchmarks/quickstart.py            # about 25 minutes on two CPU cores

Every run is the real command, `tbpo align recipes/quickstart.toml --set …`; then one answer to each
of the held-out prompts is sampled at temperature 1 and scored by the world. Writes
results/quickstart.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from common import write_results
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tbpo_cli.config.recipe import Sample

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "recipes/quickstart"
SETTINGS = {
    "tbpo_a, β 0.1": ["align.loss.name=tbpo_a"],
    "tbpo_q, β 0.1": ["align.loss.name=tbpo_q"],
    "tbpo_a, β 0.1, min_ratio 0.6, lr 5e-4": [
        "align.loss.min_ratio=0.6",
        "align.learning_rate=5e-4",
    ],
    "dpo, β 0.1": ["align.loss={name = 'dpo', beta = 0.1}"],
    "dpo, β 0.5": ["align.loss={name = 'dpo', beta = 0.5}"],
}
sys.path.insert(0, str(QUICKSTART))
import world  # noqa: E402
from rebuild import complete  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument(
        "--set", nargs="*", default=[], help="further recipe keys, for all settings"
    )
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    rows = [{"setting": "the base", **true_scores(None, seed)} for seed in range(arguments.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        for setting in arguments.settings:
            for seed in range(arguments.seeds):
                run = Path(folder) / f"{setting}-{seed}"
                sets = [*SETTINGS[setting], f"run.seed={seed}", *arguments.set]
                started = time.monotonic()
                align(run, sets)
                seconds = time.monotonic() - started
                after = json.loads((run / "align/metrics.jsonl").read_text().splitlines()[-1])
                held_out = {name: after[name] for name in ("accuracy", "kl", "entropy")}
                scores = true_scores(run / "align/adapter", seed)
                rows.append({"setting": setting, **scores, **held_out, "seconds": seconds})
                print(
                    {
                        key: value if isinstance(value, str) else round(value, 3)
                        for key, value in rows[-1].items()
                    }
                )
    table = markdown(rows)
    print(table)
    if not arguments.no_write:
        about = (
            f"Means ± standard deviations, {arguments.seeds} seeds; "
            "an answer to each held-out prompt, temperature 1."
        )
        write_results("quickstart", "Quickstart: true score by loss", rows, f"{about}\n\n{table}")


def align(run: Path, sets: list[str]) -> None:
    flags = [part for one in sets for part in ("--set", one)]
    command = [
        sys.executable,
        "-m",
        "tbpo_cli.cli.main",
        "align",
        str(ROOT / "recipes/quickstart.toml"),
        "--quiet",
    ]
    subprocess.run([*command, "--run-dir", str(run), *flags], check=True, stdout=subprocess.DEVNULL)


def true_scores(adapter: Path | None, seed: int) -> dict[str, float]:
    """Mean true score, share of right and of rude answers, of one answer a held-out prompt."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype="float32")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    prompts = [
        json.loads(line)["prompt"] for line in (QUICKSTART / "eval.jsonl").open(encoding="utf-8")
    ]
    answers = complete(
        model,
        tokenizer,
        prompts,
        Sample(temperature=1.0, top_p=1.0, max_new_tokens=48, batch_size=200),
        seed,
    )
    readings = [
        world.parse_response(prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return {
        "score": mean(reading.score for reading in readings),
        "right": mean(reading.correct for reading in readings),
        "rude": mean(reading.rude > 0 for reading in readings),
    }


COLUMNS = {
    "score": "true score",
    "right": "right",
    "rude": "rude",
    "accuracy": "reward accuracy",
    "kl": "KL (nats a token)",
    "entropy": "entropy (nats a token)",
    "seconds": "seconds",
}


def markdown(rows: list[dict]) -> str:
    """A table with the mean and the standard deviation over the seeds."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", f"|---|{'---|' * len(COLUMNS)}"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = []
        for name in COLUMNS:
            values = [row[name] for row in rows if row["setting"] == setting and name in row]
            spread = (
                f" ± {stdev(values):.2f}"
                if len(values) > 1 and name in {"score", "right", "rude"}
                else ""
            )
            cells.append(
                f"{mean(values):.{0 if name == 'seconds' else 2}f}{spread}" if values else ""
            )
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
