"""The command line: one thin function a command, and the only place that turns a TbpoError into a message."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from tbpo_cli import console
from tbpo_cli.errors import Interrupted, TbpoError, gather
from tbpo_cli.runs.launch import Processes, check_gpus, processes_of

if TYPE_CHECKING:
    from tbpo_cli.config.recipe import Recipe
    from tbpo_cli.runs.run_dir import RunDir

app = typer.Typer(
    name="tbpo",
    help="Preference alignment of language models, from raw pairs to a published adapter. Stages share one recipe;"
    " a stage runs what it needs first and is otherwise done when it is up to date.",
    epilog="First run: tbpo align recipes/quickstart.toml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Texts = list[str] | None


@app.callback(invoke_without_command=True)  # of --version
def say_version(
    asked: Annotated[bool, Option("--version", help="Say which version.")] = False,
) -> None:
    """Prints the version, and ends the command there."""
    if asked:
        console.out.print(version("tbpo"), markup=False)
        raise typer.Exit


@dataclass
class Call:
    """What was given to a command on a recipe. The fields are all options that there are, in the order of --help."""

    recipe: Annotated[Path, Argument(metavar="RECIPE", help="A TOML file.", show_default=False)]
    flags: Annotated[
        Texts, Argument(metavar="[-- FLAGS]", help="Given to accelerate.", show_default=False)
    ] = None
    sets: Annotated[
        Texts,
        Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a recipe key; repeatable. E.g. align.loss.name=tbpo_q",
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
        Option(
            "--restart", help="Begin the stage anew; its old folder is renamed, nothing is deleted."
        ),
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
        keys = {"sample.adapter": self.adapter, "eval.against": self.against}
        return (
            *(self.sets or ()),
            *(
                f"{key}={json.dumps(value, ensure_ascii=False)}"
                for key, value in keys.items()
                if value
            ),
        )

    def load(self) -> tuple[Recipe, RunDir]:
        """The recipe, checked, and its run directory."""
        from tbpo_cli.config.recipe import load_recipe
        from tbpo_cli.data.formats import format_faults
        from tbpo_cli.evaluation.measures import gate_faults
        from tbpo_cli.runs.run_dir import RunDir

        recipe = load_recipe(self.recipe, self.overrides)
        path = str(self.recipe)
        gather([*format_faults(recipe.data, path), *gate_faults(recipe.eval, path)])
        return recipe, RunDir.of(recipe, self.run_dir)

    def processes(self) -> Processes:
        """Those that the stage is to run in. Raises TbpoError for words of the command line that nothing reads."""
        flags = self.flags or []
        if flags and not flags[0].startswith("-"):
            fix = (
                f"--set {flags[0]}"
                if "=" in flags[0]
                else "leave it out; --help lists what there is"
            )
            raise TbpoError(
                f"{flags[0]} is not understood", "the command line", "a recipe, and options", fix
            )
        processes = processes_of(
            self.gpus, self.cpu, self.nodes, self.node_rank, self.main_address, flags
        )
        if flags and processes.total == 1:
            what, where = (
                "one process needs no launcher that could take flags",
                " ".join(["--", *flags]),
            )
            raise TbpoError(
                what,
                where,
                "flags for accelerate, beside --gpus N",
                "leave them out, or add --gpus N",
            )
        return processes


RUN = ("recipe", "sets", "run_dir")
STAGE = (*RUN, "restart", "dry_run", "quiet")
PARALLEL = (*STAGE, "flags", "gpus", "cpu")
TRAINING = (*PARALLEL, "nodes", "node_rank", "main_address")


def command(name: str, *options: str) -> Callable[[Callable[[Call], None]], Callable[..., None]]:
    """Makes a function a command with some of the options of `Call`."""

    def add(function: Callable[[Call], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            call = Call(**given)
            console.err.quiet = call.quiet
            try:
                function(call)
            except KeyboardInterrupt:
                raise Interrupted(
                    signal.SIGINT, "nothing is lost", "the same command goes on from there"
                ) from None

        parameters = inspect.signature(Call, eval_str=True).parameters
        signature = inspect.Signature([parameters[key] for key in parameters if key in options])
        vars(run)["__signature__"] = signature  # what typer reads
        return app.command(name)(run)

    return add


@command("prepare", *STAGE, "show", "ids")
def prepare(call: Call) -> None:
    """Rows → checked, tokenized pairs, and a report of what was left out and why.

    Example: tbpo prepare recipes/quickstart.toml --set data.train=my-pairs.jsonl --show 3
    """
    if call.ids and not call.show:
        raise TbpoError(
            "--ids is of the pairs that --show prints",
            "--ids",
            "--show N beside it",
            "--show 3 --ids",
        )
    run_stage("prepare", call)
    if call.show and not call.dry_run:
        from tbpo_cli.stages.prepare import show_pairs

        show_pairs(*call.load(), call.show, call.ids)


@command("sft", *TRAINING)
def sft(call: Call) -> None:
    """Supervised fine-tuning on the chosen responses (or on the rows of sft.train).

    Example: tbpo sft recipe.toml --set sft.learning_rate=1e-5
    """
    run_stage("sft", call)


@command("align", *TRAINING)
def align(call: Call) -> None:
    """Preference optimisation: TBPO and the losses it is compared with.

    Example: tbpo align recipes/quickstart.toml --set align.loss.name=tbpo_q --run-dir runs/tbpo_q
    """
    run_stage("align", call)


@command("sample", *PARALLEL, "prompt", "adapter")
def sample(call: Call) -> None:
    """Completions from the policy and from the reference, side by side.

    Example: tbpo sample recipes/quickstart.toml --prompt "How many letters are in cat?"
    """
    if call.prompt is None or call.dry_run:
        run_stage("sample", call)
        return
    if call.restart or call.processes() != Processes():
        what, where = "--prompt is answered in one process, and keeps nothing", "the command line"
        expected = "--prompt without --restart, --gpus and --cpu"
        raise TbpoError(
            what, where, expected, "leave them out, or name a file: --set sample.prompts=FILE"
        )
    from tbpo_cli.stages.sample import answer

    texts = [
        line.strip()
        for one in call.prompt
        for line in (sys.stdin if one == "-" else [one])
        if line.strip()
    ]
    answer(*call.load(), texts)


@command("eval", *PARALLEL, "against")
def evaluate(call: Call) -> None:
    """Did it get better? Held-out preference metrics, diversity, win rates, benchmarks, one HTML report.

    Example: tbpo eval recipes/quickstart.toml --against runs/dpo --set eval.gate="win_rate > 0.5"
    """
    from tbpo_cli.stages.evaluate import check

    while call.against and call.flags and not call.flags[0].startswith("-"):  # --against RUN RUN
        call.against.append(call.flags.pop(0))
    check(call.load()[0])
    run_stage("eval", call)


@command("push", *RUN, "allow_unevaluated", "dry_run", "quiet")
def push(call: Call) -> None:
    """Adapter (or merged model) and model card → the Hugging Face Hub, in one commit.

    Example: tbpo push recipe.toml --set push.repo=user/name --dry-run
    """
    if call.dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported
    from tbpo_cli.stages.push import run

    run(*call.load(), call.dry_run, call.allow_unevaluated)


@app.command()
def init(
    name: Annotated[str | None, Argument(metavar="[NAME]", show_default=False)] = None,
) -> None:
    """Writes a starter recipe, and its data, into the folder; without NAME, lists them.

    Example: tbpo init quickstart && tbpo align quickstart.toml
    """
    from tbpo_cli.cli import starter

    if name is None:
        for recipe, text in starter.descriptions().items():
            console.out.print(f"{recipe:<22} {text}", markup=False)
        console.say("tbpo init NAME writes one into this folder")
        return
    for path in starter.write(name, Path()):
        console.out.print(f"wrote {path}", markup=False)
    console.say(f"next: tbpo align {name}.toml")


@command("show", *RUN, "gpus")
def show(call: Call) -> None:
    """The resolved recipe, what would run, its memory and time, and what usually goes wrong. Loads no weights.

    Example: tbpo show recipes/quickstart.toml --set align.loss.name=dpo
    """
    from tbpo_cli.config.recipe import sources

    recipe, run_dir = call.load()
    from tbpo_cli.cli import show as what  # with torch, which a faulty recipe does not wait for

    what.show(recipe, sources(call.recipe, call.overrides), run_dir, call.gpus or 1)


def run_stage(name: str, call: Call) -> None:
    """Runs a stage and what it needs, or says what would run."""
    from tbpo_cli.stages.chain import run_through, show_plan

    (recipe, run_dir), processes = call.load(), call.processes()
    if call.dry_run:
        show_plan(name, recipe, run_dir)
    else:
        if call.gpus:  # before anything is prepared, and one GPU that is not there is not the CPU
            check_gpus(processes)
        run_through(name, recipe, run_dir, call.restart, processes)


def main() -> None:
    """The executable: 0 done, 2 recipe, data or usage, 3 diverged, 4 gate failed, 130 / 143 interrupted, 1 a bug."""
    console.quiet_libraries()
    try:
        app()
    except TbpoError as error:
        sys.stderr.write(f"{error}\n" if str(error) else "")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
