"""`tbpo show`: what it foretells is what the training then does, and it loads no weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import change_recipe, preference_rows, run_stage, write_jsonl

from tbpo_cli.cli.show import examine, policy_on_meta, show
from tbpo_cli.config.recipe import load_recipe, sources
from tbpo_cli.model.load import load_policy
from tbpo_cli.report.diagnoses import RATES, advice
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.train.memory import estimate_memory, kept_bytes, tokens_that_fit


def shown(recipe_file, run, capsys, *overrides):
    recipe = load_recipe(recipe_file, overrides)
    capsys.readouterr()
    show(recipe, sources(recipe_file, overrides), RunDir(run))
    return capsys.readouterr().out


def flat(text):
    return " ".join(text.split())


def test_every_value_is_there_with_its_source_within_80_columns(
    recipe_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", preference_rows(1))
    overrides = ("align.loss.beta=0.2", "run.seed=3", "data.train=./rows.jsonl")
    text = shown(recipe_file, tmp_path / "run", capsys, *overrides)
    assert "r = 4 " in text and text.split("r = 4 ")[1].split("\n")[0].strip() == "(file)"
    for value in ("beta = 0.2", "seed = 3", 'path = "./rows.jsonl"'):
        assert text.split(value)[1].split("\n")[0].strip() == "(--set)", value
    assert "default: weight = 1.0" in text and 'name = "tiny"' in text.split("default:")[1]
    settings = load_recipe(recipe_file, overrides).settings()
    for key, value in settings.items():
        value = json.dumps(value, ensure_ascii=False).replace(f'"{tmp_path}/', '"./')
        assert flat(f"{key.rpartition('.')[2]} = {value}") in flat(text), key
    assert all(
        len(line) <= 80 for line in text.splitlines() if "/base" not in line and "/rows" not in line
    )


def test_before_prepare_it_says_so_and_afterwards_it_knows_pairs_tokens_and_steps(
    recipe_file, tmp_path, capsys
):
    text = shown(recipe_file, tmp_path / "run", capsys)
    assert "prepare would run align would run" in flat(
        text
    ) and "known once `tbpo prepare` has read" in flat(text)
    assert not (tmp_path / "run").exists(), "it writes nothing"
    run = run_stage("prepare", recipe_file, tmp_path / "run")
    text = flat(shown(recipe_file, run, capsys))
    assert (
        "prepare up to date" in text
        and "40 pairs, 8 held out; 6 steps of 8, each pair 1.2 ×" in text
    )


def test_what_it_foretells_is_what_the_training_says(recipe_file, tmp_path, capsys):
    foretold = flat(shown(recipe_file, tmp_path / "run", capsys))
    run_stage("align", recipe_file, tmp_path / "run")
    said = capsys.readouterr().err
    assert "the reference is the base, with the adapter off" in said
    assert "reference the base, with the adapter off" in foretold
    assert "rows are shared_prompt: every prompt is read once" in said
    assert "layout shared_prompt: every prompt is read once" in foretold
    after = flat(shown(recipe_file, tmp_path / "run", capsys))
    assert "align up to date" in after and f"tokens/s of {tmp_path}/run/align)" in after


HEADS = {
    (): "no policy logits: policy and reference have one frozen, linear head",
    ("align.loss.name=dpo",): "logits of 320 response tokens at a time: the loss reads log π_θ",
    ("model.lora.target_modules=all-linear", "align.loss.name=simpo"): "the loss reads log π_θ",
}


@pytest.mark.parametrize("overrides", HEADS)
def test_the_way_through_the_head_is_named(recipe_file, tmp_path, overrides):
    lines = dict(examine("align", load_recipe(recipe_file, overrides), RunDir(tmp_path))[0])
    assert HEADS[overrides] in lines["head"]
    assert ("metrics only" in lines["reference"]) == ("align.loss.name=simpo" in overrides)


def test_references_and_helpers_are_those_of_the_training(recipe_file, tmp_path):
    for name, changes in (("full", {"model": {"lora": None}}), ("sft", {"sft": {}})):
        change_recipe(Path(shutil.copy(recipe_file, tmp_path / f"{name}.toml")), **changes)
    cases = {
        "full.toml": ("a frozen copy of the model", "the head is trained"),
        "sft.toml": ("a frozen copy of the SFT adapter", "no policy logits"),
    }
    for name, (reference, head) in cases.items():
        lines = dict(examine("align", load_recipe(tmp_path / name), RunDir(tmp_path / "run"))[0])
        assert lines["reference"] == reference and head in lines["head"]
    for name, count in (("full.toml", 3), (recipe_file.name, 0)):
        recipe = load_recipe(tmp_path / name, ("align.loss.name=tis_dpo",))
        policy = policy_on_meta("align", recipe, recipe.align.loss, torch.device("cpu"))
        assert len(policy.frozen) == count
        assert len(policy.adapters) == (0 if count else 3), "π⁺ and π⁻ stand beside the policy"


@pytest.mark.parametrize("full", [False, True])
def test_the_shapes_without_numbers_are_those_of_the_loaded_model(recipe_file, full):
    """The same weights, and the same bytes a token, as on the model with its weights."""
    recipe = load_recipe(change_recipe(recipe_file, model={"lora": None} if full else {}))
    cpu = torch.device("cpu")
    meta = policy_on_meta("align", recipe, recipe.align.loss, cpu)
    loaded = load_policy(recipe, cpu, None, with_reference=True)
    assert {p.device.type for p in meta.model.parameters()} == {"meta"}
    for of in (
        lambda p: sum(w.numel() for w in p.trained.values()),
        lambda p: kept_bytes(p.model, False),
    ):
        assert of(meta) == of(loaded)
    both = [
        estimate_memory(p, recipe.model, recipe.align, cpu, 1, (0, 10**6)) for p in (meta, loaded)
    ]
    assert both[0] == both[1] and both[0][1] == 1024


def test_kept_bytes_are_what_autograd_keeps_of_a_real_pass(recipe_file):
    recipe = load_recipe(recipe_file, ("model.lora.dropout=0.0",))
    policy = load_policy(recipe, torch.device("cpu"), None, with_reference=True)
    backbone = policy.model.get_base_model().model
    own, kept = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}, {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(note(t)) or t, lambda t: t):
        backbone(input_ids=torch.zeros(1, 200, dtype=torch.long), use_cache=False)
    assert kept_bytes(policy.model, False)[0] == pytest.approx(sum(kept.values()) / 200, rel=0.15)
    assert kept_bytes(policy.model, True)[0] < 0.8 * kept_bytes(policy.model, False)[0]


def test_the_first_micro_batch_is_a_power_of_two_in_half_of_the_free_gpu_or_1024_tokens(
    monkeypatch,
):
    """(80 GB − 16 GB) / 2 / 1 MB = 32,000 tokens, so 16,384; never under 64 or over 65,536."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9)
    )
    found = [tokens_that_fit(kept, gpu, 16e9) for kept in (1e6, 1e12, 1.0)]
    assert found == [16384, 64, 65536] and tokens_that_fit(1e6, cpu, 0) == 1024


