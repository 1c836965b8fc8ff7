"""The first stage of rounds: the prompts of the rows, dealt out to the rounds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.config.toml import ENCODING_FILES
from tbpo_cli.data.dealing import Dealt, Question, are_prompts_alone, deal, questions_of
from tbpo_cli.data.held_out import held_out_prompts
from tbpo_cli.data.tokenizer import load_chat
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import write_whole
from tbpo_cli.runs.launch import ALONE, Processes
from tbpo_cli.runs.rounds import HELD_OUT, PROMPTS
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage

EXCERPT_CHARACTERS = 200


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Writes N.jsonl for each round, held_out.jsonl, and rejects.jsonl with what has no prompt.

    Raises:
        TbpoError: if the rows cannot be read, a round has no prompt, or none is held out.
    """
    folder = run_dir.begin(STAGE, recipe)
    data = recipe.data
    settings = recipe.rounds
    assert settings is not None
    seed = recipe.run.seed
    chat = load_chat(recipe.model, data.template_date)
    rejects: list[dict[str, Any]] = []

    def read(key: str) -> list[Question]:
        sources, split = (
            (data.eval, data.eval_split) if key == "data.eval" else (data.train, data.train_split)
        )
        found = []
        for one in questions_of(sources or (), split, key, data, chat, seed):
            if isinstance(one, Question):
                found.append(one)
                continue
            row, reason = one
            line = {"from": key, "source": row.source, "row": row.number}
            line |= {"reason": reason.reason, "detail": reason.detail}
            excerpt = json.dumps(row.content, default=str)[:EXCERPT_CHARACTERS]
            rejects.append(line | {"excerpt": excerpt})
        return found

    questions = read("data.train")
    has_pairs = False
    if data.eval is not None:
        measured = read("data.eval")
        has_pairs = not are_prompts_alone(data.eval[0], data.eval_split, "data.eval", data)
    else:
        names = [each.prompt_hash for each in questions]
        drawn = held_out_prompts(names, data.eval_fraction or 0.0, seed)
        measured = [each for each in questions if each.prompt_hash in drawn]
    dealt = deal(questions, measured, settings, seed)
    _write_lines(folder / "rejects.jsonl", rejects)
    _check(recipe, dealt, rejects, folder)
    for old in folder.glob("[0-9]*.jsonl"):
        old.unlink()
    parts = {str(number): part for number, part in enumerate(dealt.rounds, 1)}
    for name, part in (parts | {HELD_OUT: dealt.held_out}).items():
        _write_lines(folder / f"{name}.jsonl", [each.as_row() for each in part])
    facts = {
        "prompts": [len(part) for part in dealt.rounds],
        "held_out": len(dealt.held_out),
        "rejected": Counter(line["reason"] for line in rejects),
        "eval_has_pairs": has_pairs,
    }
    run_dir.finish(PROMPTS, [*folder.glob("*.jsonl")], facts)
    report(recipe, run_dir)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows how many prompts each round has."""
    facts = run_dir.manifest(PROMPTS)
    counts = ", ".join(f"{number:,}" for number in facts["prompts"])
    console.say(f"prompts of the rounds: {counts}; held out: {facts['held_out']:,}")
    for reason, number in facts["rejected"].items():
        where = console.short(run_dir.stage(PROMPTS) / "rejects.jsonl")
        console.say(f"{number:,} rows have no usable prompt ({reason}): {where}")


def _check(recipe: Recipe, dealt: Dealt, rejects: list[dict[str, Any]], folder: Path) -> None:
    """Raises TbpoError if a round has no prompt, none is held out, or too many rows have none."""
    rows = sum(map(len, dealt.rounds)) + len(rejects)
    where = ", ".join(source.path for source in recipe.data.train)
    if rejects and len(rejects) > recipe.data.max_reject_fraction * rows:
        first = rejects[0]
        reason = f"{first['reason']} {first['detail']}".strip()
        raise TbpoError(
            f"{len(rejects):,} of {rows:,} rows have no usable prompt",
            f"{folder / 'rejects.jsonl'}; first {first['source']}, row {first['row']}: {reason}",
            f"prompts, and at most {recipe.data.max_reject_fraction:.0%} rows without one",
            "mend the rows, name their columns in [data.columns], or raise "
            "data.max_reject_fraction",
        )
    if not all(dealt.rounds):
        number = len(dealt.rounds)
        what = f"there are fewer prompts than rounds: {rows:,} for {number}"
        raise TbpoError(what, where, "at least a prompt a round", 'rounds.prompts = "same"')
    if not dealt.held_out:
        fix = "give data.eval, or data.eval_fraction above 0"
        raise TbpoError("no prompt is held out", where, "prompts to measure on", fix)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


STAGE = Stage(
    name=PROMPTS,
    needs=lambda recipe: (),
    keys=(
        "run.seed",
        "model.base",
        "model.revision",
        "model.chat_template",
        "data.",
        "rounds.number",
        "rounds.prompts",
        "rounds.held_out_prompts",
    ),
    run=run,
    report=report,
    base_files=ENCODING_FILES,
    renews=lambda run_dir: True,
)
