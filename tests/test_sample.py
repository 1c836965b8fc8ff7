"""Completions: each draws its own random numbers, an interrupted stage goes on, processes share
the prompts.
"""

import json
import shutil

import pytest
import torch
from conftest import run_stage, write_jsonl, write_recipe
from judge_server import chat_completion, chat_server
from transformers import AutoModelForCausalLM

from tbpo_cli.config.recipe import Sample, load_recipe
from tbpo_cli.data.prompts import prompt_of
from tbpo_cli.data.sources import Row
from tbpo_cli.data.templates import Chat
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.answer_files import read_answers
from tbpo_cli.evaluation.answers import question_id
from tbpo_cli.model.generate import generate
from tbpo_cli.model.together import Together
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.sample import answer

SHORT = (
    "align.max_steps=2",
    "sample.max_new_tokens=8",
    "sample.temperature=1.0",
    "sample.top_p=1.0",
)


@pytest.fixture(scope="module")
def model(base):
    return AutoModelForCausalLM.from_pretrained(base)


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]


def sampled(model, rows, **settings):
    given = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, **settings}
    return generate(
        model, [PROMPTS[row] for row in rows], [100 + row for row in rows], Sample(**given), [2]
    )


def test_a_completion_depends_on_its_own_seed_and_not_on_its_batch(model):
    together = sampled(model, range(4))
    alone = [sampled(model, [row])[0] for row in range(4)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert (
        sampled(model, [0])[0].token_ids
        != generate(
            model, PROMPTS[:1], [7], Sample(temperature=1.0, top_p=1.0, max_new_tokens=12), [2]
        )[0].token_ids
    )


def test_a_batch_that_has_ended_goes_on_until_those_of_other_processes_have(model):
    """Each pass of sharded weights is made by all; the answer is the same."""
    greedy = Sample(temperature=0.0, max_new_tokens=12)
    first = generate(model, PROMPTS[:1], [1], greedy, [2])[0].token_ids[0]
    others = iter([True] * 4 + [False] * 8)  # whether another process has rows that go on
    together = Together(gather=lambda own: [own, next(others)])
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    alone = generate(model, PROMPTS[:1], [1], greedy, [first])
    num_alone = len(passes)
    both = generate(model, PROMPTS[:1], [1], greedy, [first], together=together)
    hook.remove()
    assert (num_alone, len(passes) - num_alone) == (1, 5)
    assert both[0].token_ids == alone[0].token_ids == (first,)


def test_the_log_probability_is_that_of_the_tokens_under_the_model(model):
    for completion, prompt in zip(
        sampled(model, range(4), temperature=0.7, top_p=0.9), PROMPTS, strict=True
    ):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logps = model(input_ids=ids).logits.detach()[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, ids[0, len(prompt) :, None]).sum()
        assert completion.logp == pytest.approx(float(expected), rel=1e-4)


def test_greedy_completions_are_those_of_the_library(model):
    for completion, prompt in zip(sampled(model, range(4), temperature=0.0), PROMPTS, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        assert list(completion.token_ids) == expected[0, len(prompt) :].tolist()


def test_the_draws_have_the_models_probabilities(model):
    """4,000 draws of one token: the frequencies are the probabilities within 5 standard
    deviations.
    """
    settings = Sample(temperature=1.0, top_p=1.0, max_new_tokens=1)
    drawn = [
        c.token_ids[0] for c in generate(model, [[5, 6, 7]] * 4000, range(4000), settings, [2])
    ]
    probabilities = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probabilities))
    deviation = (4000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 4000 * probabilities).abs() <= 5 * deviation + 1).all()


def test_top_p_leaves_out_what_is_unlikely(model):
    settings = Sample(temperature=1.0, top_p=0.05, max_new_tokens=1)
    drawn = {c.token_ids[0] for c in generate(model, [[5, 6, 7]] * 200, range(200), settings, [2])}
    probabilities, order = (
        model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1).sort(descending=True)
    )
    allowed = order[: int((probabilities.cumsum(0) < 0.05).sum()) + 1].tolist()
    assert drawn <= set(allowed)


def test_the_end_of_the_turn_is_that_of_the_pairs(tokenizer):
    assert Chat(tokenizer, "2026-01-01").end_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, base, rows):
    folder = tmp_path_factory.mktemp("aligned")
    return run_stage(
        "align", write_recipe(folder / "tiny.toml", base, rows), folder / "run", *SHORT
    )


