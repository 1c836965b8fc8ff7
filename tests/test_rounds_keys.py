"""What of some rounds depends on which key: a changed one makes nothing else anew."""

import dataclasses
import hashlib
import shutil
from fnmatch import fnmatch

import pytest
from conftest import change_recipe, merged, run_stage
from test_rounds import states, weights, write
from test_rounds_results import SETTINGS

from tbpo_cli.config.recipe import Align, Choose, Judge, Rounds, Sample, load_recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import json_lines
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.chain import steps_of

REFERENCES = ("first", "previous")
PROMPTS = ("rounds/prompts",)
ANSWERS = ("rounds/*/sample",)
MARKS = ("rounds/*/mark",)
PAIRS = ("rounds/*/prepare",)
TRAINED = ("rounds/*/align",)
LATER_TRAINED = ("rounds/[23]/align",)
NOTHING = ()

A_SERVER = ("rounds.endpoint=http://127.0.0.1:9/v1", "rounds.endpoint_model=base")
OF_SAMPLE = ("sample.endpoint=http://127.0.0.1:9/v1", "sample.endpoint_model=base")
A_MODEL = (
    "judge.scorer=none",
    "judge.endpoint=http://127.0.0.1:9/v1",
    "judge.model=judge",
    "judge.body={temperature=0.7}",
)

# (the changed key, what else the recipe has before and after, the stages with other inputs)
KEYS = [
    ("rounds.number=4", (), (*PROMPTS, "rounds/4/*")),
    ("rounds.number=2", (), (*PROMPTS, "rounds/3/*")),
    ("rounds.prompts=7", (), PROMPTS),
    ("rounds.held_out_prompts=3", (), PROMPTS),
    ("rounds.answers=4", (), ANSWERS),
    ("rounds.temperature=0.9", (), ANSWERS),
    ("rounds.top_p=0.9", (), ANSWERS),
    ("rounds.max_new_tokens=8", (), ANSWERS),
    ("rounds.batch_size=2", (), NOTHING),
    ("rounds.reference=previous", (), LATER_TRAINED),
    ("rounds.replay=0.75", (), ("rounds/[23]/prepare",)),
    ("rounds.endpoint=http://127.0.0.1:10/v1", A_SERVER, NOTHING),
    ("rounds.endpoint_model=other", A_SERVER, ANSWERS),
    ("rounds.endpoint_folder=/elsewhere", A_SERVER, NOTHING),
    ("choose.pairs=best_random", (), PAIRS),
    ("choose.min_margin=1.0", (), PAIRS),
    ("choose.max_length_difference=20", (), PAIRS),
    ("judge.scorer=python:scorer.py:equal", (), MARKS),
    ("judge.reward_model=other", ("judge.scorer=none", "judge.reward_model=one"), MARKS),
    ("judge.endpoint=http://127.0.0.1:10/v1", A_MODEL, NOTHING),
    ("judge.model=other", A_MODEL, MARKS),
    ("judge.template=pairs.txt", A_MODEL, NOTHING),
    ("judge.mark_template=marks.txt", A_MODEL, MARKS),
    ("judge.scale=[0.0, 5.0]", A_MODEL, MARKS),
    ("judge.body={temperature=0.8}", A_MODEL, MARKS),
    ("judge.concurrency=2", A_MODEL, NOTHING),
    ("judge.timeout=3.0", A_MODEL, NOTHING),
    ("judge.repeats=2", A_MODEL, MARKS),
    ("judge.price_per_million=[1.0, 2.0]", A_MODEL, NOTHING),
    ("sample.prompts=prompts.jsonl", (), NOTHING),
    ("sample.max_prompts=3", (), NOTHING),
    ("sample.num_samples=2", (), NOTHING),
    ("sample.adapter=user/repo", (), NOTHING),
    ('sample.models=["policy"]', (), NOTHING),
    ("sample.batch_size=2", (), NOTHING),
    ("sample.temperature=0.5", (), NOTHING),
    ("sample.top_p=0.5", (), NOTHING),
    ("sample.max_new_tokens=9", (), NOTHING),
    ("sample.endpoint=http://127.0.0.1:10/v1", OF_SAMPLE, NOTHING),
    ("sample.endpoint_model=other", OF_SAMPLE, NOTHING),
    ("align.max_tokens_per_device=64", (), NOTHING),
    ("align.layout=padded", (), NOTHING),
    ("align.sharding=ddp", (), NOTHING),
    ("align.shard_over=all", (), NOTHING),
    ("align.epochs=2", ("align.max_steps=none",), TRAINED),
    ("align.max_steps=3", (), TRAINED),
    ("align.optimizer=rmsprop", (), TRAINED),
    ("align.learning_rate=1e-4", (), TRAINED),
    ("align.schedule=linear", (), TRAINED),
    ("align.warmup=0.5", (), TRAINED),
    ("align.weight_decay=0.1", (), TRAINED),
    ("align.max_grad_norm=1.0", (), TRAINED),
    ("align.checkpoint_every=2", (), NOTHING),
    ("align.eval_every=1", (), NOTHING),
    ("align.eval_pairs=2", (), NOTHING),
    ("align.log_every=1", (), NOTHING),
    ("align.activation_checkpointing=true", (), NOTHING),
    ("align.batch_pairs=2", (), TRAINED),
    ("align.reverse=true", (), TRAINED),
    ("align.loss.beta=0.25", (), TRAINED),
    ("eval.judge.scorer=python:scorer.py:equal", (), NOTHING),
    ('eval.thinking=["", ""]', (), MARKS),
    ("run.name=other", (), NOTHING),
]
REFUSED = {"align.start", "sample.endpoint_adapter"}  # beside [rounds]; beside no adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a folder with own.toml and, in run/, its three rounds of a reference; once each."""
    folders = {}

    def make(reference):
        if reference not in folders:
            folder = tmp_path_factory.mktemp(reference)
            changes = merged(SETTINGS, {"rounds": {"reference": reference}})
            run_stage("align", write(folder, **changes), folder / "run")
            for name in ("pairs", "marks"):
                (folder / f"{name}.txt").write_text("{prompt} {a} {b} {answer} {low} {high}")
            folders[reference] = folder
        return folders[reference]

    return make


