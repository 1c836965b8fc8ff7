"""The judge that is a function of the user's: `judge.scorer`."""

from __future__ import annotations

import difflib
from pathlib import Path

from tbpo_cli.config.judging import Judge as Settings
from tbpo_cli.data.pairs import Messages
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.judge import Judge, score_judge
from tbpo_cli.evaluation.user_function import Failure, UserFunction


def judge_of(settings: Settings, table: str, cache: Path | None = None) -> Judge:
    """A judge from a user's function of the last user message's text and the completion.

    It runs in a process of its own. An answer for which it fails or gives no finite number has no
    mark.

    Raises:
        TbpoError: if there is no such function; later, if it ends its process.
    """
    assert settings.scorer is not None
    source = settings.scorer
    key = f"{table}.scorer"
    file, _, name = source.removeprefix("python:").rpartition(":")
    path = Path(file)
    where = f"{key} = {source!r}"
    if not path.is_file() or path.suffix != ".py":
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1)
        fix = f"did you mean {near[0]}?" if near else f"change {key}"
        raise TbpoError("the scorer's file is not there", where, '"python:FILE:NAME"', fix)
    function = UserFunction(file, name)
    if function.failure is not None:
        raise _unusable(function.failure, file, name, where, key)

    def score(prompt: Messages, completion: str) -> float | TbpoError:
        text = next(
            (message["content"] for message in reversed(prompt) if message["role"] == "user"), ""
        )
        result = function(text, completion)
        if not isinstance(result, Failure):
            return result
        error = _message(f"the scorer {name} fails", result, file)
        # Not in `what`, the reason of a mark: answers that fail alike are counted together.
        error.where += f", for the prompt {text[:200]!r}"
        if result.is_end:
            raise error
        return error

    return score_judge(
        f"{path.name}:{name}", lambda answers: (score(*answer) for answer in answers), cache
    )


def _unusable(failure: Failure, file: str, name: str, where: str, key: str) -> TbpoError:
    """Why the function cannot be asked at all."""
    if failure.names is None:
        return _message("the scorer's file cannot be imported", failure, file)
    near = difflib.get_close_matches(name, failure.names, 1)
    fix = f"did you mean {near[0]}?" if near else f"write it, or change {key}"
    what = f"the scorer's file has no function {name}"
    return TbpoError(what, where, "def NAME(prompt, completion)", fix)


def _message(what: str, failure: Failure, file: str) -> TbpoError:
    where = file if failure.line is None else f"{file}, line {failure.line}"
    return TbpoError(f"{what}: {failure.what}", where, "a finite number", "mend the function")
