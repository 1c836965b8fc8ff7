"""Every shipped recipe loads, and the quickstart's world is what its scorer says it is."""

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import run_stage
from judge_server import chat_server

from tbpo_cli.config.recipe import load_recipe, sources
from tbpo_cli.core import LOSSES
from tbpo_cli.core.generators import Sba
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.run_dir import RunDir

RECIPES = Path(__file__).parent.parent / "recipes"
QUICKSTART = RECIPES / "quickstart"


@pytest.fixture(scope="module")
def world():
    sys.path.insert(0, str(QUICKSTART))
    import world

    yield world
    sys.path.remove(str(QUICKSTART))


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.align.loss_name in {"tbpo_a", "tbpo_q", "dpo"} and recipe.align.loss.beta in (
        0.1,
        0.01,
        0.5,
    )
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and all(len(line) <= 120 for line in lines)


# hidden, inner, layers, heads, key-value heads, vocabulary, tied: of the bases on the Hub
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 4864, 24, 14, 2, 151_936, True),
    "Qwen/Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151_936, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (2048, 8192, 24, 32, 32, 49_152, True),
    "HuggingFaceH4/mistral-7b-sft-alpha": (4096, 14336, 32, 32, 8, 32_002, False),
    "alignment-handbook/zephyr-7b-sft-full": (4096, 14336, 32, 32, 8, 32_000, False),
    "RLHFlow/LLaMA3-SFT-v2": (4096, 14336, 32, 32, 8, 128_256, False),
}
DEVICES = {
    "full-8gpu": (8, 80e9),
    "ultrafeedback-mistral": (1, 80e9),
    "ultrafeedback-llama3": (1, 80e9),
}  # others: 24 GB


@pytest.mark.parametrize(
    "name",
    [
        path.stem
        for path in RECIPES.glob("*.toml")
        if path.stem not in ("quickstart", "alpaca-eval", "rounds")
    ],
)
def test_every_shipped_recipe_is_shown_and_fits_the_gpu_that_it_names(name, tmp_path, capsys):
    """Its base is a config of that shape; 4,096 tokens at a time, bf16, activation checkpointing,
    by the formula for a GPU.
    """
    from tbpo_cli.cli.forecast import policy_on_meta, trainings_of
    from tbpo_cli.cli.show import show
    from tbpo_cli.train.memory import estimate_memory

    path = RECIPES / f"{name}.toml"
    base = load_recipe(path).model.base
    hidden, inner, layers, heads, kv_heads, vocab_size, tied = SHAPES[base]
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = load_recipe(path, (f"model.base={tmp_path}", "model.dtype=bfloat16"))
    with suppress(TbpoError):  # no server of the judge is there, or no disk for a large model
        show(recipe, sources(path), RunDir(tmp_path / "run"))
    text = capsys.readouterr().out
    missing = [line for line in text.splitlines() if line.strip().startswith("✗")]
    assert all("disk" in line or "judge" in line for line in missing), missing
    assert "memory " in text and "head " in text and "learning_rate =" in text, text
    assert text.count("WARNING") == text.count("needs more memory than"), (
        text
    )  # this machine is not what it names
    processes, device_memory = DEVICES.get(name, (1, 24e9))
    gpu = torch.device("cuda")
    for training in trainings_of(recipe):
        policy = policy_on_meta(training, recipe, gpu)
        settings = replace(
            training.settings, max_tokens_per_device=4096, activation_checkpointing=True
        )
        parts, _ = estimate_memory(policy, recipe.model, settings, gpu, processes, (0, 10**6))
        assert sum(parts.values()) < device_memory, (training.name, parts)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_shipped_recipe_can_be_changed_by_its_name_alone(name):
    for path in RECIPES.glob("*.toml"):
        if (
            name in ("sft", "orpo")
            and "beta" in path.read_text(encoding="utf-8").partition("[align.loss]")[2]
        ):
            continue  # the beta that it names is no key of theirs
        assert load_recipe(path, (f"align.loss.name={name}",)).align.loss_name == name


