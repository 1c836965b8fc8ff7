"""How near the memory that `tbpo show` foretells is to what `tbpo align` takes.

    python tests/benchmarks/memory.py              # about 6 minutes on one CPU core
    python tests/benchmarks/memory.py --gpu --name memory_gpu  # its allocator's peak

Random weights of several sizes (V = 32,000), real rows and the real command, three steps each, one
of which reports all metrics, an evaluation, and a checkpoint after each step. Measured is the peak
of the resident set of the process; on a GPU, that of torch's allocator, which does not count CUDA's
own memory: there the forecast is taken without it. The results/memory.{json,md} are written anew
after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import write_results

from tbpo_cli.cli.forecast import forecast, trainings_of
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.train.metrics import read_metrics

QUICKSTART = Path(__file__).parent.parent.parent / "recipes/quickstart"
SHAPES = {
    "256": (256, 704, 4),
    "512": (512, 1408, 8),
    "768": (768, 2048, 12),
    "2048": (2048, 8192, 16),
    "4096": (4096, 14336, 32),
}  # hidden, intermediate, layers
CASES = [  # shape, loss, with LoRA, tokens at a time, activation checkpointing
    ("256", "tbpo_a", True, 1024, False),
    ("512", "tbpo_a", True, 1024, False),
    ("768", "tbpo_a", True, 1024, False),
    ("512", "tbpo_a", True, 2048, False),
    ("512", "tbpo_a", True, 2048, True),
    ("512", "dpo", True, 2048, False),
    ("512", "dpo", False, 1024, False),
    ("768", "tbpo_a", False, 1024, False),
]
CASES_ON_GPU = [
    ("2048", "tbpo_a", True, 4096, False),
    ("2048", "dpo", True, 8192, False),
    ("2048", "dpo", True, 8192, True),
    ("2048", "dpo", False, 4096, False),
    ("4096", "tbpo_a", True, 4096, False),
    ("4096", "dpo", True, 4096, True),
]
HEADINGS = (
    "| H, layers | loss | trained | tokens | checkpointing | forecast, GB | measured, GB | ratio |"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="memory", help="of the files under results/")
    parser.add_argument("--gpu", action="store_true", help="the sizes of a GPU")
    parser.add_argument("--cases", nargs="*", type=int, help="some of them, by their numbers")
    arguments = parser.parse_args()
    cases = CASES_ON_GPU if arguments.gpu else CASES
    numbers = range(len(cases)) if arguments.cases is None else arguments.cases
    rows, lines = [], [HEADINGS, "|---|---|---|---|---|---|---|---|"]
    for number in numbers:
        row = measure(*cases[number])
        rows.append(row)
        lines.append("| " + " | ".join(str(value) for value in list(row.values())[:8]) + " |")
        print(lines[-1], row["parts"], flush=True)
        write_results(arguments.name, "Memory, forecast and measured", rows, "\n".join(lines))


def measure(shape: str, loss: str, lora: bool, tokens: int, checkpointing: bool) -> dict:
    hidden, inner, layers = SHAPES[shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder / "base", hidden, inner, layers)
        write_rows(folder / "rows.jsonl")
        table = "[model.lora]\nr = 16\n" if lora else ""
        (folder / "recipe.toml").write_text(
            f'[model]\nbase = "{folder / "base"}"\ninitial_weights = "random"\n{table}'
            f'[data]\ntrain = "{folder / "rows.jsonl"}"\nmax_length = 1024\n'
            "[align]\nbatch_pairs = 4\nmax_steps = 3\ncheckpoint_every = 1\n"
            f"log_every = 2\nmax_tokens_per_device = {tokens}\n"
            f"activation_checkpointing = {str(checkpointing).lower()}\n"
            f'[align.loss]\nname = "{loss}"\n'
        )
        for stage in ("prepare", "align"):
            peak = run(stage, folder)
        recipe = load_recipe(folder / "recipe.toml")
        *_, align = trainings_of(recipe)
        memory = forecast(align, recipe, RunDir(folder / "run")).memory
        if torch.cuda.is_available():
            peak = max(
                line.get("peak_memory_gb", 0)
                for line in read_metrics(folder / "run/align/metrics.jsonl")
            )
            memory.pop("CUDA", None)
    expected = sum(memory.values()) / 1e9
    return {
        "shape": f"{hidden}, {layers}",
        "loss": loss,
        "trained": "LoRA r 16" if lora else "all weights",
        "tokens": tokens,
        "checkpointing": "yes" if checkpointing else "no",
        "forecast_gb": round(expected, 2),
        "measured_gb": round(peak, 2),
        "ratio": round(expected / peak, 2),
        "parts": {part: round(size / 1e9, 3) for part, size in memory.items()},
    }


def run(stage: str, folder: Path) -> float:
    """Runs a stage by the real command; returns the peak of its resident set, GB."""
    command = [
        sys.executable,
        "-m",
        "tbpo_cli.cli.main",
        stage,
        str(folder / "recipe.toml"),
        "--run-dir",
        f"{folder}/run",
    ]
    with subprocess.Popen([*command, "--quiet"], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"tbpo {stage} failed")
    return usage.ru_maxrss * 1024 / 1e9


def write_base(folder: Path, hidden: int, inner: int, layers: int) -> None:
    """The quickstart's tokenizer, and the config of a Llama with a larger vocabulary."""
    folder.mkdir()
    for path in (*QUICKSTART.glob("*token*"), QUICKSTART / "chat_template.jinja"):
        shutil.copy(path, folder)
    config = json.loads((QUICKSTART / "config.json").read_text())
    heads = hidden // 64
    config |= {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "head_dim": 64,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_rows(path: Path) -> None:
    """60 pairs of about 100 prompt and 250 response tokens."""
    rng = random.Random(0)
    rows = [json.loads(line) for line in (QUICKSTART / "train.jsonl").open(encoding="utf-8")]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(60):
            texts = {
                key: " ".join(rng.choice(rows)[key] for _ in range(rng.randint(low, 4 * low)))
                for key, low in (("prompt", 4), ("chosen", 12), ("rejected", 12))
            }
            file.write(json.dumps(texts) + "\n")


if __name__ == "__main__":
    main()
