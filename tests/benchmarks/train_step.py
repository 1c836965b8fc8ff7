"""Optimizer steps on UltraFeedback-like pairs: this project, dense research code, TRL's trainer.

    pip install trl && python tests/benchmarks/train_step.py    # 40 minutes on two CPU cores
    python tests/benchmarks/train_step.py --shapes llama-3.2-1b --trained adapter all  # on a GPU

Every measurement is a process of its own; the ways take turns. All read the same pairs, in the same
steps, with the same weights and the same LoRA (r 16, all linear layers), or all weights trained in
fp32 with products in bf16 (on a GPU). Memory is the peak of the
process (on a GPU, of the device's allocator). The roofline is the time that the floating-point
operations of this project's step take as bare matrix products of the same shapes in the same
process; the matrix rate is that of one large product. The dense way takes as many pairs at once as
memory allows. The results/train_step.{json,md} are written anew after each measurement.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from common import about_lengths, make_store, why_failed, write_results
from roofline import matrix_rate, roofline

from tbpo_cli.batch.batches import step_indices
from tbpo_cli.batch.layouts import collate
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.core import PairScores, SideScores, StateBaseline, build_loss
from tbpo_cli.data.store import PairStore
from tbpo_cli.model.load import load_policy

PAIRS, LENGTH_ON_CPU, LENGTH_ON_GPU, RANK, WARM_UP = 4, 1024, 2048, 16, 1
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "cpu-32k": (384, 1024, 6, 6, 6, 32_000, True),
    "cpu-128k": (384, 1024, 6, 6, 6, 128_256, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128_256, False),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32_768, False),
    "tiny": (64, 128, 2, 4, 2, 32_000, True),  # to try this script
}
TRAINED = ("adapter", "all")
LOSSES = ("tbpo_a", "tbpo_q", "dpo")
WAYS = {  # and the losses that they have
    "tbpo": LOSSES,
    "tbpo-cached": ("tbpo_q", "dpo"),  # from the second epoch on, when log π_ref is known
    "dense": LOSSES,
    "trl": ("dpo",),
    "trl-defaults": ("dpo",),  # with its own activation checkpointing
}
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--one",
        nargs=5,
        metavar=("WAY", "LOSS", "SHAPE", "TRAINED", "STEPS"),
        help="one measurement, as JSON",
    )
    parser.add_argument(
        "--shapes", nargs="*", default=["cpu-32k", "cpu-128k"], choices=list(SHAPES)
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--trained", nargs="*", default=["adapter"], choices=TRAINED)
    parser.add_argument("--name", default="train_step", help="of the files under results/")
    arguments = parser.parse_args()
    if arguments.one:
        *what, steps = arguments.one
        print(json.dumps(measure(*what, int(steps))))
        return
    of_trl = [way for way in arguments.ways if way.startswith("trl")]
    is_trl_missing = bool(of_trl) and importlib.util.find_spec("trl") is None
    if is_trl_missing:
        print("trl is missing: its rows are left out (pip install trl)")
        arguments.ways = [way for way in arguments.ways if way not in of_trl]
    rows = []
    cases = itertools.product(arguments.shapes, arguments.trained, arguments.losses, arguments.ways)
    title = "A training step: this project, the dense way, and TRL"
    about = about_lengths(the_store(arguments.steps))
    for shape, trained, loss, way in cases:
        if loss not in WAYS[way]:
            continue
        case = {"shape": shape, "trained": trained, "loss": loss, "way": way}
        rows.append({**case, **child(way, loss, shape, trained, arguments.steps)})
        print(json.dumps(rows[-1]), flush=True)
        write_results(arguments.name, title, rows, f"{about}\n\n{markdown(rows)}")
    print(markdown(rows))
    if is_trl_missing and ON_GPU:
        sys.exit("trl is missing, and this table is a comparison with it (pip install trl)")


def child(way: str, loss: str, shape: str, trained: str, steps: int) -> dict:
    command = [sys.executable, __file__, "--one", way, loss, shape, trained, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": why_failed(done)}
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------ what all ways share


def the_store(steps: int) -> PairStore:
    length = LENGTH_ON_GPU if ON_GPU else LENGTH_ON_CPU
    return make_store(
        Path(tempfile.mkdtemp()), PAIRS * (steps + WARM_UP), length, vocab_size=32_000
    )


def the_recipe(
    shape: str, loss: str, steps: int, folder: Path, pairs: int = PAIRS, trained: str = "adapter"
):
    hidden, inner, layers, heads, kv_heads, vocab_size, tied = SHAPES[shape]
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab_size, "tie_word_embeddings": tied,
        "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text(json.dumps(config))
    recipe = folder / "recipe.toml"
    lora = f"[model.lora]\nr = {RANK}\nalpha = {2.0 * RANK}\ndropout = 0.0\n"
    recipe.write_text(
        f'[model]\nbase = "{folder / "base"}"\ninitial_weights = "random"\n'
        f"{lora if trained == 'adapter' else ''}"
        f'[data]\ntrain = "unused"\n'
        f"[align]\nbatch_pairs = {pairs}\nmax_steps = {steps + WARM_UP}\n"
        "learning_rate = 1e-5\nwarmup = 0.0\n"
        f'schedule = "constant"\nlog_every = 1000000\ncheckpoint_every = 1000000\n'
        f'[align.loss]\nname = "{loss}"\n'
    )
    return load_recipe(recipe)


def measure(way: str, loss: str, shape: str, trained: str, steps: int) -> dict:
    """Seconds a step, pairs/s, tokens/s, peak GB, and the losses, to compare the ways."""
    store = the_store(steps)
    with tempfile.TemporaryDirectory() as folder:
        recipe = the_recipe(shape, loss, steps, Path(folder), trained=trained)
        run = {"tbpo": tbpo, "dense": dense, "trl": trl}[way.partition("-")[0]]
        found = run(way, recipe, store, Path(folder))
    seconds, losses = found["seconds"][WARM_UP:], found["losses"]
    first = WARM_UP + (steps + WARM_UP if way == "tbpo-cached" else 0)
    indices = [step_indices(len(store), PAIRS, 0, step) for step in range(first, first + steps)]
    tokens = sum(
        int(lengths[index].sum()) for index in indices
        for lengths in (store.prompt_lengths, store.chosen_lengths, store.rejected_lengths)
    )  # fmt: skip
    result = {
        "seconds": seconds,
        "pairs_per_s": PAIRS * steps / sum(seconds),
        "tokens_per_s": tokens / sum(seconds),
        "peak_gb": peak_gb(),
        "losses": losses,
    }
    if way == "tbpo" and trained == "adapter":
        bare = [
            roofline(SHAPES[shape], RANK, loss, [store[i] for i in index], DEVICE)
            for index in indices
        ]
        result["roofline"] = sum(needed for needed, _ in bare) / sum(seconds)
        result["of_matrix_rate"] = (
            sum(operations for _, operations in bare) / sum(seconds) / matrix_rate(DEVICE)
        )
    return result


def the_policy(recipe):
    """With random weights, which are drawn on the device: a CPU takes minutes for 8B of them."""
    with torch.device(DEVICE):
        return load_policy(recipe, DEVICE, None, with_reference=True)


def peak_gb() -> float:
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ----------------------------------------------------------------------------------- the three ways


def tbpo(way: str, recipe, store: PairStore, folder: Path) -> dict:
    """The product's own loop, as `tbpo align` runs it: its first epoch, or the one after it."""
    from tbpo_cli.train.group import Group
    from tbpo_cli.train.loop import train
    from tbpo_cli.train.run import TrainingRun

    policy = the_policy(recipe)
    nothing = make_store(folder / "nothing", 0, 1, 3)
    run = folder / "align"
    run.mkdir()
    steps, settings, reference = recipe.align.max_steps, recipe.align, None
    if way == "tbpo-cached":
        settings, reference = replace(settings, max_steps=2 * steps), folder / "reference.f32"
    loss = recipe.align.loss
    group = Group(device=DEVICE)
    log = train(TrainingRun(policy, loss, settings, store, nothing, run, 0, reference, group))
    return {
        name: [line[key] for line in log.lines[-steps:]]
        for name, key in (("seconds",) * 2, ("losses", "loss"))
    }


