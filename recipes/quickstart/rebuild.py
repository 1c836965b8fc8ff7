"""Makes everything in this folder again from world.py alone: half an hour on two CPU cores.

    python recipes/quickstart/rebuild.py

1. Prompts: 440 to evaluate (400 are kept), 4,000 for pairs, 60,000 for demonstrations, no text
   twice.
2. A byte-level BPE tokenizer, trained on demonstrations and the ordinary English of english.txt.
3. `tbpo sft base.toml` in a temporary folder: a Llama of random weights learns the demonstrations,
   whose quality is mixed, so the base answers right only some of the time.
4. Pairs: two samples of the base at temperature 1 for each prompt, labelled by `world.preference`.
5. 40 further prompts with demonstrations as a baseline's answers, in AlpacaEval's format.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import torch
import world
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tbpo_cli.config.recipe import Sample
from tbpo_cli.model.generate import completions

HERE = Path(__file__).parent
NUM_EVAL, NUM_PAIRS, NUM_DEMONSTRATIONS = 400, 4_000, 60_000
NUM_BASELINE = 40
NUM_SPARE = 40  # further prompts to evaluate, in place of those whose two samples are the same
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    evaluated, compared, demonstrated = split_prompts()
    demonstrations = [
        (prompt.text, world.demonstration(prompt, Random(f"demo {prompt.text}")))
        for prompt in demonstrated
    ]
    tokenizer = train_tokenizer(demonstrations[:20_000])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        base_config(tokenizer).save_pretrained(folder)
        write_jsonl(
            folder / "demonstrations.jsonl",
            ({"prompt": p, "completion": c} for p, c in demonstrations),
        )
        shutil.copy(HERE / "base.toml", folder)
        subprocess.run(
            [sys.executable, "-m", "tbpo_cli.cli.main", "sft", "base.toml", "--run-dir", "run"],
            cwd=folder,
            check=True,
        )
        for made in (folder / "run/sft/model").iterdir():
            shutil.copy(made, HERE)
    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32)
    for file, prompts, count, seed in (
        ("train.jsonl", compared, NUM_PAIRS, 0),
        ("eval.jsonl", evaluated, NUM_EVAL, 1),
    ):
        rows = preference_rows(model, tokenizer, [prompt.text for prompt in prompts], seed)
        write_jsonl(HERE / file, itertools.islice(rows, count))
    taken = {prompt.text for prompts in (evaluated, compared, demonstrated) for prompt in prompts}
    write_baseline(HERE / "baseline.json", taken)


def write_baseline(path: Path, taken: set[str]) -> None:
    """Prompts that are nowhere else, with a baseline's answers, in AlpacaEval's format."""
    rng, rows = Random("baseline"), {}
    while len(rows) < NUM_BASELINE:
        prompt = world.make_prompt(rng)
        if prompt.text not in taken:
            answer = world.demonstration(prompt, rng)
            rows[prompt.text] = {"dataset": "pocket", "instruction": prompt.text}
            rows[prompt.text] |= {"output": answer, "generator": "demonstrations"}
    text = json.dumps([*rows.values()], indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def split_prompts() -> tuple[list[world.Prompt], list[world.Prompt], list[world.Prompt]]:
    """Prompts to evaluate, to compare and to demonstrate."""
    rng, texts, prompts = Random(0), set(), []
    used = NUM_EVAL + NUM_PAIRS + NUM_DEMONSTRATIONS
    while len(prompts) < used + NUM_SPARE:
        prompt = world.make_prompt(rng)
        if prompt.text not in texts:
            texts.add(prompt.text)
            prompts.append(prompt)
    first, second = NUM_EVAL, NUM_EVAL + NUM_PAIRS
    return prompts[:first] + prompts[used:], prompts[first:second], prompts[second:used]


def train_tokenizer(demonstrations: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """1,024 tokens, among them all bytes, so that any text can be tokenized."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    english = (HERE / "english.txt").read_text(encoding="utf-8").splitlines()
    roles = ["user", "assistant", "system"] * 200
    tokenizer.train_from_iterator(
        [*(text for pair in demonstrations for text in pair), *english * 2, *roles], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=[SPECIAL[1]],
        model_max_length=2048,
    )


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """1.9 M parameters; 3.8 MB in bf16."""
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        initializer_range=0.04,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def preference_rows(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int
) -> Iterator[dict[str, str]]:
    """One comparison a prompt, of two samples of the base; none if they are the same or empty."""
    settings = Sample(temperature=1.0, top_p=1.0, max_new_tokens=48, batch_size=200)
    first, second = (
        complete(model, tokenizer, prompts, settings, seed=2 * seed + n) for n in (0, 1)
    )
    judge = Random(seed)
    for prompt, a, b in zip(prompts, first, second, strict=True):
        if a != b and a.strip() and b.strip():
            chosen, rejected = world.preference(prompt, a, b, judge)
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def complete(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    settings: Sample,
    seed: int,
) -> list[str]:
    """One completion a prompt, as text without the end of the turn.

    The seed and the place of a prompt decide what is drawn.
    """
    turns = [[{"role": "user", "content": text}] for text in prompts]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    seeds = [seed * 2**32 + number for number in range(len(ids))]
    found = dict(
        itertools.chain(*completions(model, ids, seeds, settings, [tokenizer.eos_token_id]))
    )
    return tokenizer.batch_decode(
        [list(found[n].token_ids) for n in range(len(ids))], skip_special_tokens=True
    )


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
