"""A stage of a round: the judge's mark of every answer."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges import marker_of
from tbpo_cli.runs.files import json_lines, write_whole
from tbpo_cli.runs.launch import ALONE, Processes, run_or_launch
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage

Json = dict[str, Any]
Key = tuple[str, int]  # prompt, number of the answer

ANSWERS = "answers.jsonl"
EMPTY = "the answer is empty"
NO_NUMBER = "the judge gives no finite number"


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Writes answers.jsonl: a row for each prompt, with all its answers and their marks.

    Raises:
        TbpoError: if the judge cannot be made or asked, or marks none of the answers.
    """
    run_or_launch(STAGE, recipe, run_dir, processes)
    folder = run_dir.stage("mark")
    marks = {(one["prompt_id"], one["sample"]): one for one in _written(folder)}
    samples = _samples(run_dir)
    missing = Counter(one["why"] for one in marks.values() if one["mark"] is None)
    if missing.total() == len(samples):
        (why, _), *_ = missing.most_common()
        what = f"the judge marks none of {len(samples):,} answers: {why}"
        raise TbpoError(what, str(folder), "marks that are finite numbers", "change [judge]")
    rows = [
        _row([*of_prompt], marks)
        for _, of_prompt in itertools.groupby(samples, key=lambda one: one["prompt_id"])
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(folder / ANSWERS, text)
    for part in folder.glob("part-*.jsonl"):
        part.unlink()
    facts = {"num_answers": len(samples), "without_mark": missing}
    run_dir.finish("mark", [folder / ANSWERS], facts)
    report(recipe, run_dir)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the mean mark, and how many answers have none."""
    facts = run_dir.manifest("mark")
    rows = json_lines(run_dir.stage("mark") / ANSWERS)
    marks = [mark for row in rows for mark in row["scores"] if mark is not None]
    where = console.short(run_dir.stage("mark") / ANSWERS)
    console.say(
        f"{facts['num_answers']:,} answers to {len(rows):,} prompts, mean mark {fmean(marks):.4g}:"
        f" {where}"
    )
    for why, number in facts["without_mark"].items():
        console.say(f"{number:,} answers have no mark: {why}")


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """Marks in this process, which may be one of several; each writes its own part."""
    from tbpo_cli.train.group import Group

    group = Group.of_environment()
    folder = run_dir.begin(STAGE, recipe) if group.is_main else run_dir.stage("mark")
    done = {(one["prompt_id"], one["sample"]) for one in _written(folder)}
    group.gather(None)  # nobody writes before all have read what is there
    left = [one for one in _samples(run_dir) if (one["prompt_id"], one["sample"]) not in done]
    asked = group.share(left)
    with (folder / f"part-{group.rank}.jsonl").open("a", encoding="utf-8") as part:
        if part.tell():  # its last line may have been cut short
            part.write("\n")
        for line in _marked(recipe, run_dir, asked):
            part.write(json.dumps(line) + "\n")
            part.flush()
    group.gather(None)


def _marked(recipe: Recipe, run_dir: RunDir, samples: list[Json]) -> list[Json]:
    raise NotImplementedError


def _samples(run_dir: RunDir) -> list[Json]:
    return json_lines(run_dir.stage("sample") / "samples.jsonl")


def _written(folder: Path) -> list[Json]:
    """What is in the parts; lines that were cut short are left out."""
    return [
        line
        for part in sorted(folder.glob("part-*.jsonl"))
        for line in json_lines(part, may_be_cut=True)
    ]


def _row(samples: list[Json], marks: dict[Key, Json]) -> Json:
    """All answers to a prompt, as a row of several answers with scores."""
    first = samples[0]
    row: Json = {"prompt": first["messages"]}
    row |= {"tools": first["tools"]} if "tools" in first else {}
    return row | {
        "answers": [one["completion"] for one in samples],
        "scores": [marks[one["prompt_id"], one["sample"]]["mark"] for one in samples],
        "truncated": [one["finish_reason"] != "stop" for one in samples],
        "num_tokens": [one["num_tokens"] for one in samples],
    }


STAGE = Stage(
    name="mark",
    needs=lambda recipe: ("sample",),
    keys=("judge.",),
    run=run,
    report=report,
    work=work,
)
