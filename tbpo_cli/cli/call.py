"""The arguments of a command on a recipe: every option that any has, in the order of --help."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option
from typer.core import TyperArgument, TyperCommand, TyperGroup

from tbpo_cli.errors import TbpoError, gather
from tbpo_cli.runs.launch import Processes, processes_of

if TYPE_CHECKING:
    from tbpo_cli.config.recipe import Recipe
    from tbpo_cli.runs.run_dir import RunDir

Texts = list[str] | None


def _without_type(parameters: list[Any]) -> list[Any]:
    """The parameters, of which flags and arguments are shown by their name alone."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):  # it takes no value
            parameter.metavar = ""
        if isinstance(parameter, TyperArgument):
            vars(parameter)["display_type_rich"] = lambda ctx: None
    return parameters


class Command(TyperCommand):
    """A command whose flags and arguments are shown without <bool> or <path>."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, as --help shows them."""
        return _without_type(super().get_params(ctx))


class Group(TyperGroup):
    """The commands, whose flags are shown without <bool>."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, as --help shows them."""
        return _without_type(super().get_params(ctx))


@dataclass
class Call:
    """What was given to a command on a recipe."""

    recipe: Annotated[Path, Argument(metavar="RECIPE", help="A TOML file.", show_default=False)]
    flags: Annotated[
        Texts, Argument(metavar="-- FLAGS", help="Given to accelerate.", show_default=False)
    ] = None
    sets: Annotated[
        Texts,
        Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a recipe key; repeatable. E.g. align.loss=tbpo_q, model.lora=none",
        ),
    ] = None
    run_dir: Annotated[
        Path | None, Option(metavar="DIR", help="Where the run lives, instead of runs/NAME.")
    ] = None
    prompt: Annotated[
        Texts,
        Option(metavar="TEXT", help="Answer this and keep nothing; repeatable; - reads lines."),
    ] = None
    against: Annotated[
        Texts, Option(metavar="RUN …", help="Compare with these runs, adapters or models.")
    ] = None
    to: Annotated[
        Path | None, Option(metavar="DIR", help="Write the files into a folder, not to the Hub.")
    ] = None
    merge: Annotated[
        bool, Option("--merge", help="The base with the adapter added, not the adapter.")
    ] = False
    allow_unevaluated: Annotated[
        bool, Option("--allow-unevaluated", help="Publish without held-out results.")
    ] = False
    gpus: Annotated[
        int | None, Option(metavar="N", min=1, help="One process a GPU, on this machine.")
    ] = None
    cpu: Annotated[bool, Option("--cpu", help="On the CPU; with --gpus N, in N processes.")] = False
    nodes: Annotated[
        int | None, Option(metavar="N", min=1, help="Machines that run this command.")
    ] = None
    node_rank: Annotated[
        int | None, Option(metavar="K", min=0, help="This machine's number, from 0.")
    ] = None
    main_address: Annotated[
        str | None, Option(metavar="HOST:PORT", help="Of machine 0, reached by all.")
    ] = None
    restart: Annotated[
        bool,
        Option("--restart", help="Begin the stage anew; its old folder is kept under a new name."),
    ] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would run, and do nothing.")] = (
        False
    )
    quiet: Annotated[bool, Option("--quiet", help="No progress, only results and errors.")] = False
    show: Annotated[int, Option(metavar="N", help="Print N pairs as the model sees them.")] = 0
    ids: Annotated[bool, Option("--ids", help="With --show: the token ids as well.")] = False
    adapter: Annotated[
        str | None, Option(metavar="ID", help="user/repo[@revision] as the policy.")
    ] = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """What --set says, and the options that are a recipe's keys by another name."""
        keys = {
            "sample.adapter": self.adapter,
            "eval.against": self.against,
            "push.merge": self.merge,
        }
        named = [f"{key}={json.dumps(v, ensure_ascii=False)}" for key, v in keys.items() if v]
        return (*(self.sets or ()), *named)

    def again(self, command: str) -> str:
        """What to type for another command on the same recipe and run."""
        words = ["tbpo", command, str(self.recipe)]
        for text in self.sets or ():
            words += ["--set", text]
        if self.run_dir is not None:
            words += ["--run-dir", str(self.run_dir)]
        return shlex.join(words)

    def load(self) -> tuple[Recipe, RunDir]:
        """The recipe, checked, and its run directory."""
        from tbpo_cli.config.recipe import load_recipe
        from tbpo_cli.data.formats import format_faults
        from tbpo_cli.runs.run_dir import RunDir

        recipe = load_recipe(self.recipe, self.overrides)
        gather(format_faults(recipe.data, str(self.recipe)))
        run_dir = RunDir.of(recipe, self.run_dir)
        if recipe.judge is not None:
            from tbpo_cli.stages.rounds import with_rounds

            recipe = with_rounds(recipe, run_dir)
        return recipe, run_dir

    def processes(self) -> Processes:
        """Those that the stage is to run in.

        Raises:
            TbpoError: for words of the command line that nothing reads.
        """
        flags = self.flags or []
        if flags and not flags[0].startswith("-"):
            what = f"{flags[0]} is not understood"
            expected = "a recipe, and options"
            fix = "leave it out; --help lists what there is"
            if "=" in flags[0]:
                fix = f"--set {flags[0]}"
            raise TbpoError(what, "the command line", expected, fix)
        processes = processes_of(
            self.gpus, self.cpu, self.nodes, self.node_rank, self.main_address, flags
        )
        if flags and processes.total == 1:
            what = "one process takes no flags for accelerate"
            where = f"-- {' '.join(flags)}"
            expected = "flags for accelerate beside --gpus N"
            raise TbpoError(what, where, expected, "leave them out, or add --gpus N")
        return processes
