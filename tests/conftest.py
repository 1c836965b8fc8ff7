"""A tiny real model, tokenizer and preference data; the command, in this process or as one."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1",  # for models as small as these, more threads only wait for each other
    HF_HUB_OFFLINE="1",
    NO_PROXY="127.0.0.1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    NO_COLOR="1",
    COLUMNS="100",
)

import pytest
import tomli_w
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "cat",
    "dog",
    "bird",
    "tree",
    "house",
    "runs",
    "jumps",
    "sings",
    "loves",
    "sees",
]

# Of a model that a test makes in no time, of any family.
SIZES_OF_A_MODEL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}

# Python that a process runs as it starts.
SMALL_SECOND_DEVICE = """
import os
import torch
embedding = torch.nn.functional.embedding
def on_a_small_device(ids, *arguments, **named):
    if os.environ.get("RANK") == "1" and ids.numel() > {}:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return embedding(ids, *arguments, **named)
torch.nn.functional.embedding = on_a_small_device
"""


def small_second_device(num_tokens):
    """The code by which the second process runs out of memory with more tokens at once."""
    return SMALL_SECOND_DEVICE.format(num_tokens)


def sentence(rng, low=2, high=9):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high))) + "."


def preference_rows(count, seed=0):
    rng = random.Random(seed)
    return [
        {"prompt": f"{sentence(rng)} {number}", "chosen": sentence(rng), "rejected": sentence(rng)}
        for number in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator([sentence(rng) for _ in range(500)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    return fast


@pytest.fixture
def mesh(tmp_path):
    """Of this process alone: it has all of the shards, by the same code."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """A random Llama of 2 layers, H = 32, saved like any model: config, safetensors, tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """(train.jsonl with 40 pairs, eval.jsonl with 8)."""
    folder = tmp_path_factory.mktemp("rows")
    return write_jsonl(folder / "train.jsonl", preference_rows(40)), write_jsonl(
        folder / "eval.jsonl", preference_rows(8, seed=1)
    )


def recipe_of(base, rows):
    """The tables of a small recipe for LoRA, with 6 steps of 8 pairs."""
    return {
        "model": {"base": str(base), "lora": {"r": 4, "alpha": 8.0, "dropout": 0.1}},
        "data": {"train": str(rows[0]), "eval": str(rows[1])},
        "align": {
            "batch_pairs": 8,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "checkpoint_every": 2,
            "eval_every": 3,
            "log_every": 2,
        },
    }


def merged(recipe, changes):
    """The tables with other values in them; None takes away a key or a table."""
    both = {**recipe, **changes}
    for key, value in changes.items():
        if isinstance(value, dict):
            both[key] = merged(recipe.get(key, {}), value)
    return {key: value for key, value in both.items() if value is not None}


def write_recipe(path, base, rows, **changes):
    """A file of `recipe_of` with some tables changed: see `merged`."""
    tables = merged(recipe_of(base, rows), changes)
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def change_recipe(path, **changes):
    """Changes some tables of a recipe's file: see `merged`."""
    tables = merged(tomllib.loads(path.read_text(encoding="utf-8")), changes)
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path, base, rows):
    return write_recipe(tmp_path / "tiny.toml", base, rows)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, base, rows):
    """A folder with tiny.toml and, in run/, its finished alignment: made once, never changed."""
    folder = tmp_path_factory.mktemp("trained")
    run_stage("align", write_recipe(folder / "tiny.toml", base, rows), folder / "run")
    return folder


@pytest.fixture
def finished(trained, tmp_path):
    """A run directory in which the alignment of `recipe_file` is finished, for this test alone."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def command(*arguments, cwd, stdin=""):
    """`tbpo ARGUMENTS` in this process, in the folder `cwd`; returns a finished process."""
    from tbpo_cli import console
    from tbpo_cli.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["tbpo", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(console.err, "quiet", False)
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture
def tbpo(tmp_path):
    """Runs the command in this process, in `tmp_path`: see `command`."""
    return partial(command, cwd=tmp_path)


@pytest.fixture
def start(tmp_path):
    """Starts the command as a process of its own, in `tmp_path`: see `Process`."""
    from process import Process

    started = []

    def start(*arguments, **environment):
        started.append(Process(*arguments, cwd=tmp_path, **environment))
        return started[-1]

    yield start
    for command in started:
        command.close()


@pytest.fixture
def executable(tmp_path):
    """Runs the command as a user does, imports and all, in `tmp_path`; see subprocess.run."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "tbpo_cli.cli.main", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def run_stage(stage, recipe_file, run_dir, *overrides, restart=False):
    """A stage in this process, as the command runs it; returns the run directory."""
    from tbpo_cli.config.recipe import load_recipe
    from tbpo_cli.runs.run_dir import RunDir
    from tbpo_cli.stages.chain import run_through

    recipe = load_recipe(Path(recipe_file), overrides)
    directory = RunDir.of(recipe, Path(run_dir))
    run_through(stage, recipe, directory, restart)
    return directory.path
