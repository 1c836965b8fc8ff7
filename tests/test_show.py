"""`tbpo show`: what it foretells is what the training then does, and it loads no weights."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import change_recipe, preference_rows, run_stage, write_jsonl
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from zoo.families import COMMON

from tbpo_cli import console
from tbpo_cli.cli.forecast import forecast, policy_on_meta, trainings_of
from tbpo_cli.cli.show import show
from tbpo_cli.config.recipe import load_recipe, sources
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.attention import BY_SEQUENCE
from tbpo_cli.model.load import load_policy
from tbpo_cli.report.diagnoses import AFTER, BEFORE, diagnose
from tbpo_cli.report.facts import RATES, Facts, after_training
from tbpo_cli.runs.launch import Processes
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.train.checkpoint import bytes_on_disk
from tbpo_cli.train.memory import estimate_memory, kept_bytes, tokens_that_fit


def shown(recipe_file, run, capsys, *overrides):
    recipe = load_recipe(recipe_file, overrides)
    capsys.readouterr()
    show(recipe, sources(recipe_file, overrides), RunDir(run))
    return capsys.readouterr().out


def of_align(recipe):
    """The alignment of a recipe, as `forecast` takes it."""
    return [*trainings_of(recipe)][-1]


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


def test_a_training_without_a_reference_says_so(recipe_file, tmp_path, capsys):
    overrides = ("align.loss=simpo", "model.lora=none", "align.max_steps=1")
    run_stage("align", recipe_file, tmp_path / "run", *overrides)
    said = flat(capsys.readouterr().err)
    assert "no reference: the loss needs none" in said and "the reference is" not in said


def test_what_it_foretells_is_what_the_training_says(recipe_file, tmp_path, capsys):
    before = flat(shown(recipe_file, tmp_path / "run", capsys))
    run_stage("align", recipe_file, tmp_path / "run")
    said = capsys.readouterr().err
    assert "the reference is the base, with the adapter off" in said
    assert "reference the base, with the adapter off" in before
    assert "rows are shared_prompt: every prompt is read once" in said
    assert "layout shared_prompt: every prompt is read once" in before
    weights = load_file(tmp_path / "run/align/adapter/adapter_model.safetensors").values()
    num_weights = sum(weight.numel() for weight in weights)
    assert f"align: training {num_weights:,} weights on cpu; 40 pairs, 8 held out" in said
    after = flat(shown(recipe_file, tmp_path / "run", capsys))
    assert "align up to date" in after and f"tokens/s of {tmp_path}/run/align)" in after


def test_a_narrow_terminal_gets_narrow_lines(recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(console.out), "width", 60)
    text = shown(recipe_file, tmp_path / "run", capsys)
    plan = text.partition("prepare  ")[2]
    assert plan and all(len(line) <= 60 for line in plan.splitlines()), plan


HEADS = {
    (): "no policy logits: policy and reference have one frozen, linear head",
    ("align.loss.name=dpo",): "logits of 320 response tokens at a time: the loss reads log π_θ",
    ("model.lora.target_modules=all-linear", "align.loss.name=simpo"): "the loss reads log π_θ",
}


@pytest.mark.parametrize("overrides", HEADS)
def test_the_way_through_the_head_is_named(recipe_file, tmp_path, overrides):
    recipe = load_recipe(recipe_file, overrides)
    lines = dict(forecast(of_align(recipe), recipe, RunDir(tmp_path)).lines)
    assert HEADS[overrides] in lines["head"]
    assert ("metrics only" in lines["reference"]) == ("align.loss.name=simpo" in overrides)


def test_references_and_helpers_are_those_of_the_training(recipe_file, tmp_path):
    for name, changes in (("full", {"model": {"lora": None}}), ("sft", {"sft": {}})):
        change_recipe(Path(shutil.copy(recipe_file, tmp_path / f"{name}.toml")), **changes)
    cases = {
        "full.toml": ("a frozen model beside the policy", "the head is trained"),
        "sft.toml": ("a frozen adapter beside the policy's, on the same base", "no policy logits"),
    }
    for name, (reference, head) in cases.items():
        recipe = load_recipe(tmp_path / name)
        lines = dict(forecast(of_align(recipe), recipe, RunDir(tmp_path / "run")).lines)
        assert lines["reference"] == reference and head in lines["head"]
    for name, count in (("full.toml", 3), (recipe_file.name, 0)):
        recipe = load_recipe(tmp_path / name, ("align.loss.name=tis_dpo",))
        policy = policy_on_meta(of_align(recipe), recipe, torch.device("cpu"))
        assert len(policy.frozen) == count
        assert len(policy.adapters) == (0 if count else 3), "π⁺ and π⁻ stand beside the policy"


@pytest.mark.parametrize("full", [False, True])
def test_the_shapes_without_numbers_are_those_of_the_loaded_model(recipe_file, full):
    """The same weights, and the same bytes a token, as on the model with its weights."""
    recipe = load_recipe(change_recipe(recipe_file, model={"lora": None} if full else {}))
    cpu = torch.device("cpu")
    meta = policy_on_meta(of_align(recipe), recipe, cpu)
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


def test_under_autocast_the_bytes_of_a_token_and_the_copies_of_weights_are_those_of_a_real_pass(
    recipe_file,
):
    """All weights in fp32, products in bf16: what a pass over 200 tokens keeps more than one over
    100, and what both keep alike, which are the weights of the layers in bf16.
    """
    change_recipe(recipe_file, model={"lora": None})
    recipe = load_recipe(recipe_file, ("model.dtype=bfloat16",))
    policy = load_policy(recipe, torch.device("cpu"), None, with_reference=True)
    policy.model.set_attn_implementation(BY_SEQUENCE)
    policy.model.train()
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def kept(num_tokens):
        sizes, held = {}, []

        def note(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            policy.model.model(
                input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False
            )
        return sum(sizes.values())

    of_a_token = (kept(200) - kept(100)) / 100
    bytes_a_token, _ = kept_bytes(policy.model, False, torch.bfloat16)
    assert bytes_a_token == pytest.approx(of_a_token, rel=0.02)
    assert kept_bytes(policy.model, False)[0] > 1.3 * bytes_a_token
    cpu = torch.device("cpu")
    parts, _ = estimate_memory(policy, recipe.model, recipe.align, cpu, 1, (0, 99))
    head = policy.model.get_output_embeddings().weight.numel()
    copies = kept(100) - 100 * of_a_token
    assert parts["copies of weights"] == pytest.approx(copies + 4 * head, rel=0.01)
    sharded, _ = estimate_memory(policy, recipe.model, recipe.align, cpu, 4, (0, 99))
    layer = (sum(p.numel() for p in policy.model.parameters()) - head) / 2
    assert sharded["copies of weights"] == 2 * (2 * head + layer) + 4 * head, "gathered in bf16"


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
    policy = policy_on_meta(of_align(recipe), recipe, torch.device("cpu"))
    whole, shared = (
        estimate_memory(policy, recipe.model, recipe.align, torch.device("cpu"), n, (0, 99))[0]
        for n in (1, 4)
    )
    assert (
        shared["weights"] == whole["weights"] / 4 and shared["activations"] == whole["activations"]
    )
    loaded = load_policy(recipe, torch.device("cpu"), None, with_reference=True)
    assert whole["weights"] == sum(w.numel() * w.element_size() for w in loaded.model.parameters())
    optimizer = torch.optim.AdamW(loaded.trained.values())
    for weight in loaded.trained.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    states = [*optimizer.state.values()]
    moments = sum(one[name].nbytes for one in states for name in ("exp_avg", "exp_avg_sq"))
    gradients = sum(weight.grad.nbytes for weight in loaded.trained.values())
    assert whole["gradients and moments"] == moments + gradients
    bytes_a_token, of_a_layer = kept_bytes(loaded.model, False)
    assert 99 * bytes_a_token <= whole["activations"] <= 99 * (bytes_a_token + 6 * of_a_layer)
    nf4 = estimate_memory(
        policy,
        replace(recipe.model, quantization="nf4"),
        recipe.align,
        torch.device("cpu"),
        1,
        (0, 99),
    )[0]
    assert nf4["weights"] < 0.8 * whole["weights"]


@pytest.mark.parametrize(
    ("processes", "over", "parts", "said"),
    [
        (Processes(4), "auto", 4, "4, fsdp: all of them are trained"),
        (Processes(2, machines=2), "auto", 2, "4, fsdp: all of them are trained; each of the 2 "),
        (Processes(2, machines=2), "all", 4, "4, fsdp: all of them are trained"),
    ],
)
def test_sharded_weights_are_divided_by_the_processes_that_share_them(
    recipe_file, tmp_path, processes, over, parts, said
):
    change_recipe(recipe_file, model={"lora": None})
    recipe = load_recipe(recipe_file, (f"align.shard_over={over}",))
    whole, shared = (
        forecast(of_align(recipe), recipe, RunDir(tmp_path / "run"), each)
        for each in (Processes(), processes)
    )
    for part in ("weights", "gradients and moments", "copy for checkpoints"):
        assert shared.memory[part] == whole.memory[part] / parts, part
    line = dict(shared.lines)["processes"]
    assert line.startswith(said) and line.endswith(f"in {parts} parts") == (parts == 2)


def test_the_copy_of_a_checkpoint_counts_where_half_of_the_free_memory_holds_it(
    recipe_file, monkeypatch
):
    """Weights and two moments, in fp32; without memory for it the training waits instead."""
    change_recipe(recipe_file, model={"lora": None})
    recipe = load_recipe(recipe_file)
    cpu = torch.device("cpu")
    policy = policy_on_meta(of_align(recipe), recipe, cpu)
    before, _ = estimate_memory(policy, recipe.model, recipe.align, cpu, 1, (0, 99))
    trained = sum(weight.numel() for weight in policy.trained.values())
    copy = before.pop("copy for checkpoints")
    assert copy == 12 * trained
    for times, is_there in ((2.1, True), (1.9, False)):
        memory = SimpleNamespace(total=sum(before.values()) + times * copy)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        parts, _ = estimate_memory(policy, recipe.model, recipe.align, cpu, 1, (0, 99))
        assert ("copy for checkpoints" in parts) == is_there


def test_the_memory_that_was_forecast_is_within_20_percent_of_what_was_measured():
    measured = json.loads((Path(__file__).parent / "benchmarks/results/memory.json").read_text())[
        "rows"
    ]
    assert len({row["shape"] for row in measured}) >= 3
    for row in measured:
        assert abs(row["forecast_gb"] / row["measured_gb"] - 1) <= 0.2, row


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
    done = tbpo("show", recipe_file, "--set", f"model.base={bare}", "--gpus", "2", "--nodes", "2")
    assert done.returncode == 0 and "memory" in done.stdout, done.stderr
    assert "4, ddp: only an adapter is trained" in flat(done.stdout) and done.stderr == ""


def test_on_the_cpu_it_takes_the_options_of_align(tbpo, recipe_file):
    text = flat(tbpo("show", recipe_file, "--cpu", "--gpus", "2").stdout)
    assert re.search(r"memory about \S+ of \S+ GB on each cpu,", text)
    assert re.search(r"processes 2, \w+:", text)


def test_of_a_mixture_of_experts_no_line_of_torch_is_printed(start, recipe_file, tmp_path, base):
    """Its experts have no kernel for shapes without numbers, which torch logs with a traceback."""
    experts = tmp_path / "experts"
    shutil.copytree(base, experts)
    (experts / "model.safetensors").unlink()
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "moe_intermediate_size", "num_experts")
    sizes = {name: COMMON[name] for name in (*names, "num_experts_per_tok")}
    config = AutoConfig.for_model("qwen3_moe", vocab_size=vocabulary, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(experts)
    sets = ("--set", f"model.base={experts}", "--set", "align.max_steps=1")
    for command in ("show", "align"):
        done = start(command, recipe_file, *sets).finish()
        assert done.returncode == 0, done.stderr
        assert command != "show" or (done.stderr == "" and "memory" in done.stdout)
        assert "fake_tensor" not in done.stderr and "Traceback" not in done.stderr


FACTS = {"stage": "align", "rate": 5e-6, "weights": 7e9, "memory": 1e9, "device_memory": 2e9}
SAID = {
    "nothing is wrong": ({}, []),
    "what suits LoRA is too high for all weights": (
        {"lora": False, "rate": 5e-5},
        ["5e-05 is high: for all weights, 1.5e-07 to 1.6e-05 are usual"],
    ),
    "high": ({"rate": 1e-3}, ["the learning rate 0.001 is high"]),
    "a small model takes more": ({"rate": 1e-3, "weights": 2e6}, []),
    "low": ({"rate": 1e-8}, ["is low"]),
    "too few steps": (
        {"steps": 30},
        ["a training of 30 steps at the rate 5e-06 hardly moves a policy"],
    ),
    "enough steps": ({"steps": 1900}, []),
    "a single step": (
        {"steps": 1, "batch": 32, "rate": 1e-4},
        ["of 1 step at the rate 0.0001 hardly moves", "a single step of 32"],
    ),
    "fewer pairs than a batch": ({"pairs": 8, "batch": 32}, ["has 8 pairs, and a step takes 32"]),
    "low beta": ({"beta_share": 0.01}, ["beta is 0.01 of its default"]),
    "high beta": ({"beta_share": 50}, ["50 times its default"]),
    "long": ({"length_ratio": 1.6}, ["1.6 times as long"]),
    "much is past the shorter response": ({"unaligned": 0.6}, ["60% of the response tokens"]),
    "cut": ({"cut": 0.3}, ["30% of the rows are over data.max_length"]),
    "many epochs": ({"visits": 5}, ["read 5.0 times"]),
    "nothing is held out": ({"held_out": 0}, ["no pair is held out"]),
    "too big": ({"memory": 3e9}, ["align needs more memory"]),
    "two sigma of few answers": ({"two_sigma_answers": 5}, ["takes the worst of 5 answers"]),
    "two sigma of enough answers": ({"two_sigma_answers": 6}, []),
    "several at once": ({"rate": 1e-8, "held_out": 0}, ["is low", "no pair is held out"]),
    "few steps at a high rate want more steps": (
        {"steps": 3, "rate": 1e-4},
        ["; try more pairs, epochs or max_steps"],
    ),
    "few steps at a low rate want a higher one": (
        {"steps": 300, "rate": 1e-6},
        ["or align.learning_rate = 3.3e-06"],
    ),
    "a KL of rounding errors": ({"kl": -2e-7, "steps": 1900}, ["hardly moved: KL 0.0000 nats"]),
    "one step": ({"kl": 2e-4, "steps": 1, "rate": 1e-4}, ["of 1 step at", "a token after 1 step;"]),
    "unmoved": ({"kl": 2e-4, "steps": 300}, ["hardly moved: KL 0.0002 nats a token after 300"]),
    "far": ({"kl": 3.0}, ["far from its reference: KL 3.00"]),
    "entropy": ({"entropy_share": 0.2}, ["entropy fell to 20%"]),
    "by heart": (
        {"training_accuracy": 0.99, "accuracy": 0.6, "held_out": 400},
        ["99% on the last training pairs and 60% on held-out"],
    ),
    "few held-out pairs say little": (
        {"training_accuracy": 0.9, "accuracy": 0.6, "held_out": 8},
        [],
    ),
    "moved, and not better": (
        {"kl": 0.1, "accuracy": 0.51, "held_out": 400},
        ["chosen response of only 51%"],
    ),
    "chosen falls": ({"kl": 0.5, "chosen_fall": 0.8}, ["fell by 0.80 nats a token"]),
    "the same judge": (
        {"same_judges": "judge.scorer"},
        ["the win rate by judge.scorer is no evidence"],
    ),
    "a judge that cannot be read": (
        {"unread": 0.25, "unread_by": "j"},
        ["j gave no verdict that can be read to 25.0% of its questions"],
    ),
    "a judge that looks at the position": (
        {"flips": 0.5, "flips_by": "j"},
        ["j changes its verdict with the order of the two answers on 50.0%"],
    ),
    "few flips are usual": ({"flips": 0.15, "flips_by": "j", "unread": 0.0}, []),
    "answers get longer": ({"answer_ratio": 1.5}, ["1.5 times as long as the reference's"]),
}


@pytest.mark.parametrize("case", SAID)
def test_what_usually_goes_wrong_is_said_with_the_key_to_change(case):
    changes, expected = SAID[case]
    said = diagnose(Facts(**FACTS | changes))
    assert len(said) == len(expected), said
    for line, part in zip(said, expected, strict=True):
        assert part in line and "; try " in line and "{" not in line


def advised_rates(facts):
    """The sentence and the rate of every piece of advice about the learning rate."""
    for line in diagnose(facts, BEFORE):
        if found := re.search(r"learning_rate = (\S+)", line):
            yield line.split(":")[0][:20], float(found[1])


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("stage", ["align", "sft"])
def test_an_advised_rate_is_within_the_limits_of_its_own_sentence(stage, lora):
    """Rates of 1e-9 to 1, models of 1e6 to 1e10 weights, 1 to 1e5 steps: all limits, rounded."""
    given = 0
    for rate in (1e-9 * 10 ** (n / 5) for n in range(45)):
        for weights in (1e6 * 10 ** (n / 7) for n in range(28)):
            for steps in (None, 1, 3, 7, 30, 113, 911, 4999, 10**5):
                facts = Facts(stage=stage, lora=lora, rate=rate, weights=weights, steps=steps)
                for begin, advised in advised_rates(facts):
                    given += 1
                    assert facts.low <= advised <= facts.high
                    again = diagnose(replace(facts, rate=advised), BEFORE)
                    assert not [line for line in again if line.startswith(begin)], (facts, advised)
    assert given > 1000


def test_every_diagnosis_is_met_in_a_case():
    facts = [Facts(**FACTS | changes) for changes, _ in SAID.values()]
    for each in BEFORE + AFTER:
        assert any(diagnose(one, [each]) for one in facts), each.condition


def test_the_facts_of_a_training_are_read_from_its_metrics():
    """Entropy 2 → 1; log π of chosen tokens −1 → −1.5; accuracy 1 in 6 steps, 0.75 held out."""
    begin = {"split": "eval", "step": 0, "kl": 0.0, "entropy": 2.0, "logps_chosen": -1.0}
    end = {"split": "eval", "step": 6, "kl": 0.2, "entropy": 1.0, "logps_chosen": -1.5}
    steps = [{"split": "train", "step": n, "accuracy": 1.0} for n in range(1, 7)]
    lines = [begin | {"accuracy": 0.0}, *steps, end | {"accuracy": 0.75}]
    before = Facts(rate=1e-4, held_out=8, batch=4, pairs=24)
    facts = after_training(lines, before)
    assert (facts.rate, facts.batch, facts.pairs) == (1e-4, 4, 24)
    assert (facts.steps, facts.kl, facts.entropy_share, facts.chosen_fall) == (6, 0.2, 0.5, 0.5)
    assert (facts.accuracy, facts.training_accuracy, facts.held_out) == (0.75, 1.0, 8)
    assert after_training(lines[:3], before).kl is None, "it is not complete"


def test_an_alignment_that_learns_nothing_ends_with_a_sentence_and_the_key(tbpo, recipe_file):
    done = tbpo("align", recipe_file, "--set", "align.learning_rate=1e-9")
    assert done.returncode == 0
    assert "WARNING: the policy has hardly moved: KL 0.0000 nats a token after 6" in done.stderr
    advised = re.search(r"or align.learning_rate = (\S+)", done.stderr)[1]
    assert float(advised) > 1e-4, "a small model takes more than one of 1e9 weights"


def test_an_alignment_of_one_step_on_fewer_pairs_than_a_batch_says_so_at_its_end(tbpo, recipe_file):
    done = tbpo(
        "align", recipe_file, "--set", "align.max_steps=1", "--set", "align.batch_pairs=999"
    )
    assert done.returncode == 0, done.stderr
    assert (
        "WARNING: the whole training is a single step of 999; try more align.epochs" in done.stderr
    )
    assert re.search(r"the training data has \d+ pairs, and a step takes 999", done.stderr)


def test_what_the_stages_need_is_listed_with_a_tick_or_a_message(tbpo, recipe_file, tmp_path):
    (tmp_path / "scorer.py").write_text("def score(prompt, completion):\n    return 1.0\n")
    sets = ("--set", "judge.scorer=python:./scorer.py:scor", "--set", 'run.trackers=["trackio"]')
    done = tbpo("show", recipe_file, *sets)
    text = flat(done.stdout)
    assert "✗ trackers trackio: trackio is not installed" in text
    assert "→ pip install trackio" in text
    assert "✗ files and models of the evaluation" in text and "has no function scor" in text
    assert "for checkpoints" in text and done.returncode == 2
    fine = tbpo("show", recipe_file, "--set", "judge.scorer=python:./scorer.py:score")
    assert "✓ files and models of the evaluation" in flat(fine.stdout)


@pytest.mark.parametrize(
    ("stage", "sets", "what"),
    [
        ("align", ('run.trackers=["trackio"]',), "trackio is not installed"),
        ("align", ("align.loss=tis_dpo",), "the positive helper is not named"),
        ("align", ("model.quantization=nf4",), "4"),
        ("eval", ("judge.scorer=python:./none.py:score",), "the scorer's file is not there"),
        ("eval", ("judge={endpoint = 'http://127.0.0.1:9/v1', model = 'x'}",), "127.0.0.1:9"),
    ],
)
def test_what_is_missing_stops_a_stage_before_anything_is_prepared(
    tbpo, recipe_file, tmp_path, stage, sets, what
):
    given = [part for one in sets for part in ("--set", one)]
    done = tbpo(stage, recipe_file, *given)
    assert done.returncode == 2 and what in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_gate_that_is_none_stops_the_evaluation_alone(tbpo, recipe_file, tmp_path):
    gate = ("--set", "eval.gate=accurcy > 0.5", "--set", "sample.max_new_tokens=2")
    few = ("--set", "align.max_steps=1", "--set", "sample.max_prompts=2")
    done = tbpo("sample", recipe_file, *few, *gate)
    assert done.returncode == 0 and (tmp_path / "runs/tiny/sample/manifest.json").exists()
    stopped = tbpo("eval", recipe_file, *few, *gate)
    assert stopped.returncode == 2 and "did you mean accuracy?" in stopped.stderr
    text = flat(tbpo("show", recipe_file, *gate).stdout)
    assert "✗ the condition accurcy > 0.5" in text and "did you mean accuracy?" in text
    aligned = tbpo("align", recipe_file, *gate, "--run-dir", tmp_path / "other", *few)
    assert aligned.returncode == 0 and "WARNING: tbpo eval would stop: eval.gate" in aligned.stderr


def test_a_disk_that_is_too_full_for_the_checkpoints_stops_a_training_before_its_first_step(
    recipe_file, tmp_path, monkeypatch
):
    run = run_stage("prepare", recipe_file, tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(TbpoError, match="the disk is too full") as error:
        run_stage("align", recipe_file, run)
    assert "--run-dir" in error.value.fix
    assert not (run / "align/metrics.jsonl").exists()


def test_a_training_needs_less_space_where_its_checkpoints_are_there(recipe_file, tmp_path):
    """Of n numbers in fp32 with two moments: 3 checkpoints of 12 n bytes and a result of 4 n; with
    two of them there, one checkpoint and the result.
    """
    assert bytes_on_disk(10, 2) == 3 * 120 + 40
    assert bytes_on_disk(10, 2, num_kept=2) == bytes_on_disk(10, 2, num_kept=5) == 120 + 40
    change_recipe(recipe_file, model={"lora": None})
    run = run_stage("align", recipe_file, tmp_path / "run")
    checkpoint, _ = (run / "align/checkpoints").iterdir()
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    recipe = load_recipe(recipe_file)
    disk = forecast(of_align(recipe), recipe, RunDir(run)).disk
    assert disk == pytest.approx(3 * size + size / 3, rel=0.1)


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
        "90 times its default",
        "is high",
    )
    for part in parts:
        assert part in text, part


def test_the_ranges_hold_the_papers_and_the_recipes_rates():
    assert all(low < high for low, high in RATES.values())
    assert RATES["align", True][0] < 5e-7 < 5e-5 < RATES["align", True][1]