def inputs(folder, overrides):
    """By the label of each stage up to `align`, what it would start from."""
    recipe = load_recipe(folder / "own.toml", overrides)
    found = {}
    for step in steps_of("align", recipe, RunDir(folder / "run")):
        try:
            found[step.label] = step.run_dir.inputs(step.stage, step.recipe)
        except TbpoError:
            found[step.label] = "a round that has not been begun"
    return found


@pytest.mark.parametrize(("key", "beside", "expected"), KEYS)
def test_a_changed_key_changes_what_depends_on_it_and_nothing_else(
    made, monkeypatch, key, beside, expected
):
    folder = made("first")
    monkeypatch.chdir(folder)
    before, now = inputs(folder, beside), inputs(folder, (*beside, key))
    labels = before | now
    changed = {label for label in labels if before.get(label) != now.get(label)}
    assert changed == {
        label for label in labels if any(fnmatch(label, pattern) for pattern in expected)
    }


def test_every_key_of_the_tables_that_rounds_read_is_among_them():
    tables = {"rounds": Rounds, "choose": Choose, "judge": Judge, "sample": Sample, "align": Align}
    keys = {
        f"{name}.{each.name}"
        for name, table in tables.items()
        for each in dataclasses.fields(table)
    }
    tried = {".".join(key.partition("=")[0].split(".")[:2]) for key, *_ in KEYS}
    assert keys - REFUSED <= tried