def test_the_papers_recipes_have_the_papers_setting():
    for name in ("ultrafeedback-mistral", "ultrafeedback-llama3"):
        recipe = load_recipe(RECIPES / f"{name}.toml")
        lora, align = recipe.model.lora, recipe.align
        assert (lora.r, lora.alpha, lora.dropout, len(lora.target_modules)) == (32, 64, 0.05, 7)
        assert (align.optimizer, align.learning_rate, align.schedule, align.warmup) == (
            "rmsprop",
            5e-7,
            "cosine",
            0.05,
        )
        assert (align.batch_pairs, align.epochs, align.max_grad_norm, align.weight_decay) == (
            32,
            1,
            10,
            0,
        )
        assert align.loss.generator == Sba(lam=0.0, scale=4.0) and recipe.data.max_length == 2048


def test_the_world_scores_what_it_says(world):
    prompt = "Put c a b in order."
    for response, correct, score in (
        ("Okay! a b c.", True, 0.9),
        ("Sure! a b c. Happy to help!", True, 1.0),
        ("Ugh! a b c. Now go away.", True, 0.3),
        ("Whatever! c a b.", False, -0.3),
        ("a b c.", True, 0.9),
        ("Sure! Sure! a b c.", False, 0.0),
        ("a b c. a b c.", False, 0.0),
        ("", False, 0.0),
    ):
        assert world.parse_response(prompt, response).correct == correct, response
        assert world.score(prompt, response) == pytest.approx(score), response


def test_every_task_of_the_world_is_read_back_from_its_text_and_solved(world):
    rng = Random(0)
    for _ in range(500):
        prompt = world.make_prompt(rng)
        assert world.parse_prompt(prompt.text) == prompt and prompt.answer not in prompt.wrong
        assert world.score(prompt.text, f"Okay! {prompt.answer}.") == pytest.approx(0.9)
        for wrong in prompt.wrong:
            assert world.score(prompt.text, f"Okay! {wrong}.") == 0


def test_the_committed_pairs_are_a_bradley_terry_draw_of_the_true_score(world):
    """Over pairs of different scores, [chosen scores higher] is on average σ(k·|difference|)."""
    rows = {
        split: [json.loads(line) for line in (QUICKSTART / f"{split}.jsonl").open()]
        for split in ("train", "eval")
    }
    assert 3_800 < len(rows["train"]) <= 4_000 and len(rows["eval"]) == 400
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["eval"]}
    gaps = [
        world.score(r["prompt"], r["chosen"]) - world.score(r["prompt"], r["rejected"])
        for r in rows["train"]
    ]
    gaps = [gap for gap in gaps if abs(gap) > 1e-9]
    right = sum(gap > 0 for gap in gaps) / len(gaps)
    expected = sum(1 / (1 + 2.718281828 ** (-world.K_LABEL * abs(gap))) for gap in gaps) / len(gaps)
    assert right == pytest.approx(expected, abs=0.02) and len(gaps) > 2_000


def test_the_base_fits_into_4_mb_and_answers_right_only_some_of_the_time(world):
    from rebuild import complete
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tbpo_cli.config.recipe import Sample

    assert (QUICKSTART / "model.safetensors").stat().st_size <= 4_000_000
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(QUICKSTART),
        AutoTokenizer.from_pretrained(QUICKSTART),
    )
    assert model.config.model_type == "llama" and model.config.max_position_embeddings == 2048
    text = "Grüße, 日本語 🙂 \x00 <|im_end|>"
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text
    prompts = [json.loads(line)["prompt"] for line in (QUICKSTART / "eval.jsonl").open()][:150]
    answers = complete(
        model.float(),
        tokenizer,
        prompts,
        Sample(temperature=1.0, top_p=1.0, max_new_tokens=48, batch_size=150),
        seed=0,
    )
    readings = [world.parse_response(p, a) for p, a in zip(prompts, answers, strict=True)]
    assert 0.2 < sum(r.correct for r in readings) / 150 < 0.6
    assert 0.25 < sum(r.rude > 0 for r in readings) / 150 < 0.55


