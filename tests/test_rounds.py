"""Pairs of the policy's own answers, in rounds: files, references, resuming, what goes wrong."""

import json
import shutil
from pathlib import Path

import pytest
import tomli_w
import torch
from conftest import change_recipe, merged, run_stage, write_jsonl
from lora_server import BASE, lora_server
from safetensors.torch import load_file, save_file

from tbpo_cli.config.recipe import Recipe, load_recipe
from tbpo_cli.config.rounds import Rounds
from tbpo_cli.data.dealing import deal, question_of
from tbpo_cli.data.pairs import RejectedRow
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.serving import check_weights
from tbpo_cli.report.rounds import warnings_of
from tbpo_cli.runs.files import json_lines
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.chain import plan

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
SCORER = """
def short(prompt, answer):
    return -float(len(answer))


def sometimes(prompt, answer):
    if "Sure" in answer:
        raise ValueError("no opinion")
    return float("nan") if "Ugh" in answer else float(len(answer))


def never(prompt, answer):
    return float("nan")


def equal(prompt, answer):
    return 1.0
"""


def prompts(number):
    lines = (QUICKSTART / "train.jsonl").read_text(encoding="utf-8").splitlines()[:number]
    return [{"prompt": json.loads(line)["prompt"]} for line in lines]


def write(folder, **changes):
    """A recipe of two rounds on twenty prompts, of which four are held out; and its scorer."""
    (folder / "scorer.py").write_text(SCORER)
    write_jsonl(folder / "prompts.jsonl", prompts(20))
    tables = {
        "model": {"base": str(QUICKSTART), "lora": {"r": 4, "alpha": 8.0}},
        "data": {"train": "prompts.jsonl", "eval_fraction": 0.2},
        "judge": {"scorer": "python:scorer.py:short"},
        "rounds": {"number": 2, "answers": 3, "max_new_tokens": 24},
        "align": {"batch_pairs": 4, "max_steps": 2, "learning_rate": 1e-3, "warmup": 0.0},
        "sample": {"max_new_tokens": 16, "max_prompts": 2},
        "eval": {"diversity_prompts": 0},
    }
    path = folder / "own.toml"
    path.write_text(tomli_w.dumps(merged(tables, changes)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with own.toml and, in run/, its two rounds: made once, never changed."""
    folder = tmp_path_factory.mktemp("made")
    run_stage("align", write(folder), folder / "run")
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of these rounds, with their recipe, for one test alone."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, symlinks=True)
    # Where a file is counts where it is not in the same run: the copy is made its own.
    return tmp_path


def states(folder, *overrides):
    recipe = load_recipe(folder / "own.toml", overrides)
    return {
        name: state for name, (state, _) in plan("align", recipe, RunDir(folder / "run")).items()
    }


def weights(path):
    return (path / "adapter_model.safetensors").read_bytes()


def test_rounds_keep_all_answers_with_marks_and_end_where_results_always_are(made):
    run = made / "run"
    for number in (1, 2):
        rows = json_lines(run / f"rounds/{number}/mark/answers.jsonl")
        assert len(rows) == 8, "sixteen prompts are dealt out to two rounds"
        assert all(len(row["answers"]) == 3 for row in rows)
        of_all = [(len(a), s) for r in rows for a, s in zip(r["answers"], r["scores"], strict=True)]
        assert all(score == -length for length, score in of_all)
    asked = [
        json.dumps(row["prompt"])
        for n in (1, 2)
        for row in json_lines(run / f"rounds/{n}/mark/answers.jsonl")
    ]
    held_out = [
        json.dumps(row["prompt"]) for row in json_lines(run / "rounds/0/mark/answers.jsonl")
    ]
    assert len({*asked, *held_out}) == 20 and len(held_out) == 4
    assert weights(run / "align/adapter") == weights(run / "rounds/2/align/adapter")
    assert json.loads((run / "prepare/manifest.json").read_text())["stage"] == "prepare"


def test_the_next_round_starts_from_the_adapter_of_the_one_before(made):
    """With the reference "first", KL at the start of round 2 is that at the end of round 1."""
    kl = {}
    for number in (1, 2):
        lines = json_lines(made / f"run/rounds/{number}/align/metrics.jsonl")
        kl[number] = [line["kl"] for line in lines if line["split"] == "eval"]
    assert kl[1][0] == pytest.approx(0.0, abs=1e-6) and kl[1][-1] > 1e-6
    assert kl[2][0] == pytest.approx(kl[1][-1], rel=1e-3)


def test_with_the_previous_reference_a_round_starts_at_kl_zero(tmp_path):
    path = write(tmp_path, rounds={"reference": "previous"})
    run = run_stage("align", path, tmp_path / "run")
    lines = json_lines(run / "rounds/2/align/metrics.jsonl")
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert weights(run / "rounds/2/align/adapter") != weights(run / "rounds/1/align/adapter")


def test_the_last_adapter_loads_on_the_public_base_and_eval_follows(made, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART)
    PeftModel.from_pretrained(model, made / "run/align/adapter")
    done = run_stage("eval", made / "own.toml", made / "run")
    results = json.loads((done / "eval/results.json").read_text(encoding="utf-8"))
    assert [entry["round"] for entry in results["rounds"]] == [0, 1, 2]
    assert results["rounds"][2]["pairs"] + round(results["rounds"][2]["no_pair"] * 8) == 8
    assert 0 <= results["rounds"][2]["win_rate"]["value"] <= 1
    page = (done / "eval/report.html").read_text(encoding="utf-8")
    assert "<h2>Rounds</h2>" in page and "margin of the pairs" in page
    assert run.exists()


def test_all_weights_are_trained_in_rounds_too(tmp_path):
    path = write(tmp_path, model={"lora": None}, align={"learning_rate": 1e-4})
    run = run_stage("align", path, tmp_path / "run")
    assert (run / "align/model/model.safetensors").exists()
    kl = [line["kl"] for line in json_lines(run / "align/metrics.jsonl") if line["split"] == "eval"]
    assert kl[0] > 1e-7, "the reference is the base, and the policy starts from round 1"


def test_what_was_interrupted_goes_on_and_ends_with_the_same_bytes(made, tmp_path):
    """The second round is taken away, and a part of its samples left: as after a crash."""
    path = write(tmp_path)
    run = run_stage("align", path, tmp_path / "run")
    before = weights(run / "align/adapter")
    answers = (run / "rounds/2/mark/answers.jsonl").read_bytes()
    second = run / "rounds/2"
    for name in ("mark", "prepare", "align", "after"):
        shutil.rmtree(second / name)
    samples = (second / "sample/samples.jsonl").read_bytes()
    (second / "sample/samples.jsonl").unlink()
    (second / "sample/manifest.json").unlink()
    (second / "sample/part-0.jsonl").write_bytes(samples[: len(samples) // 2])
    run_stage("align", path, run)
    assert (run / "rounds/2/mark/answers.jsonl").read_bytes() == answers
    assert weights(run / "align/adapter") == before
    assert weights(made / "run/align/adapter") == before, "in another folder as well"


def test_another_choice_asks_and_samples_nothing_again(tmp_path):
    path = write(tmp_path, rounds={"number": 1})
    run = run_stage("align", path, tmp_path / "run")
    assert set(states(tmp_path).values()) == {"done"}
    change_recipe(path, choose={"min_margin": 3.0})
    now = states(tmp_path)
    kept = (
        "rounds/prompts",
        "rounds/0/sample",
        "rounds/0/mark",
        "rounds/1/sample",
        "rounds/1/mark",
    )
    assert {now[name] for name in kept} == {"done"} and now["rounds/1/prepare"] == "changed"
    with pytest.raises(TbpoError, match="the inputs of a stage changed"):
        run_stage("align", path, run)
    marked = (run / "rounds/1/mark/manifest.json").stat().st_mtime_ns
    run_stage("align", path, run, restart=True)
    assert (run / "rounds/1/mark/manifest.json").stat().st_mtime_ns == marked
    margins = [
        max(row["scores"]) - min(row["scores"])
        for row in json_lines(run / "rounds/1/mark/answers.jsonl")
    ]
    counts = json.loads((run / "prepare/manifest.json").read_text())["counts"]
    few = next(count for count in counts if count["key"] == "data.train")
    assert few["rejected"].get("small_margin", 0) == sum(0 < margin < 3 for margin in margins)


def test_one_more_round_leaves_the_earlier_ones_as_they_are(tmp_path):
    path = write(tmp_path, rounds={"number": 1, "prompts": 6})
    run = run_stage("align", path, tmp_path / "run")
    first = weights(run / "align/adapter")
    change_recipe(path, rounds={"number": 2})
    now = states(tmp_path)
    assert {now[f"rounds/1/{name}"] for name in ("sample", "mark", "prepare", "align")} == {"done"}
    run_stage("align", path, run)
    assert weights(run / "rounds/1/align/adapter") == first != weights(run / "align/adapter")
    change_recipe(path, rounds={"number": 1})
    run_stage("align", path, run)
    assert weights(run / "align/adapter") == first


def test_prompts_alone_with_a_judge_are_one_round(tmp_path, tbpo):
    write(tmp_path, rounds=None)
    shown = tbpo("align", "own.toml", "--run-dir", "run", "--dry-run").stdout
    assert "rounds/1/align: would run" in shown and "rounds/2" not in shown
    rows = [{**row, "chosen": "a", "rejected": "b"} for row in prompts(20)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    shown = tbpo("align", "own.toml", "--run-dir", "run", "--dry-run").stdout
    assert "rounds" not in shown, "rows with answers make pairs as always"


def test_prompts_alone_without_a_judge_are_a_message(tmp_path, tbpo):
    write(tmp_path, rounds=None, judge=None)
    said = tbpo("align", "own.toml", "--run-dir", "run").stderr
    assert "prompts without answers" in said and "[judge] and [rounds]" in said
    write(tmp_path, judge=None)
    done = tbpo("align", "own.toml", "--run-dir", "run")
    assert done.returncode == 2 and "rounds needs one judge" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": {"scorer": "python:gone.py:score"}}, "the scorer's file is not there"),
        ({"judge": {"scorer": "python:scorer.py:gone"}}, "no function gone"),
        (
            {"judge": {"scorer": None, "endpoint": "http://127.0.0.1:9/v1", "model": "judge"}},
            "no chat completion",
        ),
        (
            {"rounds": {"endpoint": "http://127.0.0.1:9/v1", "endpoint_model": "base"}},
            "no chat completion",
        ),
    ],
)
def test_a_judge_or_server_that_is_not_there_is_said_before_anything_is_sampled(
    tmp_path, tbpo, change, message
):
    """Also where another judge evaluates."""
    write(tmp_path, **merged(change, {"eval": {"judge": {"scorer": "python:scorer.py:short"}}}))
    done = tbpo("align", "own.toml", "--run-dir", "run")
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "run/rounds").exists()
    shown = tbpo("show", "own.toml", "--run-dir", "run")
    assert (
        shown.returncode == 2 and "✗" in shown.stdout and message in " ".join(shown.stdout.split())
    )


@pytest.mark.parametrize(
    ("scorer", "message"), [("never", "it returned nan"), ("equal", "no_preference")]
)
def test_a_judge_that_leaves_no_pair_is_a_message_and_loses_no_answer(tmp_path, scorer, message):
    path = write(tmp_path, judge={"scorer": f"python:scorer.py:{scorer}"})
    with pytest.raises(TbpoError, match=message):
        run_stage("align", path, tmp_path / "run")
    assert (tmp_path / "run/rounds/0/sample/samples.jsonl").exists()


def test_answers_that_the_judge_fails_for_are_counted_and_the_rest_goes_on(tmp_path):
    change = {
        "judge": {"scorer": "python:scorer.py:sometimes"},
        "rounds": {"number": 1, "answers": 5},
    }
    run = run_stage("align", write(tmp_path, **change), tmp_path / "run")
    rows = json_lines(run / "rounds/1/mark/answers.jsonl")
    for row in rows:
        for answer, score in zip(row["answers"], row["scores"], strict=True):
            assert (score is None) == ("Sure" in answer or "Ugh" in answer)
    without = json.loads((run / "rounds/1/mark/manifest.json").read_text())["num_without_mark"]
    assert without == sum(row["scores"].count(None) for row in rows) > 0


def question(number):
    return question_of({"prompt": f"question {number}"}, load_data())


def load_data():
    from tbpo_cli.config.recipe import Data, Source

    return Data((Source("/rows.jsonl"),))


def test_prompts_are_dealt_out_each_once_and_the_same_way_whatever_the_order_of_rows():
    every = [question(number) for number in range(11)]
    dealt = deal(every, every[:2], Rounds(number=3), seed=0)
    assert [len(part) for part in dealt.rounds] == [3, 3, 3]
    names = [each.prompt_hash for part in dealt.rounds for each in part]
    assert len({*names}) == 9 and not {*names} & {each.prompt_hash for each in every[:2]}
    assert deal(every[::-1], every[:2], Rounds(number=3), seed=0) == dealt
    assert deal(every, every[:2], Rounds(number=3), seed=1) != dealt
    same = deal(every, [], Rounds(number=2, prompts="same"), seed=0)
    assert same.rounds[0] == same.rounds[1] and len(same.rounds[0]) == 11
    in_turn = deal(every, [], Rounds(number=2, prompts=8), seed=0)
    assert in_turn.rounds[0] + in_turn.rounds[1][:3] == same.rounds[0]
    assert in_turn.rounds[1][3:] == same.rounds[0][:5]


@pytest.mark.parametrize(
    "row",
    [
        "red",
        {"prompt": "red"},
        {"prompt": "red", "chosen": "a", "rejected": "b"},
        {"messages": [{"role": "user", "content": "red"}]},
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "red", "answers": ["a", "b"], "scores": [1, 2]},
        {"chosen": "\n\nHuman: red\n\nAssistant: a", "rejected": "\n\nHuman: red\n\nAssistant: b"},
    ],
)
def test_the_prompt_of_any_row_counts(row):
    found = question_of(row, load_data())
    assert [(each["role"], each["content"]) for each in found.messages] == [("user", "red")]


def test_a_row_without_a_prompt_has_none():
    for row in ({"text": "red"}, {"prompt": ""}, 3):
        with pytest.raises(RejectedRow):
            question_of(row, load_data())


def entry(number, **figures):
    usual = {"mark": {"value": 1.0}, "length": {"value": 100.0}, "top": 0.1, "no_pair": 0.1}
    return {"round": number, **usual, "spread": 1.0, "kl": 0.1, **figures}


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"length": {"value": 160.0}}, "1.6 times as long"),
        ({"top": 0.7}, "the highest mark there is"),
        ({"no_pair": 0.6}, "60% of the prompts"),
        ({"spread": 0.4}, "little contrast left"),
        ({"kl": 0.6}, "KL went from 0.10 to 0.60"),
    ],
)
def test_the_known_failures_of_rounds_are_warned_of(last, words):
    (said,) = warnings_of([entry(0), entry(1), entry(2, **last)])
    assert words in said
    assert not warnings_of([entry(0), entry(1), entry(2)])


def test_rounds_cannot_stand_beside_sft(tmp_path):
    with pytest.raises(TbpoError) as error:
        load_recipe(write(tmp_path, sft={}))
    assert "cannot stand beside [rounds]" in error.value.expected
    assert isinstance(load_recipe(write(tmp_path)), Recipe)


def served(server, **more):
    return {"endpoint": server.url, "endpoint_model": BASE, "number": 2, **more}


def test_the_adapter_of_each_round_answers_from_a_server_that_loads_it(tmp_path):
    with lora_server(QUICKSTART) as server:
        path = write(tmp_path, rounds=served(server), align={"learning_rate": 1e-2})
        run = run_stage("align", path, tmp_path / "run")
    asked = [name for what, name in server.seen if what == "complete"]
    compared = 4 + 8  # answers of the base, before the held-out prompts and before round 1
    assert asked[: (4 + 8) * 3 + compared] == [BASE] * 48, "the first policy is the base"
    names = [name for what, name in server.seen if what == "load_lora_adapter"]
    assert len(names) == 3 and len({*names}) == 2, "after round 1, for round 2, after round 2"
    assert not server.loaded, "at the end nothing of it is left there"
    assert asked.count(names[0]) == (4 + 8) * 3 + 4 + 8, "answers, and eight to compare at most"
    assert len(json_lines(run / "rounds/2/mark/answers.jsonl")) == 8


def test_a_server_that_answers_with_the_base_is_noticed(tmp_path):
    change = {"align": {"learning_rate": 3e-2, "max_steps": 6}}
    with lora_server(QUICKSTART, ignores=True) as server:
        path = write(tmp_path, rounds=served(server), **change)
        with pytest.raises(TbpoError, match="the base, without the adapter"):
            run_stage("align", path, tmp_path / "run")


@pytest.mark.parametrize(
    ("policy", "base", "what"),
    [
        (0.01, 0.005, ""),
        (0.2, 0.15, ""),
        (0.03, 0.01, "the base, without the adapter"),
        (0.2, 0.05, "something else than this policy"),  # as an adapter of an earlier round
        (0.3, 0.4, "something else than this policy"),
    ],
)
def test_what_a_server_answers_with_is_named_by_what_it_is_close_to(policy, base, what):
    differences = {"policy": [policy, policy], "base": [base]}
    if what:
        with pytest.raises(TbpoError, match=f"answers with {what}"):
            check_weights(differences, "http://server/v1", "tbpo-1")
    else:
        check_weights(differences, "http://server/v1", "tbpo-1")


def test_two_judges_of_rounds_are_named(tmp_path):
    path = write(tmp_path, judge={"reward_model": "org/reward"})
    with pytest.raises(TbpoError, match=r"\[judge\] names 2: scorer, reward_model"):
        load_recipe(path)


def test_a_server_that_cannot_load_the_adapter_is_a_message(tmp_path):
    with lora_server(QUICKSTART) as server:
        elsewhere = served(server, endpoint_folder="/not/there")
        path = write(tmp_path, rounds=elsewhere)
        with pytest.raises(TbpoError, match="does not load the adapter") as error:
            run_stage("align", path, tmp_path / "run")
    assert "rounds.endpoint_folder" in error.value.fix


def test_a_server_that_dies_in_the_middle_loses_nothing(tmp_path):
    with lora_server(QUICKSTART, dies_after=32) as server:
        path = write(tmp_path, rounds=served(server, number=1, batch_size=1))
        with pytest.raises(TbpoError, match="OPENAI_API_KEY"):
            run_stage("align", path, tmp_path / "run")
    with lora_server(QUICKSTART) as server:
        change_recipe(path, rounds={"endpoint": server.url})
        run = run_stage("align", path, tmp_path / "run")
    base = [name for what, name in server.seen if what == "complete" and name == BASE]
    compared, answered = 8, 32 - (4 + 4 * 3) - 8  # of round 1, before the server died
    assert len(base) == compared + 16 * 3 - answered, "what was answered is not asked for again"
    assert (run / "align/adapter/adapter_model.safetensors").exists()


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
