"""What the stages of a recipe will need, checked first: packages, files, servers, disk, tokens.

Each check is a function that raises a TbpoError. `tbpo show` lists all; a stage runs its own first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError, gather
from tbpo_cli.runs.files import free_bytes, require_space
from tbpo_cli.runs.run_dir import RunDir


@dataclass(frozen=True)
class Check:
    """One thing that a stage needs.

    Args:
        name: what it is, for a person.
        problem: what is wrong with it; None if nothing is.
    """

    name: str
    problem: TbpoError | None

    @property
    def said(self) -> list[str]:
        """What is wrong, what is expected, and what to do; empty if nothing is wrong."""
        lines = (
            []
            if self.problem is None
            else [
                self.problem.what,
                f"expected: {self.problem.expected}" if self.problem.expected else "",
                self.problem.fix,
            ]
        )
        return [line for line in lines if line]


def run_check(name: str, function: Callable[[], None]) -> Check:
    """The check of that name, done by a function that raises TbpoError."""
    try:
        function()
    except TbpoError as error:
        return Check(name, error)
    return Check(name, None)


def all_checks(recipe: Recipe) -> list[Check]:
    """Everything that the recipe's stages need, in the order in which they run."""
    stages = ("mark", "align", "sample", "eval", "push")
    return [check for stage in stages for check in checks_of(stage, recipe)]


def checks_of(stage: str, recipe: Recipe, asks: bool = True) -> Iterator[Check]:
    """What a stage needs that can be known before it is run. Nothing is loaded.

    Args:
        asks: whether servers are asked; without it, what needs an answer of one is left out.
    """
    for name, function in CHECKS.get(stage, {}).items():
        if function.wanted(recipe) and (asks or not function.asks):
            said = name.format(recipe=recipe, trackers=", ".join(recipe.run.trackers))
            yield run_check(said, partial(function.done, recipe))


def require(stage: str, recipe: Recipe) -> None:
    """Raises TbpoError with everything that a stage lacks."""
    gather([check.problem for check in checks_of(stage, recipe) if check.problem])


def warn_of_later_stages(stage: str, recipe: Recipe) -> None:
    """Before hours of training: says what the stages after it will lack. No server is asked."""
    for later in LATER.get(stage, ()):
        for check in checks_of(later, recipe, asks=False):
            if check.problem is not None:
                console.say(f"WARNING: tbpo {later} would stop: {'; '.join(check.said)}")


@dataclass(frozen=True)
class _Check:
    """How a check is done.

    Args:
        wanted: whether the recipe needs it.
        done: raises TbpoError if it is not there.
        asks: whether a server is asked.
    """

    wanted: Callable[[Recipe], object]
    done: Callable[[Recipe], None]
    asks: bool = False


def _trackers(recipe: Recipe) -> None:
    for name in recipe.run.trackers:
        if importlib.util.find_spec(name) is None:
            what = f"{name} is not installed"
            fix = f"pip install {name}"
            raise TbpoError(what, "run.trackers", "its package", fix)


def _quantization(recipe: Recipe) -> None:
    import torch

    where = 'model.quantization = "nf4"'
    if not torch.cuda.is_available():
        fix = "--set model.quantization=none"
        raise TbpoError("4-bit weights need a GPU, and there is none", where, "a GPU", fix)
    if importlib.util.find_spec("bitsandbytes") is None:
        fix = "pip install 'tbpo[quantization]'"
        raise TbpoError("bitsandbytes is not installed", where, "its package", fix)


def _helpers(recipe: Recipe) -> None:
    """The policies beside the reference: run directories, adapters or repositories."""
    for key in recipe.align.loss.helpers:
        source = getattr(recipe.align.loss, key)
        where = f"align.loss.{key}"
        if not source:
            fix = f"--set {where}=RUN, of tbpo align RECIPE --set align.loss.name=dpo"
            what = f"the {key} helper is not named"
            raise TbpoError(what, where, "a run or an adapter", fix)
        path = Path(source)
        if not path.is_absolute():
            continue  # a Hub repository
        if not (any(path.glob("*.safetensors")) or any(path.glob("align/[am]*/*.safetensors"))):
            what = f"{where} has no trained weights"
            raise TbpoError(what, source, "a complete run or an adapter", "tbpo align it first")


def _has_judge_server(recipe: Recipe) -> bool:
    return recipe.judge_of_eval is not None and recipe.judge_of_eval.endpoint is not None


def _judge_server(recipe: Recipe) -> None:
    """The server of the judge that evaluates answers."""
    judge = recipe.judge_of_eval
    assert judge is not None and judge.endpoint is not None
    body = {**judge.body, "model": judge.model}
    _ask(judge.endpoint, body, min(judge.timeout, 20.0), recipe.table_of_judge)


def _ask(address: str, body: dict[str, Any], timeout: float, table: str) -> None:
    """One request to a server. Raises TbpoError, if it refuses that or does not answer."""
    from tbpo_cli.evaluation.judges.endpoint import Endpoint

    asked = body | {"messages": [{"role": "user", "content": "Say yes."}]}
    for _, reply in Endpoint(address, 1, timeout).ask([asked]):
        if reply.refused:
            raise TbpoError(reply.refused, address, "an answer", f"change [{table}]")


