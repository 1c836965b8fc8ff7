"""`tbpo eval` and `tbpo sample` asked again with another key: what is made anew, and what is not.

What was kept gets a mark before the command is given again; what is without the mark afterwards
was made anew. The scorer writes down what it scores.
"""

import json
import shutil
from collections import Counter

import pytest
from conftest import run_stage, write_jsonl, write_recipe
from judge_server import chat_completion, chat_server
from safetensors.torch import load_file, save_file

from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.measurements import inputs_under
from tbpo_cli.runs.files import read_sealed, sha256, write_sealed
from tbpo_cli.runs.inputs import inputs_of
from tbpo_cli.stages.evaluate import STAGE

SCORER = """
from pathlib import Path

def score(prompt, completion):
    with Path(__file__).with_name("calls").open("a") as calls:
        calls.write(repr((prompt, completion)) + "\\n")
    return len(completion)
"""
SHORT = ("align.max_steps=3", "align.learning_rate=1e-1", "sample.max_new_tokens=6")
OPPONENTS = 'eval.opponents=["reference","chosen"]'
NUM_PROMPTS = 8
NOTHING: dict[str, int] = {}
ALL_ANSWERS = {"policy": 8, "reference": 8, "answers": 8}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, base, rows):
    """A folder with tiny.toml, two scorers, a twin of the adapter and another one, and a run that
    has been evaluated beside the twin, with four prompts of the diversity.
    """
    folder = tmp_path_factory.mktemp("evaluated")
    for name in ("scorer.py", "other.py"):
        (folder / name).write_text(SCORER)
    (folder / "other.py").write_text(SCORER.replace("len(completion)", "-len(completion)"))
    scorer = {"scorer": "python:./scorer.py:score"}
    recipe = write_recipe(folder / "tiny.toml", base, rows, judge=scorer)
    run_stage("align", recipe, folder / "run", *SHORT)
    shutil.copytree(folder / "run/align/adapter", folder / "twin")
    shutil.copytree(folder / "twin", folder / "another")
    weights = load_file(folder / "twin/adapter_model.safetensors")
    halved = {name: weight / 2 for name, weight in weights.items()}
    save_file(halved, folder / "another/adapter_model.safetensors", {"format": "pt"})
    run_stage("eval", recipe, folder / "run", *sets_of(folder))
    return folder


@pytest.fixture
def copied(evaluated, tmp_path):
    """A copy of that run for one test; the scorer has been asked nothing."""
    for calls in evaluated.glob("calls"):
        calls.unlink()
    return shutil.copytree(evaluated / "run", tmp_path / "run")


def sets_of(folder, *more):
    twin = f"eval.against=['{folder / 'twin'}']"
    return (*SHORT, OPPONENTS, "eval.diversity_prompts=4", twin, *more)


def mark_all(run, *stages):
    """Marks all rows that stages have kept; their manifests have the new hashes."""
    for stage in stages:
        manifest = read_sealed(run / stage / "manifest.json")
        for path in (run / stage / "kept").glob("*-*.json"):
            content = read_sealed(path)
            rows = [row | {"is_old": True} for row in content["rows"]]
            write_sealed(path, content | {"rows": rows})
            manifest["others"][str(path.relative_to(run / stage))] = sha256(path)
        write_sealed(run / stage / "manifest.json", manifest)


def made_anew(run):
    """How many rows have no mark: answers of the sample stage by model, measurements by kind."""
    lines = [json.loads(line) for line in (run / "sample/samples.jsonl").open(encoding="utf-8")]
    found = Counter(line["model"] for line in lines if "is_old" not in line)
    for path in (run / "eval/kept").glob("*-*.json"):
        rows = read_sealed(path)["rows"]
        found[path.name.partition("-")[0]] += sum("is_old" not in row for row in rows)
    return +found


def results(run):
    found = json.loads((run / "eval/results.json").read_text(encoding="utf-8"))
    for model in found["models"].values():
        del model["source"]  # where it lies
    return {key: found[key] for key in ("models", "win_rates", "tests", "verdict")}


def calls(folder):
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ("sample.temperature=0.3", ALL_ANSWERS),
        ("sample.top_p=0.5", ALL_ANSWERS),
        ("sample.max_new_tokens=5", ALL_ANSWERS),
        ("sample.num_samples=2", ALL_ANSWERS),  # the second ones
        ("sample.max_prompts=5", NOTHING),
        ("sample.models=['policy']", NOTHING),
        ("sample.models=['reference']", NOTHING),
    ],
)
def test_a_changed_key_of_sample_renews_the_answers_that_depend_on_it(
    evaluated, copied, change, anew
):
    before = results(copied)
    mark_all(copied, "sample", "eval")
    run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated, change))
    assert made_anew(copied) == anew
    assert len(calls(evaluated)) == len({*calls(evaluated)}), "nothing is scored twice"
    assert bool(calls(evaluated)) == bool(anew)
    for name, model in results(copied)["models"].items():
        for kind in ("preference", "diversity"):
            assert model[kind] == before["models"][name][kind]
    mark_all(copied, "sample", "eval")
    asked = len(calls(evaluated))
    run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated))
    assert made_anew(copied) == NOTHING and len(calls(evaluated)) == asked
    assert results(copied) == before
    assert not [*copied.glob("*.old-*")], "nothing had to be set aside"