def test_memory_follows_from_processes_and_quantization(recipe_file):
    recipe = load_recipe(recipe_file)
    policy = policy_on_meta("align", recipe, recipe.align.loss, torch.device("cpu"))
    whole, shared = (
        estimate_memory(policy, recipe.model, recipe.align, torch.device("cpu"), n, (0, 99))[0]
        for n in (1, 4)
    )
    assert (
        shared["weights"] == whole["weights"] / 4 and shared["activations"] == whole["activations"]
    )
    nf4 = estimate_memory(
        policy,
        replace(recipe.model, quantization="nf4"),
        recipe.align,
        torch.device("cpu"),
        1,
        (0, 99),
    )[0]
    assert nf4["weights"] < 0.8 * whole["weights"]


def test_the_memory_that_was_foretold_is_within_20_percent_of_what_was_measured():
    measured = json.loads((Path(__file__).parent / "benchmarks/results/memory.json").read_text())[
        "rows"
    ]
    assert len({row["shape"] for row in measured}) >= 3
    for row in measured:
        assert abs(row["foretold_gb"] / row["measured_gb"] - 1) <= 0.2, row


def test_a_base_that_cannot_be_reached_leaves_the_rest_to_be_shown(recipe_file, tmp_path, capsys):
    text = flat(shown(recipe_file, tmp_path / "run", capsys, "model.base=nobody/nothing"))
    assert (
        "could not be found out: the model cannot be loaded" in text and "align would run" in text
    )


