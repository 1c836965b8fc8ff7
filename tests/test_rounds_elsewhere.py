"""Rounds beyond one process and one folder: replayed pairs, the plan, two processes, the Hub, and
a server with another base.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_stage
from hub_server import connected, serve
from lora_server import lora_server
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_rounds import QUICKSTART, served, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from tbpo_cli.config.choosing import Choose
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.data.choosing import two_sigma_warning
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import json_lines
from tbpo_cli.runs.launch import Processes
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages import push
from tbpo_cli.stages.chain import run_through


def trained_on(run, number):
    """How many pairs of each round's answers a round trains on, and all that it trains on."""
    prepared = run / f"rounds/{number}/prepare"
    counts = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))["counts"]
    kept = {
        int(Path(count["source"]).parts[-3]): count["kept"].get("train", 0)
        for count in counts
        if count["key"] == "data.train"
    }
    return kept, len(PairStore(prepared / "train"))


def test_a_round_replays_the_share_of_each_earlier_ones_pairs_that_is_asked_for(tmp_path):
    path = write(tmp_path, rounds={"number": 3, "replay": 1.0})
    run = run_stage("align", path, tmp_path / "run")
    first, number = trained_on(run, 1)
    assert set(first) == {1} and number == first[1] > 0
    last, number = trained_on(run, 3)
    alone = {each: trained_on(run, each)[0][each] for each in (1, 2)}
    assert {each: last[each] for each in (1, 2)} == alone
    assert set(last) == {1, 2, 3} and number == sum(last.values())
    half = write(tmp_path, rounds={"number": 2, "replay": 0.5})
    kept, _ = trained_on(run_stage("align", half, tmp_path / "half"), 2)
    assert 0 < kept[1] < first[1], "a part of them, as the seed decides"


def test_show_says_what_rounds_cost_before_and_after_the_first_answers(tmp_path, tbpo):
    changes = {"number": 2, "prompts": 6, "held_out_prompts": 4}
    write(tmp_path, rounds=changes)
    said = " ".join(tbpo("show", "own.toml", "--run-dir", "run").stdout.split())
    assert "2 of 6, 6 prompts at most, 3 answers each: 36 answers" in said
    assert "and 36 to 4 held-out prompts; at most 1,728 tokens; 72 marks of the judge" in said
    assert "known once the first policy has answered" in said
    assert "two_sigma" not in said
    run_stage("prepare", tmp_path / "own.toml", tmp_path / "run")
    tables = ("--set", "choose.pairs=best_two_sigma")
    said = " ".join(tbpo("show", "own.toml", "--run-dir", "run", *tables).stdout.split())
    rows = json_lines(tmp_path / "run/rounds/0/mark/answers.jsonl")
    lengths = [length for row in rows for length in row["num_tokens"]]
    tokens = sum(lengths) / len(lengths) * 72
    assert f"and {tokens:,.0f} tokens, as rounds/0 took" in said
    assert '"best_two_sigma" takes the worst of 3 answers' in said


def test_rounds_say_where_two_standard_deviations_below_the_mean_are_never_met(tmp_path, tbpo):
    assert "takes the worst of 5" in two_sigma_warning(Choose("best_two_sigma"), 5)
    assert not two_sigma_warning(Choose("best_two_sigma"), 6)
    assert not two_sigma_warning(Choose("best_worst"), 5)
    write(tmp_path, choose={"pairs": "best_two_sigma"}, rounds={"number": 1})
    done = tbpo("prepare", "own.toml", "--run-dir", "run")
    assert "WARNING: choose.pairs" in " ".join((done.stdout + done.stderr).split())


def test_two_processes_give_the_answers_marks_and_pairs_of_one(tmp_path):
    path = write(tmp_path, rounds={"number": 1})
    recipe = load_recipe(path)
    for name, processes in (("one", Processes()), ("two", Processes(2, cpu=True))):
        run_dir = RunDir.of(recipe, tmp_path / name)
        run_through("prepare", recipe, run_dir, processes=processes)
    for name in ("0/mark/answers.jsonl", "1/mark/answers.jsonl", "1/prepare/train/pairs.arrow"):
        both = [(tmp_path / run / "rounds" / name).read_bytes() for run in ("one", "two")]
        assert both[0] == both[1], name
    left = [path.name for path in (tmp_path / "two/rounds").rglob("*part-*")]
    assert not left, "the parts of the processes are put together"


def logps_of(model, prompt, answer):
    """Log-probability of an answer by plain transformers, nats."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, ids[0, len(prompt) :, None]).sum())


@pytest.mark.parametrize("reference", ["first", "previous"])
def test_the_adapter_pushed_after_rounds_makes_the_last_policy_of_the_public_base(
    tmp_path, reference, monkeypatch
):
    path = write(tmp_path, rounds={"reference": reference}, align={"learning_rate": 1e-2})
    run = run_stage("align", path, tmp_path / "run")
    shutil.copytree(QUICKSTART, tmp_path / "hub/models/org/base")
    sets = ("push.repo=me/rounds", "push.base_model=org/base", "push.license=mit")
    with serve(tmp_path / "hub") as started, connected(started.address, tmp_path / "cache"):
        token = "hf_" + "w" * 30
        started.tokens[token] = "write"
        monkeypatch.setenv("HF_TOKEN", token)
        push.run(load_recipe(path, sets), RunDir(run), allow_unevaluated=True)
    pushed = tmp_path / "hub/models/me/rounds"

    def loaded():
        base = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype="float32")
        return PeftModel.from_pretrained(base, pushed).eval()

    model, tokenizer = loaded(), AutoTokenizer.from_pretrained(pushed)
    rows = json_lines(run / "rounds/2/after/sample/samples.jsonl")
    differ = 0
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        got = logps_of(model, prompt, row["token_ids"])
        assert got == pytest.approx(row["logp"], abs=1e-3)
        with model.disable_adapter():
            differ += abs(logps_of(model, prompt, row["token_ids"]) - got) > 0.01
    assert differ > len(rows) / 2, "it is not the base"


def test_a_server_with_another_base_is_noticed_before_the_first_answer(tmp_path):
    other = shutil.copytree(QUICKSTART, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator).to(value.dtype)
        for name, value in weights.items()
    }
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    with lora_server(other) as server:
        path = write(tmp_path, rounds=served(server))
        with pytest.raises(TbpoError, match="something else than this policy"):
            run_stage("align", path, tmp_path / "run")
    assert len(server.seen) == 4, "the answers that are compared, and no others"
    assert not (tmp_path / "run/rounds/0/sample/samples.jsonl").exists()
