"""A loss, generator, data format, judge and stage: each added by a line of a table, and used."""

import json
import typing
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch.nn.functional as F
from conftest import preference_rows, run_stage, write_jsonl

from tbpo_cli import console
from tbpo_cli.batch.layouts import LAYOUTS
from tbpo_cli.config.recipe import Align, Judge, load_recipe
from tbpo_cli.config.validate import table
from tbpo_cli.core import GENERATORS, LOSSES, LossOutput
from tbpo_cli.core.losses import Loss
from tbpo_cli.core.types import mean_over_response
from tbpo_cli.data.formats import FORMATS, Format, format_faults
from tbpo_cli.data.pairs import make_pair
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges import JUDGES
from tbpo_cli.evaluation.judges.judge import score_judge
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage
from tbpo_cli.stages.chain import STAGES, run_through
from tbpo_cli.train.optim import OPTIMIZERS, SCHEDULES


def train_lines(run):
    lines = [json.loads(line) for line in (run / "align/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


@dataclass(frozen=True)
class Likely(Loss):
    """−scale · mean log π_θ of the chosen response: no reference."""

    scale: float = 1.0
    needs = frozenset({"logps"})

    def __call__(self, scores):
        return LossOutput(-self.scale * mean_over_response(scores.chosen.logps, scores.chosen.mask))


def test_a_loss(recipe_file, tmp_path, monkeypatch):
    """Its fields are keys, its `needs` are computed: half the scale, half the first loss."""
    with pytest.raises(TbpoError, match="'likely' is unknown"):
        load_recipe(recipe_file, ("align.loss.name=likely",))
    monkeypatch.setitem(LOSSES, "likely", Likely)
    runs = [
        run_stage(
            "align",
            recipe_file,
            tmp_path / str(scale),
            f"align.loss={{name = 'likely', scale = {scale}}}",
        )
        for scale in (1.0, 0.5)
    ]
    whole, half = (train_lines(run)[0]["loss"] for run in runs)
    assert whole > 0 and half == pytest.approx(whole / 2, rel=1e-5)
    with pytest.raises(TbpoError, match=r"align\.loss\.sale is an unknown key"):
        load_recipe(recipe_file, ("align.loss.name=likely", "align.loss.sale=2.0"))


@dataclass(frozen=True)
class Hinge:
    """L(z) = max(0, margin + z): no Bregman generator, but the loop asks for no more."""

    margin: float = 1.0

    def h(self, ratio):
        raise NotImplementedError

    def loss(self, log_ratio):
        return F.relu(self.margin + log_ratio)


def test_a_generator(recipe_file, tmp_path, monkeypatch):
    """Policy = reference at the first step: log R = 0 at every token, the loss is the margin."""
    monkeypatch.setitem(GENERATORS, "margin", Hinge)
    run = run_stage(
        "align",
        recipe_file,
        tmp_path / "run",
        "model.lora.dropout=0.0",
        "align.max_steps=1",
        "align.loss.generator={name = 'margin', margin = 3.0}",
    )
    assert train_lines(run)[0]["loss"] == pytest.approx(3.0, abs=1e-6)
    assert 'name = "margin"' in (run / "recipe.toml").read_text()


def read_question(row):
    """{"question": text, "answers": [the better, the worse]}."""
    prompt = ({"role": "user", "content": row["question"]},)
    return make_pair(
        row, prompt, *({"role": "assistant", "content": text} for text in row["answers"])
    )


def test_a_data_format(recipe_file, tmp_path, monkeypatch):
    """It is recognised by its columns; its pairs are those of the same texts in another format."""
    plain = preference_rows(8, seed=3)
    rows = [
        {"question": row["prompt"], "answers": [row["chosen"], row["rejected"]]} for row in plain
    ]
    train = write_jsonl(tmp_path / "questions.jsonl", rows)
    with pytest.raises(TbpoError, match="none of the known formats"):
        run_stage("prepare", recipe_file, tmp_path / "before", f"data.train={train}")
    data = load_recipe(recipe_file, ("data.format=question",)).data
    (fault,) = format_faults(data, "my.toml")
    assert fault.what == 'data.format = "question" is not possible'
    assert fault.where == "my.toml, [data] format"
    assert fault.expected.startswith("'auto', 'hh', 'sharegpt', 'prompt', 'messages'")
    monkeypatch.setitem(FORMATS, "question", Format(("question", "answers"), read_question))
    assert format_faults(data, "my.toml") == []
    run = run_stage("prepare", recipe_file, tmp_path / "run", f"data.train={train}")
    same = run_stage(
        "prepare",
        recipe_file,
        tmp_path / "same",
        f"data.train={write_jsonl(tmp_path / 'p.jsonl', plain)}",
    )
    counts = json.loads((run / "prepare/manifest.json").read_text())["counts"][-1]
    assert (counts["format"], counts["kept"]) == ("question", {"train": 8})
    assert len({(made / "prepare/train/pairs.arrow").read_bytes() for made in (run, same)}) == 1


def test_the_names_that_a_recipe_allows_are_those_of_the_tables():
    """recipe.py loads neither torch nor numpy, and so repeats them."""
    tables = {
        (Align, "layout"): LAYOUTS,
        (Align, "optimizer"): OPTIMIZERS,
        (Align, "schedule"): SCHEDULES,
    }
    for (owner, key), names in tables.items():
        assert {*typing.get_args(typing.get_type_hints(owner)[key])} - {"auto"} == {*names}, key


@table
class JudgeWithLongest(Judge):
    """[judge] with one key more, that of the judge: every key of a recipe is declared."""

    longest: bool | None = None
    kinds: ClassVar[tuple[str, ...]] = (*Judge.kinds, "longest")


def longest_of(_settings, _table, _cache):
    return score_judge("longest", lambda answers: (len(completion) for _, completion in answers))


def test_a_judge(recipe_file, tmp_path, monkeypatch):
    """The longer completion wins, as samples.jsonl says."""
    sets = ("align.max_steps=1", "sample.max_new_tokens=6", "eval.diversity_prompts=0")
    recipe = load_recipe(recipe_file, sets)
    monkeypatch.setitem(JUDGES, "longest", longest_of)
    recipe = replace(recipe, judge=JudgeWithLongest(longest=True))
    run = tmp_path / "run"
    run_through("eval", recipe, RunDir(run), restart=False)
    (rate,) = json.loads((run / "eval/results.json").read_text())["win_rates"]
    lengths = {"policy": {}, "reference": {}}
    for sample in map(json.loads, (run / "sample/samples.jsonl").read_text().splitlines()):
        lengths[sample["model"]][sample["prompt_id"]] = len(sample["completion"])
    differences = [
        length - lengths["reference"][prompt] for prompt, length in lengths["policy"].items()
    ]
    assert (rate["judge"], len(differences)) == ("longest", 8)
    assert (rate["wins"], rate["losses"]) == (
        sum(d > 0 for d in differences),
        sum(d < 0 for d in differences),
    )


def write_lengths(recipe, run_dir, processes):
    path = run_dir.begin(LENGTHS, recipe) / "lengths.json"
    store = PairStore(run_dir.stage("prepare") / "train")
    path.write_text(json.dumps(store.chosen_lengths.tolist()))
    run_dir.finish("lengths", [path], {})
    report_lengths(recipe, run_dir)


def report_lengths(recipe, run_dir):
    console.say(f"the lengths are in {run_dir.stage('lengths')}")


LENGTHS = Stage(
    name="lengths",
    needs=lambda recipe: ("prepare",),
    keys=("data.",),
    run=write_lengths,
    report=report_lengths,
)


def test_a_stage(recipe_file, tmp_path, monkeypatch, capsys):
    """An object in the table: it runs what it needs first, nothing when it is up to date, and stops
    at changed inputs."""
    monkeypatch.setitem(STAGES, "lengths", LENGTHS)
    run = run_stage("lengths", recipe_file, tmp_path / "run")
    assert len(json.loads((run / "lengths/lengths.json").read_text())) == 40
    assert (
        run / "prepare/manifest.json"
    ).exists() and "the lengths are in" in capsys.readouterr().err
    run_stage("lengths", recipe_file, run)
    assert "lengths is up to date" in capsys.readouterr().err
    with pytest.raises(
        TbpoError, match="the inputs of a stage changed since it was run: prepare, lengths"
    ):
        run_stage("lengths", recipe_file, run, "data.max_length=100")
