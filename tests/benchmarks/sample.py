"""`tbpo sample`'s batches against transformers' own `generate` on the quickstart: tokens a second.

    python tests/benchmarks/sample.py            # about 3 minutes on two CPU cores

Both complete the same held-out prompts at temperature 0.7, top_p 0.9, at most 64 tokens. `generate`
takes them as they come, `tbpo` in the order of their lengths, as its stage does; both stop a batch
when all of its rows have ended. The two take turns, three times; a row is the median. Writes
results/sample.{json,md}.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import torch
from common import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from tbpo_cli.config.recipe import Sample
from tbpo_cli.model.generate import generate

QUICKSTART = Path(__file__).parent.parent.parent / "recipes/quickstart"
BATCH_SIZES, REPEATS = (8, 32, 128), 3
SETTINGS = Sample(temperature=0.7, top_p=0.9, max_new_tokens=64)


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype="float32").eval()
    rows = [json.loads(line) for line in (QUICKSTART / "eval.jsonl").open(encoding="utf-8")]
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    found = []
    for size in BATCH_SIZES:
        ways = {"generate": lambda size=size: theirs(model, tokenizer, prompts, size),
                "tbpo": lambda size=size: ours(model, tokenizer, prompts, size)}  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, way in ways.items():
                started = time.perf_counter()
                tokens = way()
                rates[name].append(tokens / (time.perf_counter() - started))
        found.append(
            {"batch size": size, **{name: median(values) for name, values in rates.items()}}
        )
        print(found[-1], flush=True)
    best = max(row["tbpo"] for row in found) / max(row["generate"] for row in found)
    lines = [
        "| completions at a time | generate, tokens/s | tbpo, tokens/s | ratio |",
        "|---|---|---|---|",
    ]
    for row in found:
        ratio = row["tbpo"] / row["generate"]
        lines.append(
            f"| {row['batch size']} | {row['generate']:,.0f} | {row['tbpo']:,.0f} | {ratio:.2f} |"
        )
    about = f"{len(prompts)} prompts. Best batch size against best batch size: {best:.2f}."
    write_results(
        "sample", "Sampling against transformers' generate", found, "\n".join([about, "", *lines])
    )
    print(about)


def theirs(model, tokenizer, prompts: list[list[int]], size: int) -> int:
    tokens = 0
    torch.manual_seed(0)
    for start in range(0, len(prompts), size):
        batch = tokenizer.pad({"input_ids": prompts[start : start + size]}, return_tensors="pt")
        generated = model.generate(
            **batch,
            do_sample=True,
            temperature=SETTINGS.temperature,
            top_p=SETTINGS.top_p,
            top_k=0,
            max_new_tokens=SETTINGS.max_new_tokens,
        )[:, batch["input_ids"].shape[1] :]
        ends = (generated == tokenizer.eos_token_id).int()
        tokens += int((ends.cumsum(dim=1) - ends < 1).sum())  # up to the first end of turn, with it
    return tokens


def ours(model, tokenizer, prompts: list[list[int]], size: int) -> int:
    ordered = sorted(prompts, key=len)
    batches = (ordered[start : start + size] for start in range(0, len(ordered), size))
    completions = (
        generate(model, batch, range(len(batch)), SETTINGS, [tokenizer.eos_token_id])
        for batch in batches
    )
    return sum(len(completion.token_ids) for batch in completions for completion in batch)


if __name__ == "__main__":
    main()
