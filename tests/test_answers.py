"""Files of answers to compare with: their formats, their faults, and which prompts they answer."""

import json

import pytest
from conftest import run_stage, write_jsonl

from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.answer_files import Answers, Question, answers_to, read_answers
from tbpo_cli.evaluation.answers import names_of_answers, question_id
from tbpo_cli.evaluation.measures import labels


def user(*texts):
    """A conversation in which the user and the assistant take turns."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def questions(*conversations):
    return {f"p{number}": Question(user(*texts)) for number, texts in enumerate(conversations)}


ONE = Question(user("one?"), "u")
ANSWERS = {
    "outputs.json": [{"instruction": " one? ", "output": " 1 ", "generator": "x"}],
    "inputs.json": [{"instruction": "one?", "input": "", "output": "1"}],
    "lines.jsonl": {"prompt": "one?", "completion": "1"},
    "bom.jsonl": {"prompt": "one?", "output": "1"},
    "chats.jsonl": {"prompt": user("one?"), "completion": [{"role": "assistant", "content": "1"}]},
    "arena.jsonl": {"uid": "u", "messages": [
        {"role": "user", "content": "one?"}, {"role": "assistant", "content": {"answer": "1"}},
    ]},
    "arena-0.1.jsonl": {"question_id": "u", "choices": [{"turns": [{"content": " 1 "}]}]},
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_read_in_the_formats_of_published_baselines(tmp_path, name):
    encoding = "utf-8-sig" if name == "bom.jsonl" else "utf-8"
    (tmp_path / name).write_text(json.dumps(ANSWERS[name]), encoding=encoding)
    answers = read_answers(str(tmp_path / name))
    assert answers_to(answers, {"p": ONE})[0] == {"p": "1"}


def test_a_question_has_the_id_of_either_version_of_arena_hard():
    assert question_id({"question_id": 81}) == "81" and question_id({"prompt": "one?"}) == ""


GOOD = {"prompt": "one?", "completion": "1"}
BAD = [
    ('{"prompt": "x", "comp', "line 2 is not JSON"),
    ({"prompt": "two?"}, 'it has no "output" or "completion", but prompt'),
    ({"question": "two?", "output": "2"}, 'it has no "instruction" or "prompt", but question'),
    ({"prompt": "two?", "completion": None}, 'its "completion" is null'),
    ({"prompt": 3, "completion": "x"}, '"prompt" has 3, which is no text'),
    ({"prompt": "two?", "completion": 2}, '"completion" has 2, which is no text'),
    ({"prompt": "two?", "output": "\ud83d"}, '"output" has half of a surrogate pair'),
    ({"messages": user("two?")}, '"messages" must be a prompt, and the answer of the assistant'),
    ({"messages": []}, '"messages" is no list of messages'),
    ({"messages": [{"content": "x"}]}, 'message 1 of "messages" has no role or no content'),
    ({"question_id": 1, "choices": []}, '"choices" must be'),
    ({"choices": [{"turns": [{"content": "x"}]}]}, '"choices" stands without a "question_id"'),
    (["two?", "2"], "is no object with columns"),
    ({"prompt": "one?", "completion": "2"}, "another answer than an earlier row to 'one?'"),
]


@pytest.mark.parametrize(("row", "what"), BAD)
@pytest.mark.parametrize("as_list", [False, True])
def test_a_row_that_is_no_answer_is_named_with_its_file_and_number(tmp_path, row, what, as_list):
    text = row if isinstance(row, str) else json.dumps(row)
    rows = [json.dumps(GOOD), text]
    file = tmp_path / "bad.json"
    file.write_text(f"[{rows[0]},\n{rows[1]}]" if as_list else "\n".join(rows), encoding="utf-8")
    with pytest.raises(TbpoError) as error:
        read_answers(str(file))
    assert what in error.value.what and error.value.where == f"eval.answers: {file}, row 2"
    assert 'with "instruction" or "prompt"' in error.value.expected


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]"])
def test_a_file_without_answers_says_so(tmp_path, content):
    (tmp_path / "empty.json").write_bytes(content)
    with pytest.raises(TbpoError, match="the file has no answers") as error:
        read_answers(str(tmp_path / "empty.json"))
    assert error.value.where.endswith("empty.json") and "rows of JSON" in error.value.expected


def test_a_file_that_cannot_be_read_is_a_message(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(TbpoError, match="it is not UTF-8"):
        read_answers(str(tmp_path / "latin.jsonl"))
    with pytest.raises(TbpoError, match="the answers cannot be read: No such file"):
        read_answers(str(tmp_path / "missing.jsonl"))
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(TbpoError, match="nested without end"):
        read_answers(str(tmp_path / "deep.json"))


def test_files_of_answers_never_share_a_name():
    assert names_of_answers(["a/x.jsonl", "b/model_outputs.json"], ["dpo"]) == ["x", "b"]
    assert names_of_answers(["/1/a/x.jsonl", "/1/b/x.jsonl"], []) == ["a/x", "b/x"]
    assert names_of_answers(["/a/reference.jsonl"], []) == ["a/reference"]
    assert names_of_answers(["/a/dpo.json", "/a/y.json"], ["dpo"]) == ["a/dpo", "y"]
    same = ["a/x.jsonl", "a/x.json"]
    assert names_of_answers(same, ["dpo"]) == same


def test_runs_of_the_same_name_are_called_by_as_many_folders_as_tell_them_apart():
    """The deepest shared name is no end of its own; what is distinct stays short."""
    runs = ["/w/runs/dpo", "/w/other/dpo", "/w/runs/sft", "/w/a/b/align/adapter"]
    assert labels(runs) == ["runs/dpo", "other/dpo", "sft", "b"]
    assert labels(["/1/x/dpo", "/2/x/dpo"]) == ["1/x/dpo", "2/x/dpo"]
    assert labels(["/w/policy"]) == ["w/policy"]


@pytest.mark.parametrize("name", ["completion", "output"])
def test_an_answer_that_is_null_is_named_as_that(tmp_path, name):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", name: None}])
    with pytest.raises(TbpoError, match=f'row 1 cannot be used: its "{name}" is null'):
        read_answers(path)
    both = write_jsonl(tmp_path / "y.jsonl", [{"prompt": "a", "output": None, "completion": "b"}])
    assert read_answers(both).by_text == {"a": "b"}


def test_a_conversation_is_found_by_all_of_its_messages(tmp_path):
    """Two prompts end alike; each has its own answer, and a third one that ends so has none."""
    rows = [{"messages": user("a", "b", "go on", "1")}, {"messages": user("c", "d", "go on", "2")}]
    answers = read_answers(write_jsonl(tmp_path / "x.jsonl", rows))
    asked = questions(("c", "d", "go on"), ("a", "b", "go on"), ("go on",))
    found, how = answers_to(answers, asked)
    assert found == {"p0": "2", "p1": "1"} and how == {"the whole prompt": 2}


def test_the_last_turn_alone_is_enough_where_it_is_the_only_one_and_the_file_has_no_more():
    answers = Answers("x", by_text={"go on": "1", "one?": "2"})
    found, how = answers_to(answers, questions(("a", "b", "go on"), ("one?",)))
    assert found == {"p0": "1", "p1": "2"} and how == {"the last turn": 1, "the whole prompt": 1}
    with pytest.raises(TbpoError, match="2 prompts end with 'go on': which one is answered") as e:
        answers_to(answers, questions(("a", "b", "go on"), ("go on",)))
    assert '"messages"' in e.value.fix and e.value.where == "eval.answers: x"


def no_samples(run):
    return not (run / "sample").exists()


def test_a_file_that_answers_no_prompt_is_found_before_anything_is_sampled(
    trained, finished, tmp_path, capsys
):
    """The held-out prompts, and those of a file; then a file with some answers."""
    recipe = trained / "tiny.toml"
    (tmp_path / "s.py").write_text("def score(prompt, text):\n    return len(text)\n")
    judge = f"judge.scorer=python:{tmp_path / 's.py'}:score"
    file = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "another", "completion": "1"}])
    sets = (judge, f"eval.answers=['{file}']", "eval.opponents=[]")
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "red cat"}, {"prompt": "blue dog"}])
    for number, of in ((8, "eval"), (2, prompts)):
        with pytest.raises(TbpoError, match=f"none of {number} prompts is answered") as error:
            run_stage("eval", recipe, finished, *sets, f"sample.prompts={of}")
        assert error.value.where == f"eval.answers: {file}" and no_samples(finished)
    assert "the first: 'red cat'" in error.value.expected
    write_jsonl(file, [{"prompt": "blue dog", "completion": "1"}])
    short = ("sample.max_new_tokens=4", "eval.diversity_prompts=0", f"sample.prompts={prompts}")
    run = run_stage("eval", recipe, finished, *sets, *short)
    said = " ".join(capsys.readouterr().err.split())
    assert "x.jsonl answers 1 of 2 prompts (1 by the whole prompt)" in said
    assert "the first without an answer: 'red cat'" in said
    assert said.index("answers 1 of 2 prompts") < said.index("sampling")
    (rate,) = json.loads((run / "eval/results.json").read_text())["win_rates"]
    assert rate["raw"]["n"] == 1 and rate["raw"]["high"] - rate["raw"]["low"] > 0.7
    assert rate["length_controlled"]["low"] <= rate["raw"]["low"]
    verdict = json.loads((run / "eval/results.json").read_text())["verdict"]
    assert "of 1 prompt (95 %: " in verdict and "cannot be told apart" in verdict
