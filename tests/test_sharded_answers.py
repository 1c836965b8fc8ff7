"""Evaluation and sampling with weights that are sharded over processes are those of one process."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import change_recipe, preference_rows, run_stage, small_second_device, write_jsonl
from process import Process

from tbpo_cli.config.recipe import Lora, Model, load_recipe
from tbpo_cli.errors import ReportedError
from tbpo_cli.evaluation.kept import KEPT
from tbpo_cli.evaluation.served import on_server
from tbpo_cli.model.out_of_memory import with_less_at_once
from tbpo_cli.model.together import BATCH_SIZE, Together
from tbpo_cli.runs.files import halved, note_halved, read_sealed
from tbpo_cli.train.placement import choose_for_answers

SHARDED = ("--cpu", "--gpus", "2", "--set", "align.sharding=fsdp")
# The one prompt is for the policy in one process and for the reference in the other; from the blank
# prompt beside it comes another number of tokens. The processes have 3 and 2 pairs, one at a time,
# and 10 and 5 completions of the diversity, 8 at a time.
UNEVEN = (
    "sample.max_prompts=1",
    "sample.batch_size=8",
    "sample.max_new_tokens=200",
    "align.max_tokens_per_device=60",
    "eval.diversity_prompts=3",
)
TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: [".", "o"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def aligned(recipe_file, tmp_path):
    """(recipe, run, a copy of the run) with 5 held-out pairs, in which all weights are trained."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", preference_rows(5, seed=2))
    changed = {"model": {"lora": None}, "data": {"eval": str(held_out)}, "align": {"max_steps": 2}}
    recipe = change_recipe(recipe_file, **changed)
    run_stage("align", recipe, tmp_path / "alone", *UNEVEN)
    shutil.copytree(tmp_path / "alone", tmp_path / "two")
    return recipe, tmp_path / "alone", tmp_path / "two"


def tbpo(command, recipe, run, *arguments, sets=()):
    """The command in processes with sharded weights: its exit code, and what it has said."""
    overrides = [part for one in sets for part in ("--set", one)]
    process = Process(
        command, recipe, "--run-dir", run, *SHARDED, *overrides, *arguments, cwd=run.parent
    )
    done = process.finish()
    return done.returncode, done.stderr


def samples(run):
    lines = (run / "sample/samples.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted(map(json.loads, lines), key=lambda row: (row["row"], row["sample"], row["model"]))


def measured(run):
    """All rows that an evaluation has measured, by the kind of the measurement, in one order."""
    files = sorted((run / "eval" / KEPT).glob("*.json"))
    return {path.name: sorted(read_sealed(path)["rows"], key=place) for path in files}


def place(row):
    return (row.get("pair", -1), str(row.get("prompt_id")), row.get("sample", -1))


def assert_same(ours, theirs):
    """Two values of JSON, of which only numbers may differ, by rounding."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert_same(value, theirs[name])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            assert_same(mine, yours)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    else:
        assert ours == theirs


def test_answers_and_measurements_of_sharded_weights_are_those_of_one_process(aligned, tmp_path):
    """Fewer prompts than processes, pairs and completions that do not divide by them, a suite."""
    pytest.importorskip("lm_eval")
    recipe, alone, two = aligned
    questions = [{"question": f"one {number}", "answer": " cat"} for number in range(3)]
    task = tmp_path / "letters.yaml"
    task.write_text(TASK.format(data=write_jsonl(tmp_path / "letters.jsonl", questions)))
    sets = (*UNEVEN, f"eval.suites=['{task}']")
    run_stage("eval", recipe, alone, *sets)
    code, err = tbpo("eval", recipe, two, sets=sets)
    assert code == 0, err
    how = "the weights are sharded over the processes (fsdp): as the recipe says"
    assert err.count(how) == 2, "for the samples and for the evaluation"
    assert "stop" in [row["finish_reason"] for row in samples(two)]
    assert_same(samples(two), samples(alone))
    assert len(measured(two)) == 6, "of two models: pairs, diversity, suite"
    assert_same(measured(two), measured(alone))
    for stage in ("sample", "eval"):
        manifest = json.loads((two / stage / "manifest.json").read_text())
        assert (manifest["weights"], manifest["num_processes"]) == (how, 2)


def test_all_processes_begin_again_when_one_is_out_of_memory_in_sampling_or_measuring(
    recipe_file, tmp_path, monkeypatch
):
    """It cannot be asked: the others wait for it in the middle of a pass."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", preference_rows(32, seed=2))
    sets = (f"data.eval={held_out}", "align.max_steps=1", "sample.max_new_tokens=3")
    sets += ("sample.num_samples=2", "eval.diversity_prompts=0", "align.max_tokens_per_device=auto")
    run_stage("align", recipe_file, tmp_path / "run", *sets)
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    run_stage("eval", recipe_file, tmp_path / "alone", *sets)
    (tmp_path / "sitecustomize.py").write_text(small_second_device(500))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    code, err = tbpo("eval", recipe_file, tmp_path / "run", sets=sets)
    assert code == 0 and "Traceback" not in err, err
    again = "out of memory: all processes begin again, from what is kept, with "
    assert err.count(again) == 2, err
    assert f"{again}sample.batch_size = 16" in err
    assert f"{again}max_tokens_per_device = 512" in err
    assert not [*(tmp_path / "run").glob("*/.halved*")]
    assert_same(samples(tmp_path / "run"), samples(tmp_path / "alone"))
    assert_same(measured(tmp_path / "run"), measured(tmp_path / "alone"))


