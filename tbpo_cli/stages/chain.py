"""The chain of stages: which ones a command needs and which are up to date; running the others."""

from __future__ import annotations

from typing import Literal

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import told_as_unwritable
from tbpo_cli.runs.launch import ALONE, Processes, join_workers
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage
from tbpo_cli.stages import align, evaluate, prepare, sample, sft

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (prepare.STAGE, sft.STAGE, align.STAGE, sample.STAGE, evaluate.STAGE)
}

State = Literal["done", "new", "begun", "renewed", "stale", "changed", "damaged"]
Plan = dict[str, tuple[State, list[str]]]  # by stage: its state, and what changed or is damaged

STATES: dict[State, str] = {
    "done": "up to date",
    "new": "would run",
    "begun": "would go on where it stopped",
    "renewed": "would make what is new, since its inputs changed:",
    "stale": "would begin anew, since its inputs changed:",
    "changed": "made from other inputs; --restart would redo it:",
    "damaged": "not as it was written; --restart would redo it:",
}


def plan(target: str, recipe: Recipe, run_dir: RunDir) -> Plan:
    """The state of every stage up to `target`, in the order in which they run.

    Raises:
        TbpoError: if the recipe does not have the stage.
    """
    if target == "sft" and recipe.sft is None:
        raise TbpoError(
            "the recipe has no SFT stage",
            f"run {recipe.run.name}",
            "a table [sft]",
            "add [sft], it may be empty",
        )
    names = (*STAGES[target].needs(recipe), target)
    return {name: _state(STAGES[name], recipe, run_dir) for name in names}


def _state(stage: Stage, recipe: Recipe, run_dir: RunDir) -> tuple[State, list[str]]:
    changes = run_dir.changes(stage, recipe)
    is_complete = bool(run_dir.manifest(stage.name))
    if changes and stage.renews:
        return "renewed", changes
    if changes:
        has_results = is_complete or any(run_dir.stage(stage.name).glob("checkpoints/step-*"))
        return "changed" if has_results else "stale", changes
    if is_complete:
        faults = run_dir.damage(stage.name)
        return ("damaged", faults) if faults else ("done", [])
    return "begun" if run_dir.started_from(stage.name) else "new", []


def show_plan(target: str, recipe: Recipe, run_dir: RunDir) -> None:
    """Prints what `run_through` would do."""
    for name, (state, changes) in plan(target, recipe, run_dir).items():
        console.show("\n    ".join([f"{name}: {STATES[state]}", *changes]))


def run_through(
    target: str,
    recipe: Recipe,
    run_dir: RunDir,
    restart: bool = False,
    processes: Processes = ALONE,
) -> None:
    """Runs the stages that `target` needs and that are not up to date, then `target`.

    Of several machines, the first one prepares the data and the others join it. With `restart`, the
    folder of `target`, and those of needed stages whose inputs changed, are moved aside.

    Raises:
        TbpoError: without `restart`, if a stage with results was made from other inputs.
    """
    states = plan(target, recipe, run_dir)
    for name, (state, _) in states.items():
        check = STAGES[name].check
        if state == "done" and check is not None and not (restart and name == target):
            check(recipe, run_dir)
    if not restart and all(state == "done" for state, _ in states.values()):
        console.say(f"{target} is up to date: {run_dir.stage(target)}")
        STAGES[target].report(recipe, run_dir)
        return
    if processes.machine_rank > 0:
        if not restart:
            _refuse_changed(states, run_dir)
        for name, (state, _) in states.items():
            is_left = state != "done" or (restart and name == target)
            if STAGES[name].work is not None and is_left:
                join_workers(STAGES[name], run_dir, processes)
        return
    with run_dir.lock(), told_as_unwritable(run_dir.path):
        for name in states:
            states = plan(target, recipe, run_dir)  # a stage before may have another result now
            if not restart:
                _refuse_changed(states, run_dir)
            is_anew = states[name][0] in ("stale", "changed", "damaged")
            if restart and name == target and not is_anew and run_dir.is_restarted(name):
                folder = run_dir.stage(name)
                console.say(f"going on with the restart (remove {folder} to begin once more)")
            elif (is_anew or (restart and name == target)) and (old := run_dir.restart(name)):
                console.say(f"the old {name} is kept as {old}")
            elif states[name][0] == "renewed":
                run_dir.renew(STAGES[name], recipe)
            if not run_dir.manifest(name):
                _make(STAGES[name], recipe, run_dir, processes)


def _make(stage: Stage, recipe: Recipe, run_dir: RunDir, processes: Processes) -> None:
    """Runs a stage. Raises TbpoError if it ends without a word and is not complete.

    So would end one in which code of a model, or of a library, asks for the end of the process.
    """
    how = "its manifest is missing"
    try:
        stage.run(recipe, run_dir, processes)
    except SystemExit as end:
        how = f"code that it calls asked for the end of the process, with {end.code!r}"
    run_dir.require(stage.name, how)


def require_complete(target: str, recipe: Recipe, run_dir: RunDir) -> dict[str, dict[str, object]]:
    """The manifests of a stage and of those before it, by name.

    Raises:
        TbpoError: if one is not complete, damaged, or was made from other inputs.
    """
    manifests = {}
    for name, (state, changes) in plan(target, recipe, run_dir).items():
        manifests[name] = run_dir.manifest(name)
        if state == "damaged":
            run_dir.check(name)
        if state != "done":
            is_complete = bool(manifests[name])
            what = f"was made from other inputs: {'; '.join(changes)}"
            raise TbpoError(
                f"the stage {name} {what if is_complete and changes else 'is not complete'}",
                str(run_dir.path),
                "a complete run",
                f"tbpo {target} RECIPE first",
            )
    return manifests


def _refuse_changed(states: Plan, run_dir: RunDir) -> None:
    """Raises TbpoError if a complete stage is damaged, or was made from other inputs."""
    for name, (state, _) in states.items():
        if state == "damaged":
            run_dir.check(name)
    changed = {name: changes for name, (state, changes) in states.items() if state == "changed"}
    if not changed:
        return
    lines = dict.fromkeys(line for changes in changed.values() for line in changes)
    names = list(states)
    invalidated = names[names.index(next(iter(changed))) :]
    raise TbpoError(
        f"the inputs of a stage changed since it was run: {', '.join(changed)}",
        str(run_dir.path),
        "\n    ".join(["what the stage was made from:", *lines]),
        f"--restart redoes {' and '.join(invalidated)} (the old folders are kept, renamed), "
        "or --run-dir DIR starts another run",
    )
