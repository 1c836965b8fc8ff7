"""Whether a run has rounds; and the end of `tbpo align` in rounds: the policies side by side."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.config.rounds import Rounds
from tbpo_cli.data.dealing import are_prompts_alone
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.rounds import rounds_of
from tbpo_cli.report.diagnoses import BEFORE, diagnose
from tbpo_cli.report.facts import Facts
from tbpo_cli.report.rounds import texts_of, warnings_of
from tbpo_cli.runs.rounds import all_rounds
from tbpo_cli.runs.run_dir import RunDir


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows what the first policy, and that of each round, answers to the held-out prompts."""
    entries = rounds_of(recipe, run_dir)
    console.show_table(
        "Answers to held-out prompts, and the pairs of each round", *texts_of(entries)
    )
    for sentence in warnings_of(entries):
        console.say(f"WARNING: {sentence}")


def warn_of_choice(recipe: Recipe) -> None:
    """Says, before anything is sampled, that a choice among so few answers is another one."""
    for sentence in diagnose(Facts(two_sigma_answers=recipe.two_sigma_answers), BEFORE):
        console.say(f"WARNING: {sentence}")


def with_rounds(recipe: Recipe, run_dir: RunDir) -> Recipe:
    """The recipe, with one round where its rows are prompts alone and it has a judge.

    Only local rows are looked at: a Hub data set would have to be downloaded for that.
    """
    is_asked = recipe.rounds is None and recipe.sft is None
    if not is_asked or recipe.judge is None or len(recipe.judge.named) != 1:
        return recipe
    has_begun = all_rounds(run_dir).path.exists()
    if run_dir.manifest("prepare") and not has_begun:
        return recipe
    sources = recipe.data.train
    if not all(Path(source.path).is_absolute() for source in sources):
        return recipe
    with suppress(TbpoError):  # of rows that cannot be read: `prepare` says so
        split = recipe.data.train_split
        if all(are_prompts_alone(each, split, "data.train", recipe.data) for each in sources):
            return replace(recipe, rounds=Rounds())
    return recipe
