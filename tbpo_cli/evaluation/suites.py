"""Benchmarks through EleutherAI's lm-eval harness, on the model in memory."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_cli import console
from tbpo_cli.core.memory import is_out_of_memory
from tbpo_cli.data.limits import limited
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.measures import SUITES, is_chat, tasks_of
from tbpo_cli.evaluation.stats import LEAST_ROWS, Figure, normal_figure, wilson, without_interval

if TYPE_CHECKING:
    from torch import nn

    from tbpo_cli.data.templates import Chat

# The metric of a task that counts, the first that it has: on the tasks of open-llm-v1, those of
# that leaderboard. They are rates, between 0 and 1.
HEADLINES = (
    "acc_norm,none",
    "acc,none",
    "exact_match,strict-match",
    "prompt_level_strict_acc,none",
)


def check_suites(suites: Sequence[str]) -> None:
    """Raises TbpoError if the harness is not installed, or knows no such task."""
    if suites and importlib.util.find_spec("lm_eval") is None:
        what = "benchmark suites need lm-eval, which is not installed"
        raise TbpoError(
            what, "eval.suites", "the optional extra `suites`", "pip install 'tbpo[suites]'"
        )
    for task, _ in (pair for suite in suites for pair in tasks_of(suite)):
        if not Path(task).is_file() and task not in (known := _index(True).task_index):
            near = difflib.get_close_matches(task, [*SUITES, *known], n=1)
            what = f"there is no such suite or task: {task}"
            fix = f"did you mean {near[0]}?" if near else ""
            expected = "a task of lm-eval (`lm-eval ls tasks` lists them), or a task's YAML file"
            raise TbpoError(what, "eval.suites", f"one of {', '.join(SUITES)}, {expected}", fix)


def run_task(
    model: nn.Module, chat: Chat, task: str, shots: int | None, batch_size: int
) -> dict[str, Figure]:
    """The headline figure, with `metric`, its name, of a task; of a tag, those of its tasks.

    A task of CHAT_TASKS is run with the model's chat template, its shots as turns, and answers end
    where the template ends them. The interval is ± 1.96 of the harness's own standard error. Where
    several processes run the task for the passes of sharded weights, only the first has figures.
    Raises TbpoError if the harness cannot run the task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    class Limited(HFLM):  # type: ignore[misc]
        """The harness's model, whose chat template cannot go on for ever."""

        apply_chat_template = limited(HFLM.apply_chat_template)

    settings = {
        "num_fewshot": shots,
        "log_samples": False,
        "task_manager": _index(not Path(task).is_file()),
        "apply_chat_template": is_chat(task),
        "fewshot_as_multiturn": is_chat(task),
        "gen_kwargs": {"eos_token_id": list(chat.end_ids)} if is_chat(task) else None,
    }
    try:
        with nullcontext() if console.err.is_terminal else redirect_stderr(StringIO()):  # its bars
            found = simple_evaluate(
                Limited(model, tokenizer=chat.tokenizer, batch_size=batch_size),
                tasks=[task],
                **settings,
            )
    except TbpoError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # the caller takes smaller batches
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        expected = (
            "a task whose data can be read or downloaded; ifeval needs the packages of tbpo[suites]"
        )
        raise TbpoError(
            f"lm-eval cannot run the task {task}: {reason}", "eval.suites", expected
        ) from error
    if found is None:  # the harness gives it to the first process of a machine alone
        return {}
    results = found["results"]
    counts = {name: count["effective"] for name, count in found["n-samples"].items()}
    names = [task] if task in results else list(found.get("groups") or results)
    every = sum(counts.values())
    return {
        Path(task).stem if len(names) == 1 else name: _headline(
            results[name], counts.get(name, every)
        )
        | {"chat_template": is_chat(task)}
        for name in names
    }


def _headline(result: dict[str, Any], count: int) -> Figure:
    metrics = [
        name for name, value in result.items() if "," in name and isinstance(value, int | float)
    ]
    metric = next(name for name in (*HEADLINES, *metrics) if name in metrics)
    error = result.get(metric.replace(",", "_stderr,"))
    # The harness writes "N/A" for an error that it does not know.
    is_known = isinstance(error, int | float) and math.isfinite(error)
    found = _figure_of(metric, result[metric], error if is_known else None, count)
    return found | {"metric": metric}


def _figure_of(metric: str, value: float, error: float | None, count: int) -> Figure:
    """A value of a task with the interval of the harness's standard error; with Wilson's where that
    error says nothing of a rate, of a few answers or of answers that are all right or all wrong.
    """
    is_rate = metric in HEADLINES
    if count < LEAST_ROWS or not error:
        low, high = wilson(value, count) if is_rate else (None, None)
        return without_interval(value, count) | {"low": low, "high": high}
    found = normal_figure(value, error, count)
    if is_rate:
        found |= {"low": max(0.0, found["low"]), "high": min(1.0, found["high"])}
    return found


@functools.cache
def _index(with_defaults: bool) -> Any:
    """What knows the tasks: those of the harness, which takes seconds, or files alone."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_defaults)