def _has_marking_server(recipe: Recipe) -> bool:
    return recipe.rounds is not None and recipe.judge is not None and bool(recipe.judge.endpoint)


def _marker(recipe: Recipe) -> None:
    """The function, the templates or the reward model that rounds choose pairs by."""
    from tbpo_cli.evaluation.judges import marker_of

    marker_of(recipe)


def _marking_server(recipe: Recipe) -> None:
    """The server of the judge that rounds choose pairs by."""
    judge = recipe.judge
    assert judge is not None and judge.endpoint is not None
    _ask(judge.endpoint, {**judge.body, "model": judge.model}, min(judge.timeout, 20.0), "judge")


def _answering_server(recipe: Recipe) -> None:
    """The server that answers for the policy in rounds."""
    rounds = recipe.rounds
    assert rounds is not None and rounds.endpoint is not None
    _ask(rounds.endpoint, {"model": rounds.endpoint_model, "max_tokens": 1}, 20.0, "rounds")


def require_gate(recipe: Recipe) -> None:
    """Raises TbpoError if `eval.gate` is no condition on something that the recipe measures."""
    from tbpo_cli.evaluation.measures import gate_faults

    gather(gate_faults(recipe, "the recipe"))


def _sampling(recipe: Recipe) -> None:
    """The file of the prompts that are answered."""
    from tbpo_cli.runs.inputs import files_of

    if not files_of("sample.prompts", recipe.sample.prompts, ("*",)):
        fix = "name a file, or --set sample.prompts=eval for the held-out prompts"
        what = f"sample.prompts = {recipe.sample.prompts!r} is no file"
        raise TbpoError(what, "[sample] prompts", "a .jsonl or .txt file", fix)


def _evaluation(recipe: Recipe) -> None:
    """Scorer's file and function, reward model, lm-eval and its tasks, runs to compare with."""
    from tbpo_cli.stages.evaluate import check

    check(recipe)


def _token(recipe: Recipe) -> None:
    """A token for the Hub; whether it may write there is asked by `_repository`."""
    from tbpo_cli.stages.push import check_token

    check_token()


def _repository(recipe: Recipe) -> None:
    """The token may write to push.repo, and that is of the right kind."""
    from tbpo_cli.stages.push import check_repository

    check_repository(recipe.push.repo or "", recipe)


def _can_ask_for_repository(recipe: Recipe) -> bool:
    from huggingface_hub import get_token

    return recipe.push.repo is not None and get_token() is not None


def _names_something(recipe: Recipe) -> bool:
    settings = recipe.eval
    named = (recipe.judge_of_eval, settings.suites, settings.against, settings.answers)
    return any(named) or recipe.sample.adapter is not None


CHECKS: dict[str, dict[str, _Check]] = {
    "mark": {  # of each round, before anything is sampled
        "the judge that marks the answers of rounds": _Check(
            lambda recipe: recipe.rounds is not None, _marker
        ),
        "the server of that judge answers": _Check(_has_marking_server, _marking_server, asks=True),
        "the server of rounds.endpoint answers": _Check(
            lambda recipe: recipe.rounds is not None and recipe.rounds.endpoint,
            _answering_server,
            asks=True,
        ),
    },
    "align": {
        "trackers {trackers}": _Check(lambda recipe: recipe.run.trackers, _trackers),
        "bitsandbytes and a GPU for 4-bit weights": _Check(
            lambda recipe: recipe.model.quantization, _quantization
        ),
        "the helpers of {recipe.align.loss_name}": _Check(
            lambda recipe: recipe.align.loss.helpers, _helpers
        ),
    },
    "sample": {
        "the prompts in {recipe.sample.prompts}": _Check(
            lambda recipe: recipe.sample.prompts != "eval", _sampling
        )
    },
    "eval": {
        "the condition {recipe.eval.gate}": _Check(lambda recipe: recipe.eval.gate, require_gate),
        "files and models of the evaluation: scorer, reward model, suites, answers, runs": _Check(
            _names_something, _evaluation
        ),
        "the judge's server answers": _Check(_has_judge_server, _judge_server, asks=True),
    },
    "push": {
        "a token for the Hub": _Check(lambda recipe: recipe.push.repo, _token),
        "it may write to {recipe.push.repo}": _Check(
            _can_ask_for_repository, _repository, asks=True
        ),
    },
}
LATER = {"sft": ("align", "eval", "push"), "align": ("eval", "push")}
CHECKS["sft"] = CHECKS["align"]


def disk_check(run_dir: RunDir, needed: float) -> Check:
    """Whether the disk has the bytes of the checkpoints and results."""
    free = free_bytes(run_dir.path)
    size = f"{needed / 1e9:.2g} GB" if needed else "an unknown size"
    name = f"disk: {size} for checkpoints; {free / 1e9:.0f} GB are free"
    return run_check(name, partial(require_space, run_dir.path, needed, free))
