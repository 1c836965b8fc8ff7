"""The judge that is a function of the user's: `judge.scorer`."""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
import traceback
from pathlib import Path

from tbpo_cli.config.judging import Judge as Settings
from tbpo_cli.data.pairs import Messages
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.judge import Judge, score_judge


def judge_of(settings: Settings, table: str, cache: Path | None = None) -> Judge:
    """A judge from a user's function of the last user message's text and the completion.

    An answer for which it fails, ends the process or gives no finite number has no mark.

    Raises:
        TbpoError: if there is no such function.
    """
    assert settings.scorer is not None
    source, key = settings.scorer, f"{table}.scorer"
    file, _, name = source.removeprefix("python:").rpartition(":")
    path = Path(file)
    where = f"{key} = {source!r}"
    if not path.is_file() or path.suffix != ".py":
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1)
        fix = f"did you mean {near[0]}?" if near else f"change {key}"
        raise TbpoError("the scorer's file is not there", where, '"python:FILE:NAME"', fix)
    spec = importlib.util.spec_from_file_location(f"tbpo_scorer_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failure("the scorer's file cannot be imported", error, file) from error
    if not callable(function := getattr(module, name, None)):
        near = difflib.get_close_matches(
            name, [key for key, value in vars(module).items() if callable(value)], 1
        )
        fix = f"did you mean {near[0]}?" if near else f"write it, or change {key}"
        raise TbpoError(
            f"the scorer's file has no function {name}", where, "def NAME(prompt, completion)", fix
        )

    def score(prompt: Messages, completion: str) -> float | TbpoError:
        text = next(
            (message["content"] for message in reversed(prompt) if message["role"] == "user"), ""
        )
        try:
            value = function(text, completion)
            if isinstance(value, str | bytes) or not math.isfinite(value):
                raise ValueError(f"it returned {value!r:.100}")
            return float(value)
        except (Exception, SystemExit) as error:
            what = f"the scorer {name} fails for the prompt {text[:200]!r}"
            failure = _failure(what, error, file)
            failure.__cause__ = error
            return failure

    return score_judge(
        f"{path.name}:{name}", lambda answers: (score(*answer) for answer in answers), cache
    )


def _failure(what: str, error: BaseException, file: str) -> TbpoError:
    lines = [
        f", line {frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    where = file + "".join(lines[-1:])
    return TbpoError(
        f"{what}: {type(error).__name__}: {error}", where, "a finite number", "mend the function"
    )
