"""The command line: one thin function a command. Only here a TbpoError becomes a message."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from tbpo_cli import console
from tbpo_cli.cli.call import Call, Command, Group
from tbpo_cli.errors import Interrupted, TbpoError
from tbpo_cli.runs import interrupts
from tbpo_cli.runs.launch import Processes, check_gpus

app = typer.Typer(
    name="tbpo",
    cls=Group,
    help="Preference alignment of language models, from raw pairs to a published adapter. Stages "
    "share one recipe; a stage runs what it needs first, and does nothing if it is up to date.",
    epilog="First run: tbpo init quickstart && tbpo align quickstart.toml",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)  # for --version
def say_version(
    asked: Annotated[bool, Option("--version", help="Say which version.")] = False,
) -> None:
    """Prints the version, and ends the command there."""
    if asked:
        console.out.print(version("tbpo"), markup=False)
        raise typer.Exit


NEXT = {"prepare": "align", "sft": "align", "align": "eval", "sample": "eval", "eval": "push"}

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
                interrupts.raise_if_received()
            except KeyboardInterrupt as error:
                what = "nothing is lost"
                fix = "the same command goes on from there"
                raise Interrupted(interrupts.number_of(error), what, fix) from None

        parameters = inspect.signature(Call, eval_str=True).parameters
        signature = inspect.Signature([parameters[key] for key in parameters if key in options])
        vars(run)["__signature__"] = signature  # what typer reads
        return app.command(name, cls=Command)(run)

    return add


@command("prepare", *STAGE, "show", "ids")
def prepare(call: Call) -> None:
    """Rows → checked, tokenized pairs, and a report of what was left out and why.

    Example: tbpo prepare quickstart.toml --set data.train=my-pairs.jsonl --show 3
    """
    if call.ids and not call.show:
        what = "--ids needs --show, whose pairs it prints with their ids"
        expected = "--show N beside it"
        raise TbpoError(what, "--ids", expected, "--show 3 --ids")
    run_stage("prepare", call)
    if call.show and not call.dry_run:
        from tbpo_cli.report.shown_pairs import show_pairs

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

    Example: tbpo align quickstart.toml --set align.loss=tbpo_q --run-dir runs/tbpo_q
    """
    run_stage("align", call)


@command("sample", *PARALLEL, "prompt", "adapter")
def sample(call: Call) -> None:
    """Completions from the policy and from the reference, side by side.

    Example: tbpo sample quickstart.toml --prompt "How many letters are in cat?"
    """
    if call.prompt is None or call.dry_run:
        run_stage("sample", call)
        return
    if call.restart or call.processes() != Processes():
        what = "--prompt is answered in one process, and keeps nothing"
        where = "the command line"
        expected = "--prompt without --restart, --gpus and --cpu"
        fix = "leave them out, or name a file: --set sample.prompts=FILE"
        raise TbpoError(what, where, expected, fix)
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
    """Did it get better? Held-out metrics, diversity, win rates, benchmarks, one HTML report.

    Example: tbpo eval quickstart.toml --against runs/dpo --set eval.gate="win_rate > 0.5"
    """
    while call.against and call.flags and not call.flags[0].startswith("-"):  # --against RUN RUN
        call.against.append(call.flags.pop(0))
    run_stage("eval", call, of_policy=True)


@command("push", *RUN, "to", "merge", "allow_unevaluated", "dry_run", "quiet")
def push(call: Call) -> None:
    """Adapter (or merged model) and model card → the Hugging Face Hub, in one commit, or a folder.

    Example: tbpo push recipe.toml --set push.repo=user/name --dry-run
    """
    if call.dry_run or call.to is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported
    from tbpo_cli.stages.push import export, run

    if call.to is not None and not call.dry_run:
        recipe, run_dir = call.load()
        export(recipe, run_dir, call.to.absolute())
        return
    run(*call.load(), call.dry_run, call.allow_unevaluated)