def dense(way: str, recipe, store: PairStore, folder: Path) -> dict:
    """Padded rows of chosen and rejected; full fp32 logits of policy and reference, by autograd."""
    loss = build_loss(recipe.align.loss_name)
    policy = the_policy(recipe)
    baseline = StateBaseline(policy.model.config.hidden_size, 0).to(DEVICE)
    optimizers = [torch.optim.AdamW(policy.trained.values(), lr=1e-5, weight_decay=0.0)]
    if "state_baseline" in loss.needs:
        optimizers.append(torch.optim.AdamW(baseline.parameters(), lr=1e-3, weight_decay=0.0))
    policy.model.train()
    at_once = pairs_at_once(policy.model.config.vocab_size)
    seconds, losses = [], []
    for step in range(recipe.align.max_steps):
        started = time.perf_counter()
        pairs = [store[i] for i in step_indices(len(store), PAIRS, 0, step)]
        total = 0.0
        for start in range(0, PAIRS, at_once):
            value = (
                loss(
                    dense_scores(policy, baseline, loss, pairs[start : start + at_once])
                ).per_pair.sum()
                / PAIRS
            )
            value.backward()
            total += value.item()
        torch.nn.utils.clip_grad_norm_(policy.trained.values(), 10.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        losses.append(total)
    return {"seconds": seconds, "losses": losses}


def pairs_at_once(vocab_size: int) -> int:
    """All pairs of a step, or as many as fit: dense logits take about 14 (rows × length × V)."""
    if ON_GPU:
        room = torch.cuda.get_device_properties(0).total_memory
    else:
        room = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    return max(1, min(PAIRS, int(0.85 * room / (14 * 2 * 850 * vocab_size * 4))))


def dense_scores(policy, baseline, loss, pairs) -> PairScores:
    batch = collate(pairs, "padded").to(DEVICE)
    rows = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    with_baseline = "state_baseline" in loss.needs
    output = policy.model(**rows, output_hidden_states=with_baseline)
    log_policy = output.logits.float().log_softmax(-1)
    with policy.view("reference") as reference:
        log_reference = reference(**rows).logits.float().log_softmax(-1)
    index = batch.predictor
    labels = torch.zeros(log_policy.shape[:2].numel(), dtype=torch.int64, device=DEVICE)
    labels[index] = batch.tokens
    logps, reference_logps = (
        log.gather(-1, labels.view(*log.shape[:2], 1)).flatten()[index]
        for log in (log_policy, log_reference)
    )
    columns = {"log_ratio": logps - reference_logps}
    if loss.needs & {"kl", "advantage"}:
        columns["kl"] = (
            (log_reference.exp() * (log_reference - log_policy)).sum(-1).flatten()[index]
        )
        columns["advantage"] = columns["log_ratio"] + columns["kl"]
    if with_baseline:
        columns["state_baseline"] = baseline(output.hidden_states[-1].flatten(0, 1)[index])
    sides, start = [], 0
    for side in (batch.chosen, batch.rejected):
        part = slice(start, start := start + len(side.slots))
        shaped = {
            name: values.new_zeros(side.mask.numel())
            .scatter(0, side.slots, values[part])
            .view_as(side.mask)
            for name, values in columns.items()
            if name in loss.needs
        }
        sides.append(SideScores(side.mask, **shaped))
    return PairScores(*sides)


def trl(way: str, recipe, store: PairStore, folder: Path) -> dict:
    """TRL's DPOTrainer, with the others' settings or its own activation checkpointing."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl import DPOConfig, DPOTrainer

    logging.disable(logging.WARNING)
    config = AutoConfig.from_pretrained(recipe.model.base)
    torch.manual_seed(recipe.run.seed)
    adapted = recipe.model.lora is not None
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if ON_GPU and adapted else torch.float32
        )
    words = {f"w{i}": i for i in range(3, 32_000)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", pad_token="<pad>")

    def text(ids) -> str:
        return "".join("</s>" if i == 2 else f"w{i} " for i in ids)

    steps = recipe.align.max_steps
    order = [i for step in range(steps) for i in step_indices(len(store), PAIRS, 0, step)]
    pairs = [store[i] for i in order]
    rows = Dataset.from_list(
        [
            {
                "prompt": text(p.prompt_ids),
                "chosen": text(p.chosen_ids),
                "rejected": text(p.rejected_ids),
            }
            for p in pairs
        ]
    )
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            if ON_GPU:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    settings = {} if way == "trl-defaults" else {"gradient_checkpointing": False}
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=PAIRS,
        max_steps=steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        beta=0.1,
        max_length=None,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        bf16=ON_GPU,
        use_cpu=not ON_GPU,
        disable_tqdm=True,
        max_grad_norm=10.0,
        weight_decay=0.0,
        **settings,
    )
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = InOrder(
        model,
        ref_model=None if adapted else copy.deepcopy(model),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora if adapted else None,
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": seconds, "losses": losses}


# ---------------------------------------------------------------------------------------- the table


def markdown(rows: list[dict]) -> str:
    lines = [
        "| shape | trained | loss | way | s a step | pairs/s | tokens/s | peak GB "
        "| tbpo is faster by "
        "| and smaller by "
        "| of the roofline | of the matrix rate |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {
        (row["shape"], row["trained"], row["loss"]): row
        for row in rows
        if row["way"] == "tbpo" and "failed" not in row
    }
    for row in rows:
        if "failed" in row:
            lines.append(
                f"| {row['shape']} | {row['trained']} | {row['loss']} | {row['way']} "
                f"| failed: {row['failed']} ||||||||"
            )
            continue
        mine = ours.get((row["shape"], row["trained"], row["loss"]))
        faster = (
            f"{mine['pairs_per_s'] / row['pairs_per_s']:.1f}" if mine and row is not mine else ""
        )
        smaller = f"{row['peak_gb'] / mine['peak_gb']:.1f}" if mine and row is not mine else ""
        fractions = " | ".join(
            f"{row[name]:.2f}" if name in row else "" for name in ("roofline", "of_matrix_rate")
        )
        lines.append(
            f"| {row['shape']} | {row['trained']} | {row['loss']} | {row['way']} "
            f"| {fmean(row['seconds']):.2f} "
            f"| {row['pairs_per_s']:.3f} | {row['tokens_per_s']:,.0f} | {row['peak_gb']:.2f} "
            f"| {faster} | {smaller} | {fractions} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
