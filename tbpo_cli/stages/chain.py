"""The chain of stages: which ones a command needs and which are up to date; running the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.selection import require_comparisons
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs import interrupts
from tbpo_cli.runs.files import explaining_disk_errors
from tbpo_cli.runs.launch import ALONE, Processes, join_workers
from tbpo_cli.runs.rounds import (
    all_rounds,
    in_words,
    is_linked,
    link_last,
    place_of_policy,
    place_of_round,
    place_of_training,
)
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage
from tbpo_cli.stages import align, evaluate, mark, prepare, prompts, rounds, sample, sft

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        prepare.STAGE,
        sft.STAGE,
        align.STAGE,
        sample.STAGE,
        evaluate.STAGE,
        prompts.STAGE,
        mark.STAGE,
    )
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


@dataclass(frozen=True)
class Step:
    """A stage, and what it is run with.

    Args:
        label: what messages call it: its name, or in rounds its folder, "rounds/2/align".
        is_target: whether it is the stage that the command names.
    """

    label: str
    stage: Stage
    recipe: Recipe
    run_dir: RunDir
    is_target: bool = False


def steps_of(target: str, recipe: Recipe, run_dir: RunDir) -> list[Step]:
    """The stages up to `target`, in the order in which they run.

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
    if recipe.rounds is None:
        return [
            Step(name, STAGES[name], recipe, run_dir, name == target)
            for name in dict.fromkeys(names)
        ]
    steps = [*_steps_of_rounds(target, recipe, run_dir)]
    made = ("prepare", "align")
    steps += [
        Step(name, STAGES[name], recipe, run_dir, name == target)
        for name in names
        if name not in made
    ]
    return steps


def _steps_of_rounds(target: str, recipe: Recipe, run_dir: RunDir) -> Iterator[Step]:
    """The prompts; the first policy's answers to the held-out ones; each round, and its policy's.

    `prepare` makes the pairs of the first round, which need no training.
    """
    assert recipe.rounds is not None
    last = recipe.rounds.number

    def step(name: str, of_recipe: Recipe, folder: RunDir, is_target: bool = False) -> Step:
        label = str((folder.path / name).relative_to(run_dir.path))
        return Step(label, STAGES[name], of_recipe, folder, is_target)

    yield step("prompts", recipe, all_rounds(run_dir))
    for number in range(last + 1):
        if number:
            place = place_of_round(recipe, run_dir, number)
            for name in ("sample", "mark", "prepare"):
                is_target = name == target == "prepare"
                yield step(name, place.recipe, place.run_dir, is_target)
            if target == "prepare":
                return
            place = place_of_training(recipe, run_dir, number)
            yield step("align", place.recipe, place.run_dir, target == "align" and number == last)
        place = place_of_policy(recipe, run_dir, number)
        for name in ("sample", "mark"):
            yield step(name, place.recipe, place.run_dir)


def plan(target: str, recipe: Recipe, run_dir: RunDir) -> Plan:
    """The state of every stage up to `target`, by its label, in the order in which they run.

    Raises:
        TbpoError: if the recipe does not have the stage.
    """
    return _states(steps_of(target, recipe, run_dir))


def _states(steps: list[Step]) -> Plan:
    return {step.label: _state(step) for step in steps}


def _state(step: Step) -> tuple[State, list[str]]:
    stage = step.stage
    recipe = step.recipe
    run_dir = step.run_dir
    try:
        changes = run_dir.changes(stage, recipe)
    except TbpoError:
        if run_dir.root is None:
            raise
        changes = ["what a stage before makes is not there"]
    changes = changes if run_dir.root is None else in_words(changes)
    is_complete = bool(run_dir.manifest(stage.name))
    if changes and stage.renews(run_dir):
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
    _link(recipe, run_dir)
    rounds.warn_of_choice(recipe)
    steps = steps_of(target, recipe, run_dir)
    states = _states(steps)
    for step in steps:
        check = step.stage.check
        state = states[step.label][0]
        if state == "done" and check is not None and not (restart and step.is_target):
            check(step.recipe, step.run_dir)
    if not restart and all(state == "done" for state, _ in states.values()):
        if not (run_dir.path / "recipe.toml").exists():
            run_dir.write_recipe(recipe)
        console.say(f"{target} is up to date: {run_dir.stage(target)}")
        STAGES[target].report(recipe, run_dir)
        _report_rounds(target, recipe, run_dir)
        return
    if processes.machine_rank > 0:
        if not restart:
            _refuse_changed(steps, states, run_dir)
        for step in steps:
            is_left = states[step.label][0] != "done" or (restart and step.is_target)
            if step.stage.work is not None and is_left:
                join_workers(step.stage, step.run_dir, processes)
        return
    with run_dir.lock(), explaining_disk_errors(run_dir.path):
        for place in range(len(steps)):
            # A stage before may have another result now, or say which rows there are.
            left = steps_of(target, recipe, run_dir)[place:]
            states = _states(left[:1] if restart else left)
            if not restart:
                _refuse_changed(left, states, run_dir)
            if left[0].stage.name == "sft" and not left[0].is_target:  # for what comes after it
                require_comparisons(recipe, run_dir.manifest("prepare")["counts"])
            state, changes = states[left[0].label]
            _check_before(left, state)
            _run(left[0], state, changes, restart, processes)
            link_last(recipe, run_dir)
    _report_rounds(target, recipe, run_dir)