def files(folder):
    """By path, the content of each file of some rounds and when it was written."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("lock", "recipe.toml"):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (content, path.stat().st_mtime_ns)
    return found


KEPT = ("prompts/*", "0/*", "1/*", "2/sample/*", "2/mark/*", "2/prepare/*")


@pytest.mark.parametrize(("reference", "other"), [REFERENCES, REFERENCES[::-1]])
def test_another_reference_keeps_the_first_round_and_the_answers_marks_and_pairs_of_the_second(
    made, tmp_path, reference, other
):
    """And ends where the rounds with that reference end that were made in one go."""
    folder = shutil.copytree(made(reference), tmp_path / "own", symlinks=True)
    assert set(states(folder).values()) == {"done"}
    found = states(folder, f"rounds.reference={other}")
    assert {label for label, state in found.items() if state != "done"} == {
        "rounds/2/align",
        "rounds/3/align",
    }
    path, run = folder / "own.toml", folder / "run"
    change_recipe(path, rounds={"reference": other})
    with pytest.raises(TbpoError, match="rounds/2/align") as error:
        run_stage("align", path, run)
    assert f'rounds.reference: now "{other}"' in error.value.expected
    what = "--restart redoes rounds/2/align and rounds/3/align and what depends on it"
    assert what in error.value.fix
    before = files(run / "rounds")
    run_stage("align", path, run, restart=True)
    after = files(run / "rounds")
    kept = {name for name in before if any(fnmatch(name, pattern) for pattern in KEPT)}
    assert {"2/mark/answers.jsonl", "1/align/adapter/adapter_model.safetensors"} <= kept
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    for number in (2, 3):
        name = f"{number}/align/adapter/adapter_model.safetensors"
        assert after[name] != before[name]
        in_one_go = made(other) / "run/rounds" / name
        assert (run / "rounds" / name).read_bytes() == in_one_go.read_bytes()
    assert set(states(folder).values()) == {"done"}


@pytest.mark.parametrize("reference", REFERENCES)
def test_without_an_adapter_too_the_answers_are_those_of_the_policy_of_the_round_before(
    tmp_path, reference
):
    """Of a first round that is trained otherwise, the second one has other answers."""
    changes = {"model": {"lora": None}, "align": {"learning_rate": 3e-4}}
    path = write(tmp_path, **merged(changes, {"rounds": {"reference": reference}}))
    run = run_stage("align", path, tmp_path / "run")
    assert set(states(tmp_path).values()) == {"done"}
    before = files(run / "rounds")
    change_recipe(path, align={"learning_rate": 3e-3})
    run_stage("align", path, run, restart=True)
    after = files(run / "rounds")
    assert after["1/mark/answers.jsonl"] == before["1/mark/answers.jsonl"]
    for name in ("1/after/sample/samples.jsonl", "2/sample/samples.jsonl"):
        assert after[name][0] != before[name][0]
    assert set(states(tmp_path).values()) == {"done"}


def test_rounds_on_an_adapter_begin_from_it_with_either_reference(made, tmp_path):
    """It is the first policy and the first reference: another one keeps the first round."""
    adapter = made("first") / "run/align/adapter"
    path = write(tmp_path, model={"adapter": str(adapter)})
    run = run_stage("align", path, tmp_path / "run")
    found = states(tmp_path, "rounds.reference=previous")
    assert [label for label, state in found.items() if state != "done"] == ["rounds/2/align"]
    first, second = (
        [
            line["kl"]
            for line in json_lines(run / f"rounds/{number}/align/metrics.jsonl")
            if line["split"] == "eval"
        ]
        for number in (1, 2)
    )
    assert first[0] == pytest.approx(0.0, abs=1e-6)
    assert second[0] == pytest.approx(first[-1], rel=1e-3)
    assert weights(run / "align/adapter") != weights(adapter)


def test_another_start_of_the_training_cannot_stand_beside_rounds(tmp_path):
    path = write(tmp_path, align={"start": "adapter"})
    with pytest.raises(TbpoError) as error:
        load_recipe(path)
    assert "align.start cannot stand beside [rounds]" in error.value.expected
