"""What rounds leave: pairs trained on again, the adapter that is pushed, the plan's numbers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import command, merged, run_stage
from judge_server import chat_server
from test_rounds import QUICKSTART, write

from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.data.store import PairStore
from tbpo_cli.evaluation.rounds import rounds_of
from tbpo_cli.report.rounds import panels_of, texts_of, warnings_of
from tbpo_cli.runs.files import json_lines
from tbpo_cli.runs.launch import Processes
from tbpo_cli.runs.rounds import place_of_round
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages import mark, prepare, sample

BETA = 0.5
SETTINGS = {
    "align": {"learning_rate": 1e-2, "loss": {"name": "tbpo_a", "beta": BETA}},
    "rounds": {"number": 3, "prompts": 8, "replay": 0.5, "max_new_tokens": 16},
}


@pytest.fixture(scope="module", params=["first", "previous"])
def made(request, tmp_path_factory):
    """(folder with own.toml and the three rounds in run/, the reference of the rounds)."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = merged(SETTINGS, {"rounds": {"reference": request.param}})
    run_stage("align", write(folder, **changes), folder / "run")
    return folder, request.param


def ids_of(folder):
    return PairStore(folder / "prepare/train").table["pair_id"].to_pylist()


def replayed(made, folder, share, seed, number=3):
    """The ids of a round's training pairs, and of those of rounds 1, 2 that were made anew."""
    recipe = load_recipe(made / "own.toml", (f"rounds.replay={share}", f"run.seed={seed}"))
    place = place_of_round(recipe, RunDir(made / "run"), number)
    run_dir = RunDir(folder)
    prepare.run(replace(place.recipe, run=recipe.run), run_dir)
    return ids_of(folder)


def test_a_share_of_each_earlier_rounds_pairs_is_trained_on_again_by_seed(made, tmp_path):
    folder, _ = made
    rounds = folder / "run/rounds"
    own = {
        number: replayed(folder, tmp_path / f"own-{number}", 0.0, 0, number) for number in (1, 2, 3)
    }
    assert ids_of(rounds / "1") == own[1], "there is no round before the first"
    assert len(own[2]) > 4 and not {*own[1]} & {*own[2]}
    assert ids_of(rounds / "2")[: len(own[2])] == own[2]
    again = ids_of(rounds / "2")[len(own[2]) :]
    assert 0 < len(again) < len(own[1]) and set(again) < set(own[1])
    last = ids_of(rounds / "3")
    assert last[: len(own[3])] == own[3] and len(last) == len({*last})
    whole = replayed(folder, tmp_path / "whole", 1.0, 0)
    assert set(whole) == {*own[3], *own[1], *own[2]}, "all pairs of all rounds, once"
    half = set(last[len(own[3]) :])
    assert {*half} & {*own[1]} and {*half} & {*own[2]}, "of each earlier round"
    assert half == {*replayed(folder, tmp_path / "same", 0.5, 0)} - {*own[3]}
    assert half != {*replayed(folder, tmp_path / "other", 0.5, 1)} - {*own[3]}
    counts = json.loads((rounds / "3/prepare/manifest.json").read_text())["counts"]
    kept = [count["kept"]["train"] for count in counts if count["key"] == "data.train"]
    left = [count["noted"].get("unsampled", 0) for count in counts if count["key"] == "data.train"]
    assert sum(kept) == len(last) and kept[0] == len(own[3]) and left[0] == 0
    assert sum(kept) + sum(left) == len(whole) and all(left[1:])


def logps(model, pairs):
    """(pairs, 2): the log-probabilities of chosen and rejected, each in a pass of its own."""
    found = []
    for pair in pairs:
        prompt = pair["prompt_ids"]
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([prompt + pair[side]])
            with torch.no_grad():
                of_tokens = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(float(of_tokens.gather(1, ids[0, len(prompt) :, None]).sum()))
    return torch.tensor(found, dtype=torch.float64).view(-1, 2)