@app.command(cls=Command)
def init(
    name: Annotated[
        str | None, Argument(metavar="NAME", help="Of a recipe.", show_default=False)
    ] = None,
    source: Annotated[
        Path | None,
        Option("--from", metavar="FILE", help="A config of TRL, axolotl or LLaMA-Factory."),
    ] = None,
) -> None:
    """Writes a starter recipe, and its data, into the folder; without NAME, lists them.

    Example: tbpo init quickstart && tbpo align quickstart.toml
    """
    from tbpo_cli.cli import convert, starter

    if source is not None:
        convert.write(source, Path(f"{name or source.stem}.toml"))
        return
    if name is None:
        for recipe, text in starter.descriptions().items():
            console.out.print(f"{recipe:<22} {text}", markup=False)
        console.say("tbpo init NAME writes one into this folder")
        return
    for path in starter.write(name, Path()):
        console.out.print(f"wrote {path}", markup=False)
    console.say(f"next: tbpo align {name}.toml")


@app.command(cls=Command)
def losses(
    name: Annotated[
        str | None, Argument(metavar="NAME", help="Of a loss or generator.", show_default=False)
    ] = None,
    markdown: Annotated[bool, Option("--markdown", help="As a table for documentation.")] = False,
) -> None:
    """The losses and generators: formula, what each needs, keys with defaults, when to take it.

    With NAME, only that one. Example: tbpo losses dpo
    """
    from tbpo_cli.cli.losses import as_markdown, as_text

    if markdown and name is not None:
        what = f"--markdown makes the table of all losses, and cannot make one of {name} alone"
        raise TbpoError(
            what, "the command line", "NAME or --markdown", f"tbpo losses {shlex.quote(name)}"
        )
    text = as_markdown() if markdown else as_text(name, width=min(100, console.out.width))
    console.out.print(text, markup=False, highlight=False, soft_wrap=True)


@command("show", *RUN, "gpus", "cpu", "nodes")
def show(call: Call) -> None:
    """The resolved recipe, what would run, what it needs, and what usually goes wrong.

    Exit code 2 if something is lacking that a stage needs (the lines with ✗).

    Example: tbpo show quickstart.toml --set align.loss=dpo
    """
    from tbpo_cli.config.recipe import sources

    recipe, run_dir = call.load()
    if call.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from tbpo_cli.cli import show as showing  # it imports torch: after the recipe is checked
    from tbpo_cli.runs.launch import Processes

    processes = Processes(call.gpus or 1, call.cpu, machines=call.nodes or 1)
    showing.show(recipe, sources(call.recipe, call.overrides), run_dir, processes)


def run_stage(name: str, call: Call, of_policy: bool = False) -> None:
    """Runs a stage and what it needs, or says what would run.

    Args:
        of_policy: whether the policy must have been trained: a command that asks about it does not
            start a training of hours.
    """
    from tbpo_cli.cli.checks import require, require_gate, warn_of_later_stages
    from tbpo_cli.runs.rounds import has_policy
    from tbpo_cli.stages.chain import plan, run_through, show_plan

    recipe, run_dir = call.load()
    processes = call.processes()
    if name == "eval":
        require_gate(recipe)  # also of a complete stage, whose gate is decided again
    if call.dry_run:
        show_plan(name, recipe, run_dir)
        return
    if call.gpus:  # before anything is prepared; a GPU that is not there is not the CPU
        check_gpus(processes)
    states = plan(name, recipe, run_dir)
    left = [label for label, (state, _) in states.items() if state not in ("done", "begun")]
    for stage in dict.fromkeys(label.rpartition("/")[2] for label in left):
        require(stage, recipe)  # what was begun has been checked then
    if [*states.values()][-1][0] != "done":
        warn_of_later_stages(name, recipe)
    if of_policy and not has_policy(recipe, run_dir):
        what = "the run has no aligned policy"
        expected = "a complete align stage"
        raise TbpoError(what, str(run_dir.path), expected, f"first: {call.again('align')}")
    run_through(name, recipe, run_dir, call.restart, processes)
    console.say(f"next: {call.again(NEXT[name])}")


def main() -> None:
    """The executable.

    Exit codes: 0 done; 2 recipe, data or usage; 3 diverged; 4 gate failed; 130, 143 and 129
    interrupted; 1 a bug of ours.
    """
    interrupts.listen()
    console.quiet_libraries()
    try:
        app()
    except TbpoError as error:
        _end(error)
    except Exception as error:
        from tbpo_cli.cli.last_resort import message_for

        message = None if os.environ.get("TBPO_TRACEBACK") else message_for(error)
        if message is None:
            raise
        _end(message)


def _end(error: TbpoError) -> None:
    """Prints the message of an error, and exits with its code."""
    sys.stderr.write(console.at_width(console.plain(f"{error}\n")) if str(error) else "")
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