def test_the_command_loads_no_weights(tbpo, recipe_file, base, tmp_path):
    """The base's weights may be missing altogether."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    done = tbpo("show", recipe_file, "--set", f"model.base={bare}", "--gpus", "2")
    assert done.returncode == 0 and "memory" in done.stdout, done.stderr
    assert "2, ddp: only an adapter is trained" in flat(done.stdout) and done.stderr == ""


FACTS = {
    "stage": "align",
    "lora": True,
    "rate": 5e-6,
    "beta": 1.0,
    "weights": 7e9,
    "memory": 1e9,
    "room": 2e9,
}
SAID = {
    "nothing is wrong": ({}, []),
    "what suits LoRA is too high for all weights": (
        {"lora": False, "rate": 5e-5},
        ["all weights take a tenth"],
    ),
    "high": ({"rate": 1e-3}, ["learning_rate = 0.001 is high"]),
    "a small model takes more": ({"rate": 1e-3, "weights": 2e6}, []),
    "low": ({"rate": 1e-8}, ["is low"]),
    "low beta": ({"beta": 0.01}, ["beta is 0.01 of its default"]),
    "high beta": ({"beta": 50}, ["50 times its default"]),
    "long": ({"length_ratio": 1.6}, ["1.6 times as long"]),
    "cut": ({"cut": 0.3}, ["30% of the rows are over data.max_length"]),
    "many epochs": ({"visits": 5}, ["read 5.0 times"]),
    "nothing is held out": ({"held_out": 0}, ["no pair is held out"]),
    "too big": ({"memory": 3e9}, ["align needs more memory"]),
    "several at once": ({"rate": 1e-8, "held_out": 0}, ["is low", "no pair is held out"]),
    "an sft of all weights": (
        {"stage": "sft", "lora": False, "rate": 2e-4},
        ["all weights take a tenth"],
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_usually_goes_wrong_is_said(case):
    changes, expected = SAID[case]
    said = advice(**FACTS | changes)
    assert len(said) == len(expected)
    for line, part in zip(said, expected, strict=True):
        assert part in line


def test_a_changed_recipe_is_shown_with_what_it_invalidates(recipe_file, tmp_path, capsys):
    run = run_stage("align", recipe_file, tmp_path / "run", "align.max_steps=1")
    text = flat(shown(recipe_file, run, capsys, "align.max_steps=2"))
    assert "align made from other inputs; --restart would redo it: align.max_steps: 1 → 2" in text


def test_warnings_come_from_the_prepared_pairs(recipe_file, tmp_path, capsys):
    rows = [row | {"chosen": " ".join([row["chosen"]] * 3)} for row in preference_rows(40)]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    overrides = (
        f"data.train={path}",
        "data.max_length=40",
        "align.epochs=9",
        "data.max_reject_fraction=0.9",
    )
    change_recipe(recipe_file, align={"max_steps": None})
    run = run_stage("prepare", recipe_file, tmp_path / "run", *overrides)
    text = flat(
        shown(
            recipe_file, run, capsys, *overrides, "align.loss.beta=9.0", "align.learning_rate=0.9"
        )
    )
    parts = (
        "times as long as rejected",
        "are over data.max_length",
        "is read 9.2 times",
        "90 times its",
        "is high",
    )
    for part in parts:
        assert part in text, part


def test_the_ranges_hold_the_papers_and_the_recipes_rates():
    assert all(low < high for low, high in RATES.values())
    assert RATES["align", True][0] < 5e-7 < 5e-5 < RATES["align", True][1]