def with_adapter(adapter=None):
    """The public base as anybody loads it, with an adapter or without."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def test_what_is_pushed_is_the_last_policy_and_its_reference_is_that_of_the_recipe(made):
    """Of the pushed adapter, and of the reference, by transformers and peft alone."""
    folder, reference = made
    done = command("push", folder / "own.toml", "--run-dir", "run", "--to", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    pairs = PairStore(folder / "run/rounds/3/prepare/eval").table.to_pylist()
    policy = logps(with_adapter(folder / "out"), pairs)
    begun = logps(with_adapter(folder / "run/rounds/2/align/adapter"), pairs)
    refs = {"first": logps(with_adapter(), pairs), "previous": begun}
    margins = {name: float((policy - ref).diff().mean()) * -BETA for name, ref in refs.items()}
    assert abs(margins["first"] - margins["previous"]) > 1e-3, "they can be told apart"
    lines = json_lines(folder / "run/align/metrics.jsonl")
    start, *_, end = [line for line in lines if line["split"] == "eval"]
    assert end["margin"] == pytest.approx(margins[reference], abs=1e-5)
    assert start["margin"] == pytest.approx(
        float((begun - refs[reference]).diff().mean()) * -BETA, abs=1e-5
    )
    lengths = torch.tensor([len(pair["chosen_ids"]) for pair in pairs])
    of_token = float(policy[:, 0].sum() / lengths.sum())
    assert end["logps_chosen"] == pytest.approx(of_token, abs=1e-5)


def planned(shown):
    text = " ".join(shown.split())
    return text[text.index("rounds 2 of") :]


def test_the_plan_counts_answers_marks_and_requests_as_they_come(tmp_path, tbpo):
    """Of two rounds, before anything ran and after all has, with every answer asked for twice."""
    with chat_server(lambda body: f"[[{1 + len(body['messages'][0]['content']) % 9}]]") as server:
        judge = {"scorer": None, "endpoint": server.url, "model": "judge", "repeats": 2}
        judge["body"] = {"temperature": 0.7, "max_tokens": 64}
        counts = {"prompts": 5, "held_out_prompts": 4, "max_new_tokens": 16}
        write(tmp_path, judge=judge, rounds=counts)
        shown = planned(tbpo("show", "own.toml", "--run-dir", "run").stdout)
        expected = (
            "rounds 2 of at most 5 prompts each; 3 answers to a prompt: at most 30 answers to "
            "train on answers at most 36 more, for the report: the first policy, and that of each "
            "round, answers 4 held-out prompts 3 times cost at most 1,056 tokens of answers; "
            "at most 66 marks of the judge, at most 132 requests"
        )
        assert shown.startswith(expected)
        before = len(server.requests)  # a check of `show` asks as well
        done = tbpo("align", "own.toml", "--run-dir", "run")
        assert done.returncode == 0, done.stderr
        num_asked = len(server.requests) - before
        again = planned(tbpo("show", "own.toml", "--run-dir", "run").stdout)
    samples = [
        row
        for path in (tmp_path / "run").glob("rounds/*/sample/samples.jsonl")
        for row in json_lines(path)
    ]
    held_out = [
        row
        for path in (tmp_path / "run").glob("rounds/*/after/sample/samples.jsonl")
        for row in json_lines(path)
    ]
    assert len(samples) + len(held_out) == 66 and len(held_out) == 24
    known = expected.replace("at most ", "").replace("cost 1", "cost at most 1")
    assert again.startswith(known.replace("judge, 132", "judge, at most 132"))
    texts = {(str(row["messages"]), row["completion"]) for row in samples + held_out}
    num_checks = 1  # that the server answers, before anything is sampled
    assert num_asked - num_checks == 2 * len({each for each in texts if each[1].strip()}) <= 132


def test_two_processes_write_the_answers_and_marks_of_one(made, tmp_path):
    """Those of round 2, which the adapter of round 1 gives."""
    folder, _ = made
    recipe = load_recipe(folder / "own.toml")
    place = place_of_round(recipe, RunDir(folder / "run"), 2)
    two = RunDir(tmp_path / "two")
    sample.run(place.recipe, two, Processes(2, True))
    mark.run(place.recipe, two, Processes(2, True))
    answers = (folder / "run/rounds/2/mark/answers.jsonl").read_bytes()
    assert (two.path / "mark/answers.jsonl").read_bytes() == answers
    assert len(answers.splitlines()) == 8


@pytest.mark.parametrize(("answers", "is_said"), [(5, True), (6, False)])
def test_two_sigma_of_fewer_than_six_answers_is_said_before_anything_is_sampled(
    tmp_path, tbpo, answers, is_said
):
    choose = {"pairs": "best_two_sigma"}
    judge = {"scorer": "python:scorer.py:never"}  # which ends the command early
    rounds = {"answers": answers, "held_out_prompts": 1, "max_new_tokens": 4}
    write(tmp_path, choose=choose, judge=judge, rounds=rounds)
    sentence = f'"best_two_sigma" takes the worst of {answers} answers, as "best_worst" does'
    shown = " ".join(tbpo("show", "own.toml", "--run-dir", "run").stdout.split())
    assert (sentence in shown) == is_said
    said = " ".join(tbpo("align", "own.toml", "--run-dir", "run").stderr.split())
    assert (sentence in said.split("--- rounds/prompts")[0]) == is_said
    assert ("rounds.answers = 8 or more" in said) == is_said


def test_the_margin_of_a_rounds_pairs_is_that_of_its_own(made):
    """And not of the earlier ones' that are trained on again."""
    folder, _ = made
    (*_, last) = rounds_of(load_recipe(folder / "own.toml"), RunDir(folder / "run"))
    own = []
    for row in json_lines(folder / "run/rounds/3/mark/answers.jsonl"):
        of_whole = [m for m, cut in zip(row["scores"], row["truncated"], strict=True) if not cut]
        best = max(of_whole, default=-math.inf)
        own += [best - min(row["scores"])] if best > min(row["scores"]) else []
    assert last["pairs"] == len(own)
    assert last["pair_margin"] == pytest.approx(sum(own) / len(own))


def test_report_and_show_name_the_policy_that_kl_is_measured_from(made, tbpo):
    folder, reference = made
    entries = rounds_of(load_recipe(folder / "own.toml"), RunDir(folder / "run"))
    (heading,) = [each for each in texts_of(entries)[0] if each.startswith("KL")]
    assert (
        heading == {"first": "KL from the first", "previous": "KL from the round before"}[reference]
    )
    assert heading in [panel.title for panel in panels_of(entries)]
    far = [*entries[:2], entries[2] | {"kl": 0.1}, entries[3] | {"kl": 0.9}]
    (said,) = [each for each in warnings_of(far) if each.startswith("KL went")]
    assert ("rounds.reference" in said) == (reference == "previous")
    path = folder / "own.toml"
    shown = " ".join(tbpo("show", str(path), "--run-dir", str(folder / "run")).stdout.split())
    words = {
        "first": 'with the adapter off, in every round (rounds.reference = "first")',
        "previous": "in round 1; in each later one the policy of the round before, frozen",
    }
    assert words[reference] in shown
