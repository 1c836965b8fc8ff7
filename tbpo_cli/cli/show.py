"""`tbpo show`: what a recipe comes to, before it is run. No weights are loaded."""

from __future__ import annotations

import json
import os
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.cli.checks import Check, all_checks, disk_check
from tbpo_cli.cli.forecast import forecast, trainings_of
from tbpo_cli.cli.forecast_rounds import forecast_rounds
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.launch import ALONE, Processes
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.chain import STAGES, STATES, plan


def show(
    recipe: Recipe, given: dict[str, str], run_dir: RunDir, processes: Processes = ALONE
) -> None:
    """Prints all of it to stdout.

    Args:
        given: which keys do not have their default, from `recipe.sources`.
        processes: of the training, one a device.

    Raises:
        TbpoError: after all is printed, if something is lacking that would stop a stage.
    """
    _show_values(recipe, given)
    if not Path(recipe.model.base).exists() or recipe.push.repo:
        _ask_hub_once()
    console.out.print()
    for name, (state, changes) in plan("eval", recipe, run_dir).items():
        _print(f"{STATES[state]} {'; '.join(changes)}", name)
    reader = "prepare" if recipe.rounds is None else "prompts"
    run_dir.inputs(STAGES[reader], recipe)  # says which files are not there
    if recipe.rounds is not None:
        console.out.print()
        for label, text in forecast_rounds(recipe, run_dir):
            _print(text, label)
    disk = 0.0
    for training in trainings_of(recipe):
        console.out.print()
        found = forecast(training, recipe, run_dir, processes)
        disk += found.disk
        for label, text in found.lines:
            _print(text, label)
        for warning in found.warnings:
            _print(warning, "WARNING")
    checks = [*all_checks(recipe), disk_check(run_dir, disk)]
    _show_checks(checks)
    if failed := [check.name for check in checks if check.problem is not None]:
        what = f"{len(failed)} of what the stages need is lacking (✗ above): {'; '.join(failed)}"
        raise TbpoError(what, fix="do what the lines under each ✗ say")


def _show_checks(checks: list[Check]) -> None:
    """A tick or a message for everything that the stages will need."""
    console.out.print()
    for check in checks:
        what, *others = check.said or [""]
        _print(f"{check.name}: {what}" if what else check.name, "✗" if what else "✓", indent=2)
        for text in others:
            _print(text, "  →", indent=4)


def _ask_hub_once() -> None:
    """Works with the cache if the Hub does not answer, since its client would try for a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever client it uses
        constants.HF_HUB_OFFLINE = True


def _show_values(recipe: Recipe, given: dict[str, str]) -> None:
    """Every value by table: those that were given, one a line, then the defaults."""
    here = f'"{Path.cwd()}{os.sep}'
    column = min(66, console.out.width - len("   (--set)"))
    tables = defaultdict[str, list[tuple[str, str]]](list)
    for key, value in recipe.settings().items():
        table, _, name = key.rpartition(".")
        text = json.dumps(value, ensure_ascii=False).replace(here, '"./')
        tables[table].append((f"{name} = {text}", given.get(key, "")))
    for table, lines in tables.items():
        console.show(f"[{table}]")
        for line, source in lines:
            if source:
                console.show(f"  {line:<{column}} ({source})")
        if defaults := [line for line, source in lines if not source]:
            _print(", ".join(defaults), "  default:", indent=4)


def _print(text: str, label: str = "", indent: int = 12) -> None:
    """Text after its label, in lines of at most 80 columns, or fewer at a narrow terminal."""
    options: dict[str, Any] = {
        "break_on_hyphens": False,
        "break_long_words": False,
        "subsequent_indent": " " * indent,
    }
    begin = f"{label} ".ljust(indent) if label else ""
    console.show(
        "\n".join(textwrap.wrap(text, min(80, console.out.width), initial_indent=begin, **options))
    )
