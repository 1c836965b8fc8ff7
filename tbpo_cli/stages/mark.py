"""A stage of a round: the judge's mark of every answer."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from statistics import fmean
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.prompts import conversations_of
from tbpo_cli.evaluation.judges import check_prompts, marker_of
from tbpo_cli.evaluation.judges.judge import Mark
from tbpo_cli.runs.files import json_lines, write_whole
from tbpo_cli.runs.launch import ALONE, Processes, run_or_launch
from tbpo_cli.runs.rounds import root_of
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage

Json = dict[str, Any]

ANSWERS = "answers.jsonl"
SHOWN_REASONS = 5  # why answers have no mark, from the most frequent on
EMPTY = "the answer is empty"
# Not the address of a language model, its price, nor the template by which it compares two.
KEYS = (
    "judge.scorer",
    "judge.reward_model",
    "judge.model",
    "judge.mark_template",
    "judge.scale",
    "judge.body",
    "judge.repeats",
    "eval.thinking",
)


def check_before_sampling(recipe: Recipe, run_dir: RunDir) -> None:
    """Raises TbpoError if the judge could mark no answer to the prompts."""
    prompts = conversations_of(recipe, run_dir.stage("prepare") / "eval")
    check_prompts(recipe.judge, "judge", [*prompts.values()])


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Writes answers.jsonl: a row for each prompt, with all its answers and their marks.

    Raises:
        TbpoError: if the judge cannot be made or asked, or marks none of the answers.
    """
    started = time.monotonic()
    run_or_launch(STAGE, recipe, run_dir, processes)
    folder = run_dir.stage("mark")
    parts = [*folder.glob(".part-*.jsonl")]
    marks = {line["answer"]: line for part in parts for line in json_lines(part)}
    samples = _samples(run_dir)
    marked = [(one, marks[place]) for place, one in enumerate(samples)]
    rows = [
        _row([*of_prompt])
        for _, of_prompt in itertools.groupby(marked, key=lambda pair: pair[0]["prompt_id"])
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(folder / ANSWERS, text)
    for part in parts:
        part.unlink()
    missing = Counter(line["reason"] for line in marks.values() if line["mark"] is None)
    facts = {
        "num_answers": len(samples),
        "num_without_mark": missing.total(),
        "without_mark": dict(missing.most_common(SHOWN_REASONS)),
        "judge_tokens": [sum(line["tokens"][side] for line in marks.values()) for side in (0, 1)],
        "seconds": round(time.monotonic() - started, 1),
    }
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
    if facts["num_without_mark"]:
        why = next(iter(facts["without_mark"]))
        console.say(f"{facts['num_without_mark']:,} answers have no mark, most of all: {why}")


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """Marks in this process, which may be one of several; each writes its own part.

    A server is asked by the first process alone, which has several requests on the way.
    """
    from tbpo_cli.evaluation.judges.own_words import without_thinking
    from tbpo_cli.train.group import Group

    group = Group.of_environment()
    folder = run_dir.begin(STAGE, recipe) if group.is_main else run_dir.stage("mark")
    group.gather(None)
    samples = _samples(run_dir)
    places = [*range(len(samples))]
    is_served = recipe.judge is not None and recipe.judge.endpoint is not None
    mine = (places if group.is_main else []) if is_served else group.share(places)
    texts = {
        place: without_thinking(samples[place]["completion"], recipe.eval.thinking)
        for place in mine
    }
    asked = [place for place in mine if texts[place].strip()]
    kept = folder / f".scores-{group.rank}.jsonl"
    judge = marker_of(
        recipe, lambda key: root_of(run_dir) / "judge-cache.jsonl" if is_served else kept
    )
    answers = [(tuple(samples[place]["messages"]), texts[place]) for place in asked]
    marks = dict.fromkeys(mine, Mark(None, EMPTY))
    if asked:
        marks |= zip(asked, judge.mark(answers), strict=True)
    lines = [{"answer": place, **_line(mark)} for place, mark in marks.items()]
    write_whole(
        folder / f".part-{group.rank}.jsonl", "".join(json.dumps(line) + "\n" for line in lines)
    )
    group.gather(None)


def _line(mark: Mark) -> Json:
    return {"mark": mark.value, "reason": mark.reason, "tokens": mark.tokens}


def _samples(run_dir: RunDir) -> list[Json]:
    return json_lines(run_dir.stage("sample") / "samples.jsonl")


def _row(marked: list[tuple[Json, Json]]) -> Json:
    """All answers to a prompt, as a row of several answers with scores."""
    (first, _), *_ = marked
    row: Json = {"prompt": first["messages"]}
    row |= {"tools": first["tools"]} if "tools" in first else {}
    return row | {
        "answers": [one["completion"] for one, _ in marked],
        "scores": [line["mark"] for _, line in marked],
        "truncated": [one["finish_reason"] != "stop" for one, _ in marked],
        "num_tokens": [one["num_tokens"] for one, _ in marked],
    }


STAGE = Stage(
    name="mark",
    needs=lambda recipe: ("sample",),
    keys=KEYS,
    run=run,
    report=report,
    work=work,
    checks_before={"sample": check_before_sampling},
)
