"""The stages, one file a command, each `run(recipe, run_dir)`; and the chain that runs what a stage needs first."""

from __future__ import annotations

import importlib
from types import ModuleType

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import told_as_unwritable
from tbpo_cli.runs.launch import ALONE, Processes, join_workers
from tbpo_cli.runs.run_dir import STAGES, RunDir


def module_of(name: str) -> ModuleType:
    """The module of a stage: `eval` is a word of Python's own, and its module is called `evaluate`."""
    return importlib.import_module(f"tbpo_cli.stages.{'evaluate' if name == 'eval' else name}")


def plan(target: str, recipe: Recipe, run_dir: RunDir) -> dict[str, tuple[str, list[str]]]:
    """Every stage up to `target`, in order: ("done" | "new" | "begun" | "stale" | "changed", what changed)."""
    if target == "sft" and recipe.sft is None:
        what, where = "the recipe has no SFT stage", f"run {recipe.run.name}"
        raise TbpoError(what, where, "a table [sft]", "add [sft], it may be empty")
    states: dict[str, tuple[str, list[str]]] = {}
    for name in [*run_dir.needed(target, recipe), target]:
        changes, is_complete = run_dir.changes(name, recipe), bool(run_dir.manifest(name))
        if changes:
            has_results = is_complete or any(run_dir.stage(name).glob("checkpoints/step-*"))
            state = "changed" if has_results else "stale"
        else:
            state = "done" if is_complete else "begun" if run_dir.started_from(name) else "new"
        states[name] = (state, changes)
    return states


WORDS = {
    "done": "up to date",
    "new": "would run",
    "begun": "would go on where it stopped",
    "stale": "would begin anew, since its inputs changed:",
    "changed": "made from other inputs; --restart would redo it:",
}


def show_plan(target: str, recipe: Recipe, run_dir: RunDir) -> None:
    """What `run_through` would do."""
    for name, (state, changes) in plan(target, recipe, run_dir).items():
        console.out.print("\n    ".join([f"{name}: {WORDS[state]}", *changes]), markup=False)


def run_through(
    target: str, recipe: Recipe, run_dir: RunDir, restart: bool, processes: Processes = ALONE
) -> None:
    """Runs the stages that `target` needs and that are not up to date, then `target`.

    Of several machines the first prepares, and the others join it. With `restart`, the folders of `target`, and of
    needed stages whose inputs changed, are moved aside; without it such a change raises TbpoError.
    """
    states = plan(target, recipe, run_dir)
    if not restart and all(state == "done" for state, _ in states.values()):
        console.say(f"{target} is up to date: {run_dir.stage(target)}")
        module_of(target).report(recipe, run_dir)
        return
    if processes.machine_rank > 0:
        if not restart:
            _refuse_changed(states, run_dir)
        for name, (state, _) in states.items():
            if STAGES[name].parallel and (state != "done" or (restart and name == target)):
                join_workers(name, run_dir, processes)
        return
    with run_dir.lock(), told_as_unwritable(run_dir.path):
        for name in states:
            states = plan(
                target, recipe, run_dir
            )  # again: the result of a stage before may be another one now
            if not restart:
                _refuse_changed(states, run_dir)
            anew = states[name][0] in ("stale", "changed") or (restart and name == target)
            if anew and (old := run_dir.set_aside(name)):
                console.say(f"the old {name} is kept as {old}")
            if not run_dir.manifest(name):
                parallel = (processes,) if STAGES[name].parallel else ()
                module_of(name).run(recipe, run_dir, *parallel)


def _refuse_changed(states: dict[str, tuple[str, list[str]]], run_dir: RunDir) -> None:
    """Raises TbpoError if a stage with results was made from other inputs: which, and what that invalidates."""
    changed = {name: changes for name, (state, changes) in states.items() if state == "changed"}
    if changed:
        lines = dict.fromkeys(line for changes in changed.values() for line in changes)
        invalidated = list(states)[list(states).index(next(iter(changed))) :]
        what = f"the inputs of a stage changed since it was run: {', '.join(changed)}"
        expected = "\n    ".join(["what the stage was made from:", *lines])
        anew = f"--restart redoes {' and '.join(invalidated)} (the old folders are kept, renamed)"
        raise TbpoError(
            what, str(run_dir.path), expected, f"{anew}, or --run-dir DIR starts another run"
        )
