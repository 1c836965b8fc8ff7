"""What a stage of a run is: what it is made from, and the functions that make and report it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.config.toml import BASE_FILES

if TYPE_CHECKING:
    from tbpo_cli.runs.launch import Processes
    from tbpo_cli.runs.run_dir import RunDir


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Args:
        name: its command, which is also its folder in the run directory.
        needs: the names of the stages whose outputs it reads, in the order in which they run.
        keys: prefixes of the recipe's keys that its result depends on.
        run: makes the stage, up to its manifest, and reports it.
        report: shows the result of the complete stage.
        work: the part of `run` that each of several processes does; None if there is only one.
        base_files: patterns of the files in the base's folder that its result depends on.
        renews: whether `run`, after a change of the inputs, goes on in the same folder: it makes
            again only the results that depend on the change, and keeps the others.
        checks_before: by the name of a stage that it needs: raises TbpoError if that is not worth
            running, since this stage could not use the result.
        check: raises TbpoError if the complete stage does not meet keys that only judge its result.
        outdated: its manifest → a line for each thing that the version which made the stage made
            otherwise from the same inputs.
    """

    name: str
    needs: Callable[[Recipe], tuple[str, ...]]
    keys: tuple[str, ...]
    run: Callable[[Recipe, RunDir, Processes], None]
    report: Callable[[Recipe, RunDir], None]
    work: Callable[[Recipe, RunDir], None] | None = None
    base_files: tuple[str, ...] = BASE_FILES
    check: Callable[[Recipe, RunDir], None] | None = None
    outdated: Callable[[dict[str, Any]], list[str]] = lambda manifest: []
    renews: Callable[[RunDir], bool] = lambda run_dir: False
    checks_before: Mapping[str, Callable[[Recipe, RunDir], None]] = field(default_factory=dict)