@pytest.fixture
def run_dir(aligned, tmp_path):
    return shutil.copytree(aligned, tmp_path / "run")


def read(run):
    return [
        json.loads(line)
        for line in (run / "sample/samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_sample_answers_the_held_out_prompts_by_policy_and_reference(
    recipe_file, run_dir, tmp_path, capsys
):
    other = shutil.copytree(run_dir, tmp_path / "other")
    run = run_stage("sample", recipe_file, run_dir, *SHORT, "sample.num_samples=2")
    samples = read(run)
    assert len(samples) == 8 * 2 * 2, "8 prompts, 2 samples, 2 models"
    first = samples[0]
    assert (
        first["prompt"].endswith("<|im_start|>assistant\n")
        and first["settings"]["temperature"] == 1.0
    )
    assert first["num_tokens"] == len(first["token_ids"]) <= 8 and first["logp"] < 0
    assert {sample["finish_reason"] for sample in samples} <= {"stop", "length"}
    assert "policy: " in capsys.readouterr().out
    run_stage("sample", recipe_file, other, *SHORT, "sample.num_samples=2", "sample.batch_size=3")
    assert [s["token_ids"] for s in read(other)] == [s["token_ids"] for s in samples]


def test_an_interrupted_sample_goes_on_where_it_stopped(recipe_file, run_dir):
    run = run_stage("sample", recipe_file, run_dir, *SHORT)
    whole = read(run)
    (run / "sample/manifest.json").unlink()
    (run / "sample/samples.jsonl").unlink()
    marked = [json.dumps(sample | {"completion": "kept"}) + "\n" for sample in whole[:5]]
    (run / "sample/part-0.jsonl").write_text(
        "".join(marked) + json.dumps(whole[5])[:-9], encoding="utf-8"
    )
    run_stage("sample", recipe_file, run, *SHORT)
    again = read(run)
    assert [sample["completion"] for sample in again[:5]] == ["kept"] * 5, (
        "what was there is not sampled again"
    )
    assert again[5:] == whole[5:], (
        "also the last bits of log-probabilities: the batches are the same"
    )
    assert not list((run / "sample").glob("part-*"))


def test_prompts_come_from_a_file_as_text_messages_or_lines(recipe_file, run_dir, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "other")
    turns = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "dog"},
    ]
    rows = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": "red"}, {"prompt": turns}, {"messages": turns[:1]}]
    )
    run = run_stage("sample", recipe_file, run_dir, *SHORT, f"sample.prompts={rows}")
    prompts = [sample["prompt"] for sample in read(run)[::2]]
    assert (
        prompts[0] == prompts[2]
        and "blue<|im_end|>" in prompts[1]
        and prompts[1].count("<|im_start|>") == 4
    )
    lines = tmp_path / "prompts.txt"
    lines.write_text("red\n\nblue\n")
    run_stage(
        "sample", recipe_file, other, *SHORT, f"sample.prompts={lines}", "sample.max_prompts=1"
    )
    assert {sample["prompt"] for sample in read(other)} == {prompts[0]}


