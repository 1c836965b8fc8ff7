"""What an evaluation measures of which model, and what each measurement depends on.

A measurement is kept in a file that is named by the hash of what it depends on. So another
opponent, suite, judge or gate adds measurements, and changes none that is there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.evaluation.candidates import Candidate
from tbpo_cli.evaluation.diversity import PROTOCOL
from tbpo_cli.evaluation.measures import is_chat, tasks_of
from tbpo_cli.model.policy import POLICY, REFERENCE
from tbpo_cli.runs.files import read_sealed, write_sealed
from tbpo_cli.runs.run_dir import RunDir

Json = dict[str, Any]
Rows = list[Json]

# Keys of [sample] that say which models answer, and how fast; not what one of them says.
NOT_OF_AN_ANSWER = ("models", "adapter", "endpoint", "endpoint_model", "batch_size")


@dataclass(frozen=True)
class Measurement:
    """One thing that is measured of one model.

    Args:
        candidate: the model.
        what: the method of `Measurer` that measures it.
        suite: the suite, where that is what is measured.
        depends_on: all that could change the rows.
    """

    candidate: Candidate
    what: str
    suite: str
    depends_on: Json

    def path(self, folder: Path) -> Path:
        """Its file in a folder of measurements."""
        return folder / f"{self.what}-{digest(self.depends_on)}.json"

    def read(self, folder: Path) -> Rows:
        """The rows; none if it was not made. Raises TbpoError if the file is damaged."""
        rows: Rows = read_sealed(self.path(folder)).get("rows", [])
        return rows

    def write(self, folder: Path, rows: Rows) -> None:
        """Keeps the rows."""
        write_sealed(self.path(folder), {"depends_on": self.depends_on, "rows": rows})


def measurements_of(
    recipe: Recipe, run_dir: RunDir, candidates: list[Candidate], inputs: Json
) -> list[Measurement]:
    """Every measurement that [eval] asks for.

    Args:
        inputs: what the stage is made from, as the run directory has noted it.
    """
    settings = recipe.eval
    base = inputs_under(inputs, "model")
    pairs = run_dir.manifest("prepare")["outputs"]
    pairs = {name: sha for name, sha in pairs.items() if name.startswith("eval/")}
    drawn = {"pairs": pairs, "seed": recipe.run.seed, "date": recipe.data.template_date}
    sampling = _sampling(run_dir)
    weights = {each.view: _weights(each, recipe, run_dir, inputs) for each in candidates}
    found = []
    for each in candidates:
        own: Json = {"base": base, "weights": weights[each.view]}
        reference = None if each.view == REFERENCE else weights[REFERENCE]
        compared = own | {"reference": reference, "pairs": pairs, "reverse": recipe.align.reverse}
        found.append(Measurement(each, "preference", "", compared))
        if settings.diversity_prompts:
            protocol = {"protocol": PROTOCOL, "prompts": settings.diversity_prompts}
            found.append(Measurement(each, "diversity", "", own | drawn | protocol))
        if recipe.judge_of_eval is not None and each.name not in recipe.sample.models:
            found.append(Measurement(each, "answers", "", own | drawn | {"sample": sampling}))
        for suite in settings.suites:
            asked: Json = {
                "suite": suite,
                "tasks": tasks_of(suite),
                "files": _task_file(inputs, suite),
            }
            if any(is_chat(task) for task, _ in tasks_of(suite)):
                asked["chat"] = True
            found.append(Measurement(each, "suite", suite, own | asked))
    return found


def inputs_under(inputs: Json, key: str) -> Json:
    """The part of a stage's inputs that is under a key of the recipe: settings and hashes."""
    is_under = {
        name: name == key or name.startswith(f"{key}.")
        for name in (*inputs["settings"], *inputs["files"])
    }
    settings = {name: value for name, value in inputs["settings"].items() if is_under[name]}
    files = {
        name: sorted(file["sha256"] for file in files.values())
        for name, files in inputs["files"].items()
        if is_under[name]
    }
    return {"settings": settings, "files": files}


def digest(depends_on: Json) -> str:
    """16 hex digits that name what something depends on."""
    text = json.dumps(depends_on, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sampling(run_dir: RunDir) -> Json:
    """What an answer to a prompt of the sample stage depends on, beside the model."""
    inputs = inputs_under(run_dir.started_from("sample"), "sample")
    for key in NOT_OF_AN_ANSWER:
        inputs["settings"].pop(f"sample.{key}", None)
        inputs["files"].pop(f"sample.{key}", None)
    return inputs


def _weights(candidate: Candidate, recipe: Recipe, run_dir: RunDir, inputs: Json) -> Any:
    """What names the weights of a model, beside those of the base."""
    if candidate.view == POLICY:
        return run_dir.outputs_hash("align")
    if candidate.view == REFERENCE:
        return run_dir.outputs_hash("sft") if recipe.sft is not None else ""
    folder = Path(candidate.source)
    if RunDir(folder).manifest("align"):
        return RunDir(folder).outputs_hash("align")
    files = inputs["files"].get("eval.against", {})
    hashes = [file["sha256"] for path, file in files.items() if Path(path).is_relative_to(folder)]
    return sorted(hashes) or candidate.source


def _task_file(inputs: Json, suite: str) -> str | None:
    file = inputs["files"].get("eval.suites", {}).get(suite)
    return file["sha256"] if file else None