def test_other_prompts_are_answered_and_the_others_are_kept(evaluated, copied, tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"red {n}"} for n in range(3)])
    before = results(copied)
    mark_all(copied, "sample", "eval")
    other = (f"sample.prompts={prompts}", 'eval.opponents=["reference"]')
    run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated, *other))
    assert made_anew(copied) == {"policy": 3, "reference": 3, "answers": 3}
    mark_all(copied, "sample", "eval")
    run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated))
    assert made_anew(copied) == NOTHING and results(copied) == before


def test_prompts_of_a_renamed_file_are_answered_by_all_models(evaluated, copied, tmp_path):
    """The ids of the prompts are made of the file's name."""
    for name in ("one", "two"):
        prompts = write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "red"}, {"prompt": "dog"}])
        other = (f"sample.prompts={prompts}", 'eval.opponents=["reference"]')
        run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated, *other))
        verdicts = (copied / "eval/verdicts.jsonl").read_text().splitlines()
        ids = {json.loads(line)["prompt_id"] for line in verdicts}
        assert ids == {f"{name}.jsonl:1", f"{name}.jsonl:2"}


def test_a_server_in_place_of_the_policy_leaves_the_answers_of_the_others(evaluated, copied):
    mark_all(copied, "sample", "eval")
    with chat_server(lambda body: chat_completion("red dog")) as server:
        served = (f"sample.endpoint={server.url}", "sample.endpoint_model=mine")
        run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated, *served))
        assert made_anew(copied) == {"policy": 8} and len(server.requests) == 8


@pytest.mark.parametrize("change", ["sample.batch_size=3", "eval.gate=kl >= 0"])
def test_keys_that_change_no_figure_leave_the_evaluation_up_to_date(
    evaluated, copied, change, capsys
):
    before = (copied / "sample/manifest.json").stat().st_mtime_ns
    run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated, change))
    assert "eval is up to date" in capsys.readouterr().err
    assert (copied / "sample/manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "anew", "is_scored"),
    [
        ("eval.against=[]", NOTHING, False),
        ("eval.against=['{folder}/twin', '{folder}/another']",
         {"preference": 8, "diversity": 20, "answers": 8}, True),
        ('eval.opponents=["reference"]', NOTHING, False),
        ("eval.answers=['{folder}/theirs.json']", NOTHING, True),
        ("eval.diversity_prompts=6", {"diversity": 30}, False),  # 2 prompts, 5 samples, 3 models
        ("eval.diversity_prompts=3", NOTHING, False),
        ("eval.diversity_prompts=0", NOTHING, False),
        ("eval.judge.scorer=python:{folder}/other.py:score", NOTHING, True),
        ('eval.thinking=["<t>", "</t>"]', NOTHING, False),
    ],
)  # fmt: skip
def test_a_changed_key_of_eval_measures_what_is_new_alone(
    evaluated, copied, change, anew, is_scored
):
    prompts = [json.loads(line) for line in (copied / "sample/samples.jsonl").open()]
    theirs = [{"prompt": one["messages"], "output": "red"} for one in prompts[::2]]
    (evaluated / "theirs.json").write_text(json.dumps(theirs))
    before, samples = results(copied), (copied / "sample/samples.jsonl").stat().st_mtime_ns
    for sets, expected in ((change.format(folder=evaluated), anew), (None, NOTHING)):
        mark_all(copied, "eval")
        asked = len(calls(evaluated))
        more = (sets,) if sets else ()
        run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated, *more))
        found = made_anew(copied)
        assert {key: found[key] for key in found if key not in ("policy", "reference")} == expected
        assert (len(calls(evaluated)) > asked) == bool(sets and is_scored)
    assert (copied / "sample/samples.jsonl").stat().st_mtime_ns == samples
    assert results(copied) == before


