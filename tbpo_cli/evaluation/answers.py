"""Answers from files: those of a published model, which the policy is compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import json_lines


def names_of_answers(files: Sequence[str]) -> list[str]:
    """What the opponents are called: by their files, or by the folders of AlpacaEval's."""
    paths = [Path(file) for file in files]
    return [path.parent.name if path.stem == "model_outputs" else path.stem for path in paths]


def read_answers(file: str) -> dict[str, str]:
    """The answers in a file by the texts of their prompts.

    Source: the formats of AlpacaEval (a list with `instruction` and `output`) and of Arena-Hard
    (JSON lines with `messages`, the last one being the answer); or lines with `prompt` and
    `completion`.

    Raises:
        TbpoError: if the file has none.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else json_lines(path)
        return dict(_answer(row) for row in rows)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        expected = "JSON with instruction and output, prompt and completion, or messages in a row"
        what = f"the answers cannot be read: {type(error).__name__}: {error}"
        raise TbpoError(what, f"eval.answers: {file}", expected) from None


def _answer(row: dict[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of a row."""
    if "messages" in row:
        *_, prompt, answer = row["messages"]
        content = answer["content"]
        text = content["answer"] if isinstance(content, dict) else content
        return _text(prompt["content"]), _text(text)
    prompt = row["instruction"] if "instruction" in row else row["prompt"]
    return _text(prompt), _text(row["output"] if "output" in row else row["completion"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no text")
    return value.strip()