BENCHMARKS = {
    "alpaca_eval.json": (
        {"dataset": "d", "instruction": "red", "output": "theirs", "generator": "baseline"},
        {"dataset": "d", "instruction": "one red"},
    ),
    "question.jsonl": (
        {"question_id": "q1", "category": "arena-hard-v0.1", "turns": [{"content": "red"}]},
        {"question_id": "q2", "category": "arena-hard-v0.1", "turns": [{"content": "one red"}]},
    ),
    "question-v2.jsonl": (
        {"uid": "u1", "category": "hard_prompt", "prompt": "red"},
        {"uid": "u2", "category": "hard_prompt", "prompt": "one red"},
    ),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_are_answered_in_their_own_format(recipe_file, run_dir, tmp_path, name, capsys):
    rows = BENCHMARKS[name]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(json.dumps(rows) if name.endswith(".json") else lines)
    prompts = (f"sample.prompts={tmp_path / name}", "sample.num_samples=2")
    folder = run_stage("sample", recipe_file, run_dir, *SHORT, *prompts) / "sample"
    first = [one for one in read(run_dir) if (one["model"], one["sample"]) == ("policy", 0)]
    texts = [one["completion"] for one in first]
    written = sorted(path for path in folder.glob("answers/**/*") if path.is_file())
    assert all(
        f"tools: {path}" in capsys.readouterr().err.replace("\n", "") for path in written[:1]
    )
    if name == "alpaca_eval.json":
        assert [path.parent.name for path in written] == ["run", "run-reference"]
        assert json.loads(written[0].read_text()) == [
            {"dataset": "d", "instruction": asked, "output": text, "generator": "run"}
            for asked, text in zip(("red", "one red"), texts, strict=True)
        ]
    else:
        assert [path.name for path in written] == ["run-reference.jsonl", "run.jsonl"]
        answers = [json.loads(line) for line in written[1].read_text().splitlines()]
        assert [question_id(each) for each in answers] == [question_id(row) for row in rows]
        keys = {"uid", "ans_id", "model", "messages"}
        if name == "question.jsonl":
            keys = {"question_id", "answer_id", "model_id", "choices"}
            assert answers[1]["choices"] == [{"index": 0, "turns": [{"content": texts[1]}]}]
        assert all(each.keys() == keys for each in answers)
    known = read_answers(str(written[-1] if name != "alpaca_eval.json" else written[0]))
    answers = [*(known.by_id or known.by_conversation or known.by_text).values()]
    assert answers == [text.strip() for text in texts]
    assert RunDir(run_dir).damage("sample") == []


def test_a_question_of_several_turns_is_a_message(recipe_file, run_dir, tmp_path):
    rows = write_jsonl(tmp_path / "mt_bench.jsonl", [{"question_id": 81, "turns": ["a", "b"]}])
    with pytest.raises(TbpoError, match="turns is not a list with one question"):
        run_stage("sample", recipe_file, run_dir, *SHORT, f"sample.prompts={rows}")


@pytest.mark.parametrize(
    "row", [{"text": "x"}, {"prompt": ""}, {"prompt": 3}, {"messages": [{"role": "x"}]}]
)
def test_a_line_that_is_no_prompt_is_a_message(recipe_file, run_dir, tmp_path, row):
    rows = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "red"}, row])
    with pytest.raises(TbpoError, match="a prompt cannot be used") as error:
        run_stage("sample", recipe_file, run_dir, *SHORT, f"sample.prompts={rows}")
    assert "row 2" in error.value.where


def test_a_prompt_that_the_template_refuses_is_a_message(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    with pytest.raises(TbpoError, match=r"a prompt cannot be used: template_error .*no such role"):
        prompt_of(Row("the command line", 1, "red"), Chat(tokenizer, "2026-01-01"))


def test_a_file_without_a_prompt_is_a_message(recipe_file, run_dir, tmp_path):
    for content, message in (
        (b"\n\n", "there are no prompts to answer"),
        (b"red\n\xe9\n", "the line is not in UTF-8"),
    ):
        (tmp_path / "prompts.txt").write_bytes(content)
        with pytest.raises(TbpoError, match=message):
            run_stage(
                "sample",
                recipe_file,
                run_dir,
                *SHORT,
                f"sample.prompts={tmp_path / 'prompts.txt'}",
                restart=True,
            )


def test_a_prompt_of_the_command_line_is_answered_and_nothing_is_kept(
    recipe_file, run_dir, tmp_path, capsys
):
    recipe = load_recipe(recipe_file, SHORT)
    answer(recipe, RunDir(run_dir), ["red dog", "blue"])
    shown = capsys.readouterr().out
    assert (
        shown.count("policy: ") == shown.count("reference: ") == 2 and "red dog<|im_end|>" in shown
    )
    assert not (run_dir / "sample").exists()
    with pytest.raises(TbpoError, match="no aligned policy"):
        answer(recipe, RunDir(tmp_path / "none"), ["red"])


def test_processes_share_the_prompts(recipe_file, run_dir, tmp_path, tbpo):
    two = shutil.copytree(run_dir, tmp_path / "two")
    sets = [part for one in SHORT for part in ("--set", one)]
    done = tbpo("sample", recipe_file, "--run-dir", two, "--gpus", "2", "--cpu", *sets)
    assert done.returncode == 0, done.stderr
    alone = run_stage("sample", recipe_file, run_dir, *SHORT)
    assert [s["token_ids"] for s in read(two)] == [s["token_ids"] for s in read(alone)]


def test_a_prompt_of_the_command_line_may_be_a_conversation(recipe_file, run_dir, tbpo):
    turns = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "dog"},
    ]
    given = "\n".join(
        [json.dumps({"messages": turns}), json.dumps({"prompt": turns}), '{"a": 1}', "cat\n"]
    )
    sets = [part for one in SHORT for part in ("--set", one)]
    done = tbpo("sample", recipe_file, "--run-dir", run_dir, "--prompt", "-", *sets, stdin=given)
    assert done.returncode == 0, done.stderr
    whole = (
        "user\nred<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>\n"
        "<|im_start|>user\ndog<|im_end|>"
    )
    assert (
        done.stdout.count(whole) == 2
        and '{"a": 1}<|im_end|>' in done.stdout
        and "cat<|im_end|>" in done.stdout
    )
    with pytest.raises(TbpoError, match="a prompt cannot be used"):
        answer(load_recipe(recipe_file, SHORT), RunDir(run_dir), ['{"messages": [{"role": "x"}]}'])


