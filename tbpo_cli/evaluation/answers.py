"""Answers of ours in the formats of AlpacaEval and Arena-Hard; what files of answers are called."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tbpo_cli.runs.files import write_whole

Json = dict[str, Any]
OF_EVERY_EVALUATION = ("policy", "reference", "chosen")  # names of models
IDS = ("uid", "question_id")  # of a question of Arena-Hard 2 and 0.1


def names_of_answers(files: Sequence[str], others: Sequence[str]) -> list[str]:
    """What the opponents are called: by their files, or by the folders of AlpacaEval's; with the
    folders above where these are not distinct, or `others` have them.
    """
    paths = [Path(file) for file in files]
    own = [path.parent if path.stem == "model_outputs" else path.with_suffix("") for path in paths]
    return distinct_names(files, own, others)


def distinct_names(
    sources: Sequence[str], paths: Sequence[Path], others: Sequence[str] = ()
) -> list[str]:
    """The shortest end of each path that no other one has, nor anything else that has a name; the
    sources, if two paths are the same.

    Args:
        paths: of the sources, as they are to be called.
        others: names that are taken, beside those of the models of every evaluation.
    """
    taken = {*OF_EVERY_EVALUATION, *others}
    ends = [_ends(path) for path in paths]
    names = []
    for place, own in enumerate(ends):
        of_others = {end for number, each in enumerate(ends) if number != place for end in each}
        free = (end for end in own if end not in taken and end not in of_others)
        names.append(next(free, sources[place]))
    return names if len({*names}) == len(names) else list(sources)


def _ends(path: Path) -> list[str]:
    """The last part of a path, the last two parts, and so on."""
    parts = path.relative_to(path.anchor).parts
    return ["/".join(parts[-size:]) for size in range(1, len(parts) + 1)]


def question_id(row: Any) -> str:
    """What Arena-Hard calls a question, or the question of an answer; "" in other rows."""
    ids = [row.get(name) for name in IDS] if isinstance(row, dict) else []
    return next((str(each) for each in ids if each is not None), "")


def write_answers(folder: Path, rows: Mapping[str, Any], samples: Sequence[Json]) -> list[Path]:
    """Writes each model's first samples in the format of the benchmark whose prompts they answer.

    Source: AlpacaEval's `model_outputs.json`; Arena-Hard's `model_answer/MODEL.jsonl`, of version 2
    where questions have a `uid` and of version 0.1 where they have a `question_id`. What differs:
    no counts of tokens and Markdown, which its style control reads.

    Args:
        folder: where the files are put.
        rows: of the prompts' file, by the prompts' ids.
        samples: with their name as `model`.

    Returns:
        The files; none for prompts of another kind.
    """
    made: dict[str, list[Json]] = {}
    write: Callable[[Json, str, Json], Json]
    if rows and all(map(question_id, rows.values())):
        write = _for_arena_hard
    elif rows and all(isinstance(row, dict) and "instruction" in row for row in rows.values()):
        write = _for_alpaca_eval
    else:
        return []
    for sample in samples:
        if sample["sample"] == 0:
            model = sample["model"]
            made.setdefault(model, []).append(write(rows[sample["prompt_id"]], model, sample))
    paths = []
    for model, answers in made.items():
        if write is _for_alpaca_eval:
            path = folder / model / "model_outputs.json"
            text = json.dumps(answers, indent=1, ensure_ascii=False) + "\n"
        else:
            path = folder / f"{model}.jsonl"
            text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
        paths.append(path)
    return paths


def _for_alpaca_eval(row: Json, model: str, sample: Json) -> Json:
    asked = {name: row[name] for name in ("dataset", "instruction", "input") if name in row}
    return asked | {"output": sample["completion"], "generator": model}


def _for_arena_hard(row: Json, model: str, sample: Json) -> Json:
    text = sample["completion"]
    answer_id = f"{model}:{sample['prompt_id']}"
    if row.get("uid") is not None:
        said = {"role": "assistant", "content": {"answer": text}}
        messages = [*sample["messages"], said]
        return {"uid": row["uid"], "ans_id": answer_id, "model": model, "messages": messages}
    choices = [{"index": 0, "turns": [{"content": text}]}]
    about = {"question_id": row["question_id"], "answer_id": answer_id, "model_id": model}
    return about | {"choices": choices}