@pytest.mark.parametrize("name", ["rows.jsonl", "common.yaml", "code.py", "helper.py"])
def test_a_task_of_our_own_depends_on_every_file_that_it_names(recipe_file, tmp_path, name):
    """Rows, a YAML file that it includes, a function, and what that one imports."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": "one"}])
    (tmp_path / "letters.yaml").write_text(
        f"task: letters\ninclude: common.yaml\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
    )
    (tmp_path / "common.yaml").write_text("process_results: !function code.score\n")
    (tmp_path / "code.py").write_text("import helper\ndef score(doc, results): return {}\n")
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "unused.py").write_text("")
    recipe = load_recipe(recipe_file, (f"eval.suites=['{tmp_path / 'letters.yaml'}']",))
    before = inputs_of(STAGE, recipe, {}, {})
    assert inputs_under(before, "eval.suites") == inputs_under(
        inputs_of(STAGE, recipe, {}, {}), "eval.suites"
    )
    (tmp_path / "unused.py").write_text("another = 1\n")
    assert inputs_of(STAGE, recipe, {}, {}) == before
    path = tmp_path / name
    path.write_text(path.read_text() + "\n")
    assert inputs_under(inputs_of(STAGE, recipe, {}, {}), "eval.suites") != inputs_under(
        before, "eval.suites"
    )


def test_a_score_is_of_all_answers_also_where_a_file_has_few_of_the_prompts(
    evaluated, copied, tmp_path
):
    first = json.loads((copied / "sample/samples.jsonl").read_text().splitlines()[0])
    row = {"prompt": first["messages"][-1]["content"], "completion": "one"}
    file = write_jsonl(tmp_path / "few.jsonl", [row])
    more = ("eval.opponents=[]", f"eval.answers=['{file}']")
    run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated, *more))
    models = json.loads((copied / "eval/results.json").read_text())["models"]
    assert [models[name]["score"]["n"] for name in ("policy", "twin")] == [NUM_PROMPTS] * 2


def test_restart_measures_everything_anew(evaluated, copied):
    mark_all(copied, "eval")
    run_stage("eval", evaluated / "tiny.toml", copied, *sets_of(evaluated), restart=True)
    found = made_anew(copied)
    assert (found["preference"], found["diversity"], found["answers"]) == (24, 60, 8)
    assert (copied / "eval.old-1/results.json").exists()


def test_a_second_key_that_is_given_while_answers_are_made_keeps_those_that_are_there(
    evaluated, copied, tmp_path, capsys
):
    """Ten of 16 answers of the server, then no more; another temperature, and the first again."""
    recipe = evaluated / "tiny.toml"

    def sampled(temperature, limit):
        def answer(body):
            done = len(server.requests) > limit
            return (401, "no") if done else chat_completion(f"red {body['temperature']}")

        with chat_server(answer) as server:
            sets = (
                "sample.num_samples=2", "sample.models=['policy']", "sample.batch_size=1",
                f"sample.endpoint={server.url}", "sample.endpoint_model=mine",
                f"sample.temperature={temperature}",
            )  # fmt: skip
            try:
                run_stage("sample", recipe, copied, *SHORT, *sets)
            except TbpoError:
                return len(server.requests) - 1
            return len(server.requests)

    assert [sampled(0.5, 10), sampled(0.25, 99), sampled(0.5, 99)] == [10, 16, 6]
    lines = (copied / "sample/samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["completion"] for line in lines} == {"red 0.5"} and len(lines) == 16
    printed = capsys.readouterr().err
    assert "what depends on these changes is made anew, the rest is kept" in printed
    assert "sample.temperature: 0.25 → 0.5" in printed


def test_sample_alone_keeps_its_answers_and_restart_makes_all_anew(evaluated, copied, tmp_path):
    recipe, sets = evaluated / "tiny.toml", (*SHORT, "sample.temperature=0.3")
    mark_all(copied, "sample", "eval")
    run_stage("sample", recipe, copied, *sets)
    assert made_anew(copied) == {"policy": 8, "reference": 8}
    mark_all(copied, "sample")
    adapter = f"sample.adapter={evaluated / 'twin'}"
    run_stage("sample", recipe, copied, *sets, adapter)
    assert made_anew(copied) == {"policy": 8}, "another adapter answers for the policy alone"
    run_stage("sample", recipe, copied, *sets, adapter, restart=True)
    assert made_anew(copied) == {"policy": 8, "reference": 8}


def test_a_run_of_an_earlier_version_which_kept_no_answers_asks_before_they_are_replaced(
    evaluated, copied
):
    shutil.rmtree(copied / "sample/kept")
    manifest = read_sealed(copied / "sample/manifest.json")
    others = {key: value for key, value in manifest["others"].items() if "kept" not in key}
    write_sealed(copied / "sample/manifest.json", manifest | {"others": others})
    with pytest.raises(TbpoError, match=r"sample\.temperature") as error:
        run_stage("sample", evaluated / "tiny.toml", copied, *SHORT, "sample.temperature=0.3")
    assert "--restart redoes sample" in error.value.fix
