"""`tbpo sample`'s batches against transformers' own `generate` on the quickstart: tokens a second.

    python tests/benchmarks/sample.py            # about 3 minutes on two CPU cores
    python tests/benchmarks/sample.py --shape llama-3.2-1b --name sample_gpu     # on a GPU

Both complete the same held-out prompts at temperature 0.7, top_p 0.9, at most 64 tokens. `generate`
takes them as they come, `tbpo` in the order of their lengths, as its stage does; both stop a batch
when all of its rows have ended. The two take turns, three times; a row is the median. With a shape
of train_step.py, the model has random weights (bf16 on a GPU) and reads random prompts of 20 to 200
tokens. The results/sample.{json,md} are written anew after each batch size.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median

import torch
from common import write_results
from train_step import DEVICE, ON_GPU, SHAPES
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tbpo_cli.config.recipe import Sample
from tbpo_cli.model.generate import generate

QUICKSTART = Path(__file__).parent.parent.parent / "recipes/quickstart"
BATCH_SIZES, REPEATS = (8, 32, 128), 3
SETTINGS = Sample(temperature=0.7, top_p=0.9, max_new_tokens=64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), help="in place of the quickstart")
    parser.add_argument("--sizes", nargs="*", type=int, default=BATCH_SIZES)
    parser.add_argument("--name", default="sample", help="of the files under results/")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART, padding_side="left")
    model, prompts = the_model(arguments.shape), the_prompts(arguments.shape, tokenizer)
    found = []
    for size in arguments.sizes:
        ways = {"generate": lambda size=size: theirs(model, tokenizer, prompts, size),
                "tbpo": lambda size=size: ours(model, tokenizer, prompts, size)}  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in ways}
        found.append({})
        for _ in range(REPEATS):  # a part that is ended leaves the table of what is measured
            for name, way in ways.items():
                started = time.perf_counter()
                tokens = way()
                rates[name].append(tokens / (time.perf_counter() - started))
            middle = {name: median(values) for name, values in rates.items()}
            found[-1] = {"batch size": size, "repeats": len(rates["tbpo"]), **middle}
            title = "Sampling against transformers' generate"
            table = table_of(found, len(prompts), arguments.shape)
            write_results(arguments.name, title, found, table)
        print(found[-1], flush=True)


def the_model(shape: str | None):
    if shape is None:
        return AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype="float32").eval().to(DEVICE)
    hidden, inner, layers, heads, kv_heads, vocab_size, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab_size,
        tie_word_embeddings=tied, max_position_embeddings=4096,
        dtype=torch.bfloat16 if ON_GPU else torch.float32,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config).eval()
    assert isinstance(model, LlamaForCausalLM)
    return model


def the_prompts(shape: str | None, tokenizer) -> list[list[int]]:
    if shape is not None:
        rng = random.Random(0)
        return [[rng.randrange(10, 30_000)] * rng.randint(20, 200) for _ in range(128)]
    rows = [json.loads(line) for line in (QUICKSTART / "eval.jsonl").open(encoding="utf-8")]
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


def table_of(found: list[dict], num_prompts: int, shape: str | None) -> str:
    best = max(row["tbpo"] for row in found) / max(row["generate"] for row in found)
    about = f"{shape or 'The quickstart'}, {num_prompts} prompts, on {DEVICE}."
    about += f" Best batch size against best batch size: {best:.2f}."
    lines = [
        "| completions at a time | generate, tokens/s | tbpo, tokens/s | ratio |",
        "|---|---|---|---|",
    ]
    for row in found:
        ratio = row["tbpo"] / row["generate"]
        lines.append(
            f"| {row['batch size']} | {row['generate']:,.0f} | {row['tbpo']:,.0f} | {ratio:.2f} |"
        )
    return "\n".join([about, "", *lines])


def theirs(model, tokenizer, prompts: list[list[int]], size: int) -> int:
    tokens = 0
    torch.manual_seed(0)
    for start in range(0, len(prompts), size):
        batch = tokenizer.pad({"input_ids": prompts[start : start + size]}, return_tensors="pt").to(
            DEVICE
        )
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
