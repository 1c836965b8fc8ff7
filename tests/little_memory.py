"""Training, sampling and evaluation with little memory: see `devices.memory_limit`.

In a module of its own, so that a new process can import it.
"""

from pathlib import Path

import numpy as np
import torch
from devices import memory_limit
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tbpo_cli.config.recipe import Sample, load_recipe
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.candidates import Candidate
from tbpo_cli.evaluation.measurer import Measurer
from tbpo_cli.model.generate import completions
from tbpo_cli.model.load import load_policy
from tbpo_cli.model.policy import POLICY
from tbpo_cli.train import loop
from tbpo_cli.train.feed import TokenBudget
from tbpo_cli.train.group import Group
from tbpo_cli.train.run import TrainingRun

INNER = 32_768  # a token takes 128 kB in each of several tensors of a layer


def write_wide_base(folder: Path, base: Path, hidden: int = 32) -> Path:
    """A base with the tokenizer of another one, whose activations take much memory."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _stores(run):
    return [PairStore(run / "prepare" / split) for split in ("train", "eval")]


def train(device, num_bytes, recipe_file, run, folder, *overrides):
    """The trained weights, or the words of a TbpoError.

    Args:
        num_bytes: left of the device's memory once the weights are loaded; None: all of it.
        run: a run directory with prepared pairs.
        folder: of the stage.
    """
    recipe = load_recipe(recipe_file, overrides)
    policy = load_policy(recipe, torch.device(device), None, with_reference=True)
    folder.mkdir()
    group = Group(device=torch.device(device))
    settings, loss = recipe.align, recipe.align.loss
    training = TrainingRun(policy, loss, settings, *_stores(run), folder, 0, group=group)
    try:
        with memory_limit(device, num_bytes):
            loop.train(training)
    except TbpoError as error:
        return str(error)
    return {name: weight.detach().cpu().numpy() for name, weight in policy.trained.items()}


def sample(device, num_bytes, recipe_file, prompts, **settings):
    """The tokens of a completion of each prompt, or the words of a TbpoError."""
    policy = load_policy(load_recipe(recipe_file), torch.device(device), None, with_reference=True)
    given = Sample(temperature=1.0, top_p=1.0, max_new_tokens=6, **settings)
    places = range(len(prompts))
    try:
        with memory_limit(device, num_bytes):
            batches = list(completions(policy.model, prompts, places, given, [2]))
    except TbpoError as error:
        return str(error)
    found = {place: completion.token_ids for batch in batches for place, completion in batch}
    return [found[place] for place in places]


def evaluate(device, num_bytes, recipe_file, run):
    """The rows of the held-out pairs, as `tbpo eval` measures them: (pairs, columns)."""
    recipe = load_recipe(recipe_file)
    policy = load_policy(recipe, torch.device(device), None, with_reference=True)
    budget = TokenBudget("auto", 1024, Group(device=torch.device(device)))
    measurer = Measurer(
        recipe,
        run / "prepare/eval",
        None,
        policy,
        lambda items: items,
        budget.attempt,
        lambda measurement: {},
    )
    with memory_limit(device, num_bytes):
        rows = measurer.preference(Candidate(POLICY, POLICY, "", None, 1.0))
    rows = sorted(rows, key=lambda row: row["pair"])
    return np.array([list(row.values()) for row in rows], dtype=np.float64)