def test_a_short_quickstart_learns(tmp_path):
    """30 steps of TBPO-A on a quarter of the pairs: held-out reward accuracy rises above chance."""
    run = run_stage("align", RECIPES / "quickstart.toml", tmp_path / "run", "align.max_steps=30")
    last = json.loads((run / "align/metrics.jsonl").read_text().splitlines()[-1])
    assert last["split"] == "eval" and last["accuracy"] > 0.6 and last["margin"] > 0


def test_alpaca_eval_runs_from_the_training_to_the_corrected_win_rate(tmp_path, world):
    """The judge knows the right answers: it takes the better one, and of two alike neither."""

    def judge(body):
        text = body["messages"][0]["content"]
        prompt = next(row["instruction"] for row in rows if row["instruction"] in text)
        a, b = (
            text.split(f"[Answer of {name}]\n")[1].split(f"\n[End of the answer of {name}]")[0]
            for name in "AB"
        )
        better = world.score(prompt, a) - world.score(prompt, b)
        return f"[[{'A' if better > 0 else 'B' if better < 0 else 'C'}]]"

    rows = json.loads((QUICKSTART / "baseline.json").read_text(encoding="utf-8"))
    for name in ("train", "eval"):
        lines = (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:32]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with chat_server(judge) as server:
        sets = (f"data.train={tmp_path / 'train.jsonl'}", f"data.eval={tmp_path / 'eval.jsonl'}")
        sets += (f"judge.endpoint={server.url}", "align.max_steps=1", "eval.gate=")
        run = run_stage("eval", RECIPES / "alpaca-eval.toml", tmp_path / "run", *sets)
        asked = {body["messages"][0]["content"] for _, _, body in server.requests}
    results = json.loads((run / "eval/results.json").read_text(encoding="utf-8"))
    (rate,) = results["win_rates"]
    assert (rate["model"], rate["against"], rate["raw"]["n"]) == ("policy", "baseline", 40)
    assert 0 < rate["length_controlled"]["value"] < 1 and rate["inconsistent"]["value"] == 0
    answers = json.loads((run / "sample/answers/run/model_outputs.json").read_text())
    expected = [
        world.score(one["instruction"], one["output"])
        - world.score(theirs["instruction"], theirs["output"])
        for one, theirs in zip(answers, rows, strict=True)
    ]
    assert rate["wins"] == sum(each > 0 for each in expected)
    assert rate["losses"] == sum(each < 0 for each in expected)
    differ = [one["output"] != theirs["output"] for one, theirs in zip(answers, rows, strict=True)]
    assert len(asked) == 2 * sum(differ), "each pair in both orders"
    assert "baseline" in results["verdict"]


