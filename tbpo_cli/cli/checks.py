"""What the stages of a recipe will need, checked first: packages, files, servers, disk, tokens.

Each check is a function that raises a TbpoError. `tbpo show` lists all; a stage runs its own first.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError, gather
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


def run_check(name: str, function: Callable[[], None]) -> Check:
    """The check of that name, done by a function that raises TbpoError."""
    try:
        function()
    except TbpoError as error:
        return Check(name, error)
    return Check(name, None)


def all_checks(recipe: Recipe) -> list[Check]:
    """Everything that the recipe's stages need, in the order in which they run."""
    return [*checks_of("align", recipe), *checks_of("eval", recipe), *checks_of("push", recipe)]


def checks_of(stage: str, recipe: Recipe) -> Iterator[Check]:
    """What a stage needs that can be known before it is run. Nothing is loaded."""
    for name, function in CHECKS.get(stage, {}).items():
        if function.wanted(recipe):
            yield run_check(name.format(recipe=recipe), partial(function.done, recipe))


def require(stage: str, recipe: Recipe) -> None:
    """Raises TbpoError with everything that a stage lacks."""
    gather([check.problem for check in checks_of(stage, recipe) if check.problem])


@dataclass(frozen=True)
class _Check:
    """How a check is done.

    Args:
        wanted: whether the recipe needs it.
        done: raises TbpoError if it is not there.
    """

    wanted: Callable[[Recipe], object]
    done: Callable[[Recipe], None]


def _trackers(recipe: Recipe) -> None:
    for name in recipe.run.trackers:
        if importlib.util.find_spec(name) is None:
            what, fix = f"{name} is not installed", f"pip install {name}"
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
    """The two policies of tis_dpo: run directories, adapters or repositories."""
    for key in ("positive", "negative"):
        source, where = getattr(recipe.align.loss, key), f"align.loss.{key}"
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


def _judge_server(recipe: Recipe) -> None:
    """One request to the server of the judge, with a single token to answer."""
    from tbpo_cli.evaluation.judges.endpoint import Endpoint

    judge = recipe.eval.judge
    assert judge is not None
    message = {"role": "user", "content": "Say yes."}
    body = {**judge.body, "model": judge.model, "messages": [message]}
    for _, reply in Endpoint(judge.endpoint, 1, min(judge.timeout, 20.0)).ask([body]):
        if reply.refused:
            raise TbpoError(reply.refused, judge.endpoint, "an answer", "change [eval.judge]")


def _evaluation(recipe: Recipe) -> None:
    """Scorer's file and function, reward model, lm-eval and its tasks, runs to compare with."""
    from tbpo_cli.stages.evaluate import check

    check(recipe)


def _push(recipe: Recipe) -> None:
    from huggingface_hub import get_token

    if not get_token():
        fix = "hf auth login, or export HF_TOKEN=…"
        raise TbpoError("there is no token for the Hub", "tbpo push", "a token that writes", fix)


def _names_something(recipe: Recipe) -> bool:
    settings = recipe.eval
    return bool(settings.judged or settings.suites or settings.against or recipe.sample.adapter)


CHECKS: dict[str, dict[str, _Check]] = {
    "align": {
        "trackers {recipe.run.trackers}": _Check(lambda recipe: recipe.run.trackers, _trackers),
        "bitsandbytes and a GPU for 4-bit weights": _Check(
            lambda recipe: recipe.model.quantization, _quantization
        ),
        "the two helpers of {recipe.align.loss_name}": _Check(
            lambda recipe: "weights" in recipe.align.loss.needs, _helpers
        ),
    },
    "eval": {
        "what [eval] names: scorer, reward model, suites, runs": _Check(
            _names_something, _evaluation
        ),
        "the judge's server answers": _Check(lambda recipe: recipe.eval.judge, _judge_server),
    },
    "push": {"a token for {recipe.push.repo}": _Check(lambda recipe: recipe.push.repo, _push)},
}
CHECKS["sft"] = CHECKS["align"]


def disk_check(run_dir: RunDir, needed: float) -> Check:
    """Whether the disk has the bytes of the checkpoints and results."""
    folder = run_dir.path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    name = f"{needed / 1e9:.1f} GB for checkpoints; {free / 1e9:.0f} GB are free"
    if free > needed:
        return Check(name, None)
    where, fix = str(run_dir.path), "make space, or --run-dir on another disk"
    return Check(name, TbpoError("the disk is too full", where, f"{needed / 1e9:.1f} GB", fix))
