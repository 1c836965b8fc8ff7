"""Answers in the formats of AlpacaEval and Arena-Hard: those of published models are read, to be
compared with, and our own are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import json_lines, write_whole

Json = dict[str, Any]
IDS = ("uid", "question_id")  # of a question of Arena-Hard 2 and 0.1


def names_of_answers(files: Sequence[str], others: Sequence[str]) -> list[str]:
    """What the opponents are called: by their files, or by the folders of AlpacaEval's; by their
    paths where these are not distinct, or `others` or the models of every evaluation have them.
    """
    paths = [Path(file) for file in files]
    names = [path.parent.name if path.stem == "model_outputs" else path.stem for path in paths]
    taken = {"policy", "reference", "chosen", *others}
    are_distinct = len({*names, *taken}) == len(names) + len(taken)
    return names if are_distinct else list(files)


def read_answers(file: str) -> dict[str, str]:
    """The answers in a file by the texts of their prompts, or by the ids of their questions.

    Source: the formats of AlpacaEval (a list with `instruction`, `input` if need be, and `output`)
    and of Arena-Hard (JSON lines with `messages`, the last one being the answer; in version 0.1
    with `question_id` and `choices`); or lines with `prompt` and `completion`.

    Raises:
        TbpoError: if the file has none, or two that differ to one prompt.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else json_lines(path)
        answers: dict[str, str] = {}
        for prompt, answer in map(_answer, rows):
            if answers.setdefault(prompt, answer) != answer:
                raise ValueError(f"two answers to one prompt: {prompt[:80]!r}")
        return answers
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        expected = "JSON with instruction and output, prompt and completion, or messages in a row"
        what = f"the answers cannot be read: {type(error).__name__}: {error}"
        raise TbpoError(what, f"eval.answers: {file}", expected) from None


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
    text, answer_id = sample["completion"], f"{model}:{sample['prompt_id']}"
    if row.get("uid") is not None:
        said = {"role": "assistant", "content": {"answer": text}}
        messages = [*sample["messages"], said]
        return {"uid": row["uid"], "ans_id": answer_id, "model": model, "messages": messages}
    choices = [{"index": 0, "turns": [{"content": text}]}]
    about = {"question_id": row["question_id"], "answer_id": answer_id, "model_id": model}
    return about | {"choices": choices}


def _answer(row: Json) -> tuple[str, str]:
    """(prompt or id of the question, answer) of a row."""
    if "choices" in row:
        return question_id(row), _text(row["choices"][0]["turns"][-1]["content"])
    if "messages" in row:
        *_, prompt, answer = row["messages"]
        content = answer["content"]
        text = content["answer"] if isinstance(content, dict) else content
        return _text(prompt["content"]), _text(text)
    prompt = row["instruction"] if "instruction" in row else row["prompt"]
    if row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    return _text(prompt), _text(row["output"] if "output" in row else row["completion"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no text")
    return value.strip()