def fitted(lines):
    """σ(θ) of P(win) = σ(θ + φ tanh(Δ/s)) with the faint penalty, by gradient descent."""
    values = torch.tensor([line["verdict"] for line in lines], dtype=torch.float64)
    gaps = [line["length"] - line["length_against"] for line in lines]
    lengths = torch.tensor(gaps, dtype=torch.float64)
    feature = torch.tanh(lengths / lengths.std(correction=0))
    both = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([both], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        descent.zero_grad()
        logits = both[0] + both[1] * feature
        fit = torch.nn.functional.binary_cross_entropy_with_logits(logits, values, reduction="sum")
        found = fit + 0.0005 * both[0] ** 2 + 0.005 * both[1] ** 2
        found.backward()
        return found

    descent.step(loss)
    return torch.sigmoid(both[0]).item()


def test_alpaca_eval_corrects_for_length_from_init_to_the_gate(tmp_path, tbpo):
    """The commands of its first lines, on 12 prompts and answers made here.

    The judge takes the longer answer of two, save for two prompts where it takes the shorter one.
    """
    assert tbpo("init", "alpaca-eval").returncode == 0
    own = [
        f"Say {word} {'and more ' * n}" for n, word in enumerate(("red", "green", "blue", "one"))
    ]
    own += [f"Count to {n}." for n in range(2, 10)]
    outputs = ["no " * (1 if n < 9 else 40) for n in range(len(own))]
    rows = [
        {"instruction": asked, "output": said, "generator": "made", "dataset": "d"}
        for asked, said in zip(own, outputs, strict=True)
    ]
    (tmp_path / "quickstart/baseline.json").write_text(json.dumps(rows))

    def judge(body):
        text = body["messages"][0]["content"]
        if text == "Say yes.":
            return "yes"
        a, b = (
            text.split(f"[Answer of {name}]\n")[1].split(f"\n[End of the answer of {name}]")[0]
            for name in "AB"
        )
        is_a = len(a) > len(b)
        return "[[A]]" if is_a != any(each.strip() in text for each in own[4:6]) else "[[B]]"

    for name in ("train", "eval"):
        path = tmp_path / f"quickstart/{name}.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[:32]))
    align = tbpo("align", "alpaca-eval.toml", "--set", "align.max_steps=1")
    assert align.returncode == 0, align.stderr
    with chat_server(judge) as server:
        sets = ("--set", f"judge.endpoint={server.url}", "--set", "align.max_steps=1")
        done = tbpo("eval", "alpaca-eval.toml", *sets)
    (run,) = (tmp_path / "runs").iterdir()
    results = json.loads((run / "eval/results.json").read_text())
    (rate,) = results["win_rates"]
    lines = [json.loads(line) for line in (run / "eval/verdicts.jsonl").read_text().splitlines()]
    assert (rate["against"], rate["raw"]["n"], rate["unreadable"]) == ("baseline", 12, 0)
    assert rate["raw"]["value"] == pytest.approx(sum(line["verdict"] for line in lines) / 12)
    corrected = rate["length_controlled"]
    assert corrected["value"] == pytest.approx(fitted(lines), abs=1e-4)
    assert corrected["low"] < corrected["value"] < corrected["high"]
    assert abs(corrected["value"] - rate["raw"]["value"]) > 1e-3, "length explains a part"
    passed = corrected["value"] > 0.5
    assert results["gate"] == {
        "expression": "length_controlled_win_rate > 0.5",
        "value": corrected["value"],
        "passed": passed,
        "against": "baseline",
        "judge": rate["judge"],
        "comparisons": 1,
    }
    assert done.returncode == (0 if passed else 4), done.stderr
    written = json.loads((run / f"sample/answers/{run.name}/model_outputs.json").read_text())
    assert [each["instruction"] for each in written] == own


def test_a_recipe_comes_with_the_folders_that_it_names(tbpo, tmp_path):
    assert tbpo("init", "alpaca-eval").stdout.splitlines() == [
        "wrote alpaca-eval.toml",
        "wrote quickstart",
    ]
    assert (tmp_path / "quickstart/baseline.json").exists()
    (tmp_path / "alpaca-eval.toml").unlink()
    assert tbpo("init", "alpaca-eval").stdout.splitlines() == ["wrote alpaca-eval.toml"]


def test_init_lists_the_recipes_and_writes_one_with_its_data_that_runs(tbpo, tmp_path):
    listed = tbpo("init")
    for path in RECIPES.glob("*.toml"):
        assert path.stem in listed.stdout
    assert all(len(line) <= 80 for line in listed.stdout.splitlines())
    written = tbpo("init", "quickstart")
    assert written.stdout.splitlines() == ["wrote quickstart.toml", "wrote quickstart"], (
        written.stderr
    )
    shipped = (RECIPES / "quickstart.toml").read_text().replace("recipes/quickstart", "quickstart")
    assert (tmp_path / "quickstart.toml").read_text() == shipped
    assert tbpo("prepare", "quickstart.toml").returncode == 0