def _check_before(left: list[Step], state: State) -> None:
    """Raises TbpoError if a later stage could not use what the first one of these would make."""
    first, *later = left
    for step in later if state != "done" else ():
        check = step.stage.checks_before.get(first.stage.name)
        if check is not None and step.run_dir == first.run_dir:
            check(step.recipe, step.run_dir)


def _report_rounds(target: str, recipe: Recipe, run_dir: RunDir) -> None:
    if recipe.rounds is not None and target == "align":
        rounds.report(recipe, run_dir)


def _link(recipe: Recipe, run_dir: RunDir) -> None:
    """Makes the results of the last round those of the run, where they are not."""
    if recipe.rounds is not None and not is_linked(recipe, run_dir):
        with run_dir.lock():
            link_last(recipe, run_dir)


def _run(step: Step, state: State, changes: list[str], restart: bool, processes: Processes) -> None:
    """Runs a stage unless it is up to date; with `restart`, what is in its way is moved aside.

    Args:
        changes: of its inputs, as `plan` gives them.
    """
    interrupts.raise_if_received()
    run_dir = step.run_dir
    name = step.stage.name
    is_anew = state in ("stale", "changed", "damaged")
    if restart and step.is_target and not is_anew and run_dir.is_restarted(name):
        folder = run_dir.stage(name)
        console.say(f"going on with the restart (remove {folder} to begin once more)")
        restart = False
    if (is_anew or (restart and step.is_target)) and (old := run_dir.restart(name)):
        console.say(f"the old {step.label} is kept as {old}")
    elif state == "renewed":
        what = f"{step.label}: what depends on these changes is made anew, the rest is kept:"
        console.say("\n    ".join([what, *changes]))
        run_dir.renew(step.stage, step.recipe)
    if not run_dir.manifest(name):
        if step.label != name:
            console.say(f"--- {step.label}")
        _make(step, processes)


def _make(step: Step, processes: Processes) -> None:
    """Runs a stage. Raises TbpoError if it ends without a word and is not complete.

    So would end one in which code of a model, or of a library, asks for the end of the process.
    """
    how = "its manifest is missing"
    try:
        step.stage.run(step.recipe, step.run_dir, processes)
    except SystemExit as end:
        how = f"code that it calls asked for the end of the process, with {end.code!r}"
    step.run_dir.require(step.stage.name, how)


def require_complete(target: str, recipe: Recipe, run_dir: RunDir) -> dict[str, dict[str, object]]:
    """The manifests of a stage and of those before it, by name.

    Raises:
        TbpoError: if one is not complete, damaged, or was made from other inputs.
    """
    manifests = {}
    steps = steps_of(target, recipe, run_dir)
    for step, (state, changes) in zip(steps, _states(steps).values(), strict=True):
        manifests[step.label] = step.run_dir.manifest(step.stage.name)
        if state == "damaged":
            step.run_dir.check(step.stage.name)
        if state != "done":
            is_complete = bool(manifests[step.label])
            what = f"was made from other inputs: {'; '.join(changes)}"
            raise TbpoError(
                f"the stage {step.label} {what if is_complete and changes else 'is not complete'}",
                str(run_dir.path),
                "a complete run",
                f"tbpo {target} RECIPE first",
            )
    if recipe.rounds is not None:
        manifests |= {name: run_dir.manifest(name) for name in ("prepare", "align")}
    return manifests


def _refuse_changed(steps: list[Step], states: Plan, run_dir: RunDir) -> None:
    """Raises TbpoError if a complete stage is damaged, or was made from other inputs."""
    for step in steps:
        if states[step.label][0] == "damaged":
            step.run_dir.check(step.stage.name)
    changed = {name: changes for name, (state, changes) in states.items() if state == "changed"}
    if not changed:
        return
    lines = dict.fromkeys(line for changes in changed.values() for line in changes)
    names = list(states)
    invalidated = names[names.index(next(iter(changed))) :]
    if any(step.run_dir.root is not None for step in steps):  # in rounds not all that follows
        invalidated = [*changed, "what depends on it"]
    fix = (
        f"--restart redoes {' and '.join(invalidated)} (the old folders are kept, renamed), "
        "or --run-dir DIR starts another run"
    )
    if lost := [name for name in STAGES if states.get(name, ("",))[0] == "begun"]:
        fix = f"tbpo {lost[0]} RECIPE first, which goes on with it; or {fix}"
    raise TbpoError(
        f"the inputs of a stage changed since it was run: {', '.join(changed)}",
        str(run_dir.path),
        "\n    ".join(["what the stage was made from:", *lines]),
        fix,
    )
