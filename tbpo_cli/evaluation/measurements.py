"""What an evaluation measures of which model, and what each measurement depends on.

A measurement is kept in a file that is named by the hash of what it depends on. So another
opponent, suite, judge or gate adds measurements, and changes none that is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.evaluation.candidates import Candidate
from tbpo_cli.evaluation.diversity import PROTOCOL
from tbpo_cli.evaluation.kept import Kept, without_numbers
from tbpo_cli.evaluation.measures import is_chat, tasks_of
from tbpo_cli.model.policy import POLICY, REFERENCE
from tbpo_cli.runs.run_dir import RunDir

Json = dict[str, Any]
Rows = list[Json]

# Keys of [sample] that say which models answer, and how fast; not what one of them says. The two of
# OF_THE_POLICY say what answers in its place.
NOT_OF_AN_ANSWER = ("models", "adapter", "endpoint", "endpoint_model", "batch_size")
OF_THE_POLICY = ("adapter", "endpoint_model")


@dataclass(frozen=True)
class Measurement(Kept):
    """One thing that is measured of one model.

    Args:
        candidate: the model.
        suite: the suite, where that is what is measured.
    """

    candidate: Candidate
    suite: str = ""


def measurements_of(
    recipe: Recipe, run_dir: RunDir, candidates: list[Candidate], inputs: Json
) -> list[Measurement]:
    """Every measurement that [eval] asks for.

    Args:
        inputs: what the stage is made from, as the run directory has noted it.
    """
    settings = recipe.eval
    base = inputs_under(inputs, "model")
    pairs = _held_out(run_dir)
    drawn = {"pairs": pairs, "seed": recipe.run.seed, "date": recipe.data.template_date}
    weights = {each.view: _weights(each, recipe, run_dir, inputs) for each in candidates}
    found = []
    for each in candidates:
        own: Json = {"base": base, "weights": weights[each.view]}
        reference = None if each.view == REFERENCE else weights[REFERENCE]
        compared = own | {"reference": reference, "pairs": pairs, "reverse": recipe.align.reverse}
        found.append(Measurement("preference", compared, each))
        if settings.diversity_prompts:
            protocol = {"protocol": PROTOCOL, "prompts": settings.diversity_prompts}
            found.append(Measurement("diversity", own | drawn | protocol, each))
        if recipe.judge_of_eval is not None and each.name not in recipe.sample.models:
            asked_for = _asked_for(recipe, run_dir, each.view == POLICY)
            found.append(Measurement("answers", own | asked_for, each))
        for suite in settings.suites:
            asked: Json = {
                "suite": suite,
                "tasks": tasks_of(suite),
                "files": _task_file(inputs, suite),
            }
            if any(is_chat(task) for task, _ in tasks_of(suite)):
                asked["chat"] = True
            found.append(Measurement("suite", own | asked, each, suite))
    return found


def answers_of_stage(recipe: Recipe, run_dir: RunDir) -> dict[str, Kept]:
    """What the sample stage keeps of its answers, by the name of the model, once it is begun.

    An answer of the reference is the same that `measurements_of` asks for.
    """
    base = inputs_under(run_dir.started_from("sample"), "model")
    weights = {
        "policy": "" if recipe.sample.adapter else run_dir.outputs_hash("align"),
        "reference": _weights_of_reference(recipe, run_dir),
    }
    return {
        name: Kept(
            "answers",
            without_numbers(
                {"base": base, "weights": weights[name]}
                | _asked_for(recipe, run_dir, name == "policy")
            ),
        )
        for name in recipe.sample.models
    }


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


def _held_out(run_dir: RunDir) -> Json:
    """The hashes of the held-out pairs, as far as the run has prepared any."""
    outputs = run_dir.manifest("prepare").get("outputs", {})
    return {name: sha for name, sha in outputs.items() if name.startswith("eval/")}


def _asked_for(recipe: Recipe, run_dir: RunDir, is_policy: bool) -> Json:
    """What an answer to a prompt of the sample stage depends on, beside the weights."""
    inputs = inputs_under(run_dir.started_from("sample"), "sample")
    for key in NOT_OF_AN_ANSWER:
        if not (is_policy and key in OF_THE_POLICY):
            inputs["settings"].pop(f"sample.{key}", None)
            inputs["files"].pop(f"sample.{key}", None)
    return {
        "pairs": _held_out(run_dir) if recipe.sample.prompts == "eval" else {},
        "seed": recipe.run.seed,
        "date": recipe.data.template_date,
        "sample": inputs,
    }


def _weights(candidate: Candidate, recipe: Recipe, run_dir: RunDir, inputs: Json) -> Any:
    """What names the weights of a model, beside those of the base."""
    if candidate.view == POLICY:
        return run_dir.outputs_hash("align")
    if candidate.view == REFERENCE:
        return _weights_of_reference(recipe, run_dir)
    folder = Path(candidate.source)
    if RunDir(folder).manifest("align"):
        return RunDir(folder).outputs_hash("align")
    files = inputs["files"].get("eval.against", {})
    hashes = [file["sha256"] for path, file in files.items() if Path(path).is_relative_to(folder)]
    return sorted(hashes) or candidate.source


def _weights_of_reference(recipe: Recipe, run_dir: RunDir) -> str:
    return run_dir.outputs_hash("sft") if recipe.sft is not None else ""


def _task_file(inputs: Json, suite: str) -> str | None:
    file = inputs["files"].get("eval.suites", {}).get(suite)
    return file["sha256"] if file else None
