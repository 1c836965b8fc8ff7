"""The judge that is a function of the user's: `eval.scorer`."""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
import traceback
from pathlib import Path

from tbpo_cli.data.pairs import Messages
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.judge import Judge, score_judge


def judge_of(source: str, cache: Path | None = None) -> Judge:
    """A judge from a user's function of the last user message's text and the completion.

    Args:
        source: "python:FILE:NAME".

    Raises:
        TbpoError: if there is no such function; later, with the prompt, if it fails, ends the
            process or gives no finite number.
    """
    file, _, name = source.removeprefix("python:").rpartition(":")
    path = Path(file)
    where = f"eval.scorer = {source!r}"
    if not path.is_file() or path.suffix != ".py":
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1)
        fix = f"did you mean {near[0]}?" if near else "change eval.scorer"
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
        fix = f"did you mean {near[0]}?" if near else "write it, or change eval.scorer"
        raise TbpoError(
            f"the scorer's file has no function {name}", where, "def NAME(prompt, completion)", fix
        )

    def score(prompt: Messages, completion: str) -> float:
        text = next(
            (message["content"] for message in reversed(prompt) if message["role"] == "user"), ""
        )
        try:
            value = function(text, completion)
            if isinstance(value, str | bytes) or not math.isfinite(value):
                raise ValueError(f"it returned {value!r:.100}")
            return float(value)
        except (Exception, SystemExit) as error:
            raise _failure(
                f"the scorer {name} fails for the prompt {text[:200]!r}", error, file
            ) from error

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
