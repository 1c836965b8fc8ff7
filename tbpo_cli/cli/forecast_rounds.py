"""What rounds come to before they are run: answers, tokens, marks, time."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.dealing import shares
from tbpo_cli.data.sources import read_rows
from tbpo_cli.runs.files import json_lines
from tbpo_cli.runs.rounds import MARKED, PROMPTS, all_rounds, place_of_policy
from tbpo_cli.runs.run_dir import RunDir

Line = tuple[str, str]  # what it is about, and words for a person


def forecast_rounds(recipe: Recipe, run_dir: RunDir) -> list[Line]:
    """What is known of the answers and the marks; of the trainings see `forecast`."""
    settings = recipe.rounds
    assert settings is not None
    dealt = all_rounds(run_dir).manifest(PROMPTS)
    prompts = dealt["prompts"] if dealt else _prompts_at_most(recipe)
    if prompts is None:
        what = "their number is known once `tbpo prepare` has read the rows and dealt them out"
        return [("rounds", f"{settings.number}, with {settings.answers} answers a prompt; {what}")]
    held_out = dealt["held_out"] if dealt else settings.held_out_prompts
    to_train = sum(prompts) * settings.answers
    to_measure = held_out * settings.answers * (settings.number + 1)
    total = to_train + to_measure
    counts = " and ".join(f"{each:,}" for each in dict.fromkeys(prompts))
    at_most = "" if dealt else "at most "
    lines = [
        f"{settings.number} of {at_most}{counts} prompts each; {settings.answers} answers to a "
        f"prompt: {at_most}{to_train:,} answers to train on",
        f"{at_most}{to_measure:,} more, for the report: the first policy, and that of each round, "
        f"answers {held_out:,} held-out prompts {settings.answers} times",
        f"at most {total * settings.max_new_tokens:,} tokens of answers; {at_most}{total:,} marks "
        f"of the judge{_requests(recipe, total)}",
    ]
    labels = ("rounds", "answers", "cost")
    return [*zip(labels, lines, strict=True), *_measured(recipe, run_dir, total)]


def _prompts_at_most(recipe: Recipe) -> list[int] | None:
    """The prompts of each round, if every row has one; None if the rows would have to be fetched.

    Raises:
        TbpoError: if a file of rows cannot be read.
    """
    settings = recipe.rounds
    data = recipe.data
    assert settings is not None
    if not all(Path(source.path).is_absolute() for source in data.train):
        how = settings.prompts
        return [how] * settings.number if isinstance(how, int) else None
    num_rows = sum(
        sum(1 for _ in read_rows(source, data.train_split, "data.train")) for source in data.train
    )
    return shares(num_rows, settings)


def _requests(recipe: Recipe, total: int) -> str:
    """What the marks ask of a language model: like answers are asked for once."""
    if recipe.judge is None or recipe.judge.endpoint is None:
        return ""
    return f", at most {total * recipe.judge.repeats:,} requests"


def _measured(recipe: Recipe, run_dir: RunDir, total: int) -> list[Line]:
    """What the first policy's answers to the held-out prompts say of all of them."""
    first = place_of_policy(recipe, run_dir, 0).run_dir
    sampled = first.manifest("sample")
    marked = first.manifest("mark")
    if not sampled or not marked:
        what = "known once the first policy has answered, as `tbpo prepare RECIPE` lets it"
        return [("time", f"of answers and marks: {what}")]
    rows = json_lines(first.path / MARKED)
    share = total / max(1, marked["num_answers"])
    tokens = fmean(number for row in rows for number in row["num_tokens"]) * total
    seconds = share * (sampled.get("seconds", 0.0) + marked.get("seconds", 0.0))
    read, written = (share * number for number in marked["judge_tokens"])
    words = f"about {console.duration(seconds)} and {tokens:,.0f} tokens, as rounds/0 took"
    if read:
        words += f"; the judge reads {read:,.0f} tokens and writes {written:,.0f}"
    prices = recipe.judge.price_per_million if recipe.judge is not None else None
    if prices is not None:
        words += f", for {(read * prices[0] + written * prices[1]) / 1e6:.2f}"
    return [("time", words)]