def test_what_is_halved_is_kept_by_key_and_never_grows(tmp_path):
    def work(size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    together = Together(folder=tmp_path)
    assert together.batch_size(32) == 32
    with pytest.raises(ReportedError):
        with_less_at_once(work, 32, "sampling", together)
    note_halved(tmp_path, "max_tokens_per_device", 512)
    note_halved(tmp_path, BATCH_SIZE, 20)
    assert halved(tmp_path) == {"sample.batch_size": 16, "max_tokens_per_device": 512}
    assert together.batch_size(32) == 16 and together.batch_size(8) == 8


def test_a_server_is_not_compared_with_weights_that_one_process_cannot_load(recipe_file, capsys):
    """And no server is asked: there is none."""
    recipe = change_recipe(
        recipe_file, sample={"endpoint": "http://127.0.0.1:9/v1", "endpoint_model": "base"}
    )
    cpu = torch.device("cpu")
    with on_server(load_recipe(recipe), None, [], cpu, is_base=True, compares=False):
        pass
    assert "the weights are sharded, and not compared with those of the server" in (
        capsys.readouterr().err
    )


PARTS = """
import json
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.model.load import add_helper, load_trained
rank, store, recipe, trained, helper = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
recipe = load_recipe(Path(recipe))
cpu = torch.device("cpu")
mesh = init_device_mesh("cpu", (2,))
policy = load_trained(recipe, cpu, Path(trained), None, mesh)
add_helper(policy, "another", helper, recipe.model, cpu, mesh=mesh)
weights = [each for model in policy.models for each in model.parameters()]
whole = sum(each.numel() for each in weights if isinstance(each, DTensor))
own = sum(each.to_local().numel() for each in weights if isinstance(each, DTensor))
others = sum(each.numel() for each in weights if not isinstance(each, DTensor))
print(json.dumps({"whole": whole, "own": own, "others": others, "models": len(policy.models)}))
"""


@pytest.mark.parametrize("with_adapter", [True, False])
def test_no_process_has_the_whole_of_a_trained_model(
    recipe_file, trained, tmp_path, base, with_adapter
):
    """Only an adapter is whole in each of them."""
    recipe, folder, count = recipe_file, trained / "run/align/adapter", 2
    if not with_adapter:
        recipe, folder, count = change_recipe(recipe_file, model={"lora": None}), base, 3
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PARTS, str(rank), tmp_path / "store", recipe, folder, base],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    ends = [json.loads(each.communicate(timeout=200)[0].splitlines()[-1]) for each in both]
    assert [end["models"] for end in ends] == [count, count]
    assert sum(end["own"] for end in ends) == ends[0]["whole"]
    assert max(end["own"] for end in ends) < 0.51 * ends[0]["whole"]
    assert (ends[0]["others"] > 0) == with_adapter
    assert ends[0]["others"] < 0.1 * ends[0]["whole"]


@pytest.mark.parametrize(
    ("size", "wanted", "quantization", "found"),
    [
        (41, "auto", None, (True, "their 41 GB are more than half of a device's 80 GB")),
        (39, "auto", None, (False, "they leave memory for activations")),
        (41, "auto", "nf4", (False, "they leave memory for activations")),
        (41, "ddp", None, (False, "as the recipe says")),
        (1, "fsdp", None, (True, "as the recipe says")),
    ],
)
def test_weights_that_are_not_trained_are_sharded_if_they_fill_more_than_half_of_a_device(
    monkeypatch, size, wanted, quantization, found
):
    properties = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    model = Model(base="base", quantization=quantization, lora=Lora())
    decided = choose_for_answers(size * 10**9, wanted, model, torch.device("cuda"))
    assert decided == found
