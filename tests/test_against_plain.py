"""A small training, whole, against a second implementation of it: see plain.py."""

import json

import plain
import pytest
import tomli_w
import torch
from conftest import preference_rows, run_stage, write_jsonl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

NUM_STEPS = 20
NUM_PAIRS = 6
RATES = {"lora": 2e-3, "all weights": 3e-4}
# The first gradient of TBPO-Q's baseline is rounding alone, and AdamW makes whole steps of it:
# where the two round differently, some weights, and with them the figures, part by more.
SHARE_OF_TBPO_Q = 0.1
LOG_EVERY = 7
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0}


def make_adapter(folder, base, seed):
    """A LoRA adapter that changes the base: neither A nor B is zero, and all have gradients."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=layers))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base):
    """Three of them: one to start from, and the helpers of TIS-DPO."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / str(seed), base, seed) for seed in (3, 4, 5)]


@pytest.fixture(scope="module")
def rows():
    return preference_rows(NUM_PAIRS, seed=5)


def product(folder, base, rows, settings, adapter, helpers=()):
    """The lines of metrics.jsonl and the weights of `tbpo align` or `tbpo sft`, by the settings."""
    stage = "sft" if settings.loss == "sft" else "align"
    training = {
        "max_steps": settings.num_steps,
        "learning_rate": settings.learning_rate,
        "warmup": settings.warmup,
        "schedule": settings.schedule,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "log_every": LOG_EVERY,
        "max_tokens_per_device": 120,
        "batch_examples" if stage == "sft" else "batch_pairs": len(rows),
    }
    if stage == "align":
        named = dict(zip(("positive", "negative"), map(str, helpers), strict=False))
        training["loss"] = {"name": settings.loss, "beta": settings.beta, **named}
    model = {"base": str(base)}
    if adapter is not None:
        model |= {"adapter": str(adapter), "lora": LORA}
    recipe = {
        "run": {"seed": settings.seed},
        "model": model,
        "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "eval_fraction": 0.0},
        stage: training,
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    run = run_stage(stage, path, folder / "run")
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    name = "model/model" if adapter is None else "adapter/adapter_model"
    weights = load_file(run / stage / f"{name}.safetensors")
    return [line for line in lines if line["split"] == "train"], weights


def assert_same(lines, weights, want, share=0.0):
    losses = [line["loss"] for line in lines]
    assert losses == pytest.approx(want.losses, abs=1e-4 if share else 1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-3, "nothing was learned: the test would see nothing"
    grad_norms = [line["grad_norm"] for line in lines]
    assert grad_norms == pytest.approx(want.grad_norms, rel=2e-3)
    for line, figures in zip(lines, want.figures, strict=True):
        if line["step"] % LOG_EVERY == 0:
            assert {name: line[name] for name in figures} == pytest.approx(
                figures, abs=1e-3 if share else 1e-4
            )
    known = {name.replace(".default", ""): value for name, value in want.weights.items()}
    assert weights.keys() == known.keys()
    differences = torch.cat([(weights[name] - known[name]).abs().flatten() for name in known])
    assert (differences > 1e-5).float().mean() <= share


@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q", "dpo", "sft"])
@pytest.mark.parametrize("trained", ["lora", "all weights"])
def test_twenty_steps_are_those_of_a_plain_implementation(
    tmp_path, base, adapters, rows, loss, trained
):
    settings = plain.Settings(loss, NUM_STEPS, learning_rate=RATES[trained])
    adapter = adapters[0] if trained == "lora" else None
    want = plain.train(base, rows, settings, adapter)
    lines, weights = product(tmp_path, base, rows, settings, adapter)
    share = SHARE_OF_TBPO_Q if (loss, trained) == ("tbpo_q", "all weights") else 0.0
    assert_same(lines, weights, want, share)


def test_tis_dpo_weighs_the_tokens_of_both_sides_as_a_plain_implementation(
    tmp_path, base, adapters, rows
):
    settings = plain.Settings("tis_dpo", LOG_EVERY, learning_rate=RATES["lora"])
    start, *helpers = adapters
    want = plain.train(base, rows, settings, start, helpers)
    assert_same(*product(tmp_path, base, rows, settings, start, helpers), want)