def echo(body):
    """What a served policy says: the last word it was given, and the seed."""
    logprobs = (
        {"content": [{"logprob": -0.5}, {"logprob": -0.25}]} if body.get("logprobs") else None
    )
    text = f"{body['messages'][-1]['content'].split()[-1]} {body['seed'] % 1000}"
    return chat_completion(text, logprobs=logprobs)


def served(server, *more):
    return (
        *SHORT,
        f"sample.endpoint={server.url}",
        "sample.endpoint_model=mine",
        "sample.num_samples=2",
        *more,
    )


def test_the_policy_can_be_served_while_the_reference_is_run_here(recipe_file, run_dir, tokenizer):
    with chat_server(echo) as server:
        run_stage("sample", recipe_file, run_dir, *served(server, "sample.batch_size=3"))
    samples = read(run_dir)
    policy = [sample for sample in samples if sample["model"] == "policy"]
    assert (
        len(policy) == len(samples) / 2 == 16 == len(server.requests) and server.most_at_once <= 3
    )
    assert len({sample["completion"] for sample in policy}) == 16, (
        "a seed for each prompt and sample"
    )
    path, _, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "mine" and body["max_tokens"] == 8
    assert (body["temperature"], body["top_p"]) == (1.0, 1.0)
    for sample in policy:
        assert sample["completion"].split()[0] == sample["messages"][-1]["content"].split()[-1]
        assert sample["logp"] == -0.75 and sample["finish_reason"] == "stop"
        assert tokenizer.decode(sample["token_ids"]) == sample["completion"] + "<|im_end|>"
        assert sample["num_tokens"] == len(sample["token_ids"])


def test_a_served_sample_goes_on_where_it_stopped_at_another_address_too(recipe_file, run_dir):
    def breaks(body):
        return (401, "your time is up") if len(server.requests) > 10 else echo(body)

    with chat_server(breaks) as server:
        with pytest.raises(TbpoError, match="OPENAI_API_KEY"):
            run_stage(
                "sample",
                recipe_file,
                run_dir,
                *served(server, "sample.models=['policy']", "sample.batch_size=1"),
            )
        assert len((run_dir / "sample/part-0.jsonl").read_text().splitlines()) == 10
    with chat_server(echo) as server:
        run_stage("sample", recipe_file, run_dir, *served(server, "sample.models=['policy']"))
        assert len(server.requests) == 6 and len(read(run_dir)) == 16


def test_a_server_without_log_probabilities_is_asked_without_them(recipe_file, run_dir):
    def refuses(body):
        return (400, "logprobs are not supported") if "logprobs" in body else echo(body)

    with chat_server(refuses) as server:
        run_stage("sample", recipe_file, run_dir, *served(server, "sample.models=['policy']"))
    assert {sample["logp"] for sample in read(run_dir)} == {None} and len(server.requests) == 32
    with (
        chat_server(lambda body: (400, "too long")) as server,
        pytest.raises(TbpoError, match="400 too long"),
    ):
        run_stage(
            "sample",
            recipe_file,
            run_dir,
            *served(server, "sample.models=['policy']"),
            restart=True,
        )


def test_a_served_policy_answers_the_command_line(recipe_file, run_dir, capsys):
    with chat_server(echo) as server:
        answer(
            load_recipe(recipe_file, served(server, "sample.models=['policy']")),
            RunDir(run_dir),
            ["red [bold]dog"],
        )
    assert "policy: [bold]dog " in capsys.readouterr().out
    with pytest.raises(TbpoError, match="endpoint is not possible") as error:
        load_recipe(recipe_file, ("sample.endpoint=http://127.0.0.1:9",))
    assert "must be given together" in error.value.expected
