"""What rounds come to before they are run: answers, tokens, marks, time."""

from __future__ import annotations

from statistics import fmean

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.runs.files import json_lines
from tbpo_cli.runs.rounds import MARKED, PROMPTS, all_rounds, place_of_policy
from tbpo_cli.runs.run_dir import RunDir

Line = tuple[str, str]  # what it is about, and words for a person


def forecast_rounds(recipe: Recipe, run_dir: RunDir) -> list[Line]:
    """What is known of the answers and the marks; of the trainings see `forecast`."""
    settings = recipe.rounds
    assert settings is not None
    dealt = all_rounds(run_dir).manifest(PROMPTS)
    if dealt:
        prompts, held_out = dealt["prompts"], dealt["held_out"]
    elif isinstance(settings.prompts, int):
        prompts, held_out = [settings.prompts] * settings.number, settings.held_out_prompts
    else:
        what = "answers and marks are counted once the prompts are dealt out, the first stage"
        return [("rounds", f"{settings.number}, of {settings.answers} answers a prompt; {what}")]
    to_train = sum(prompts) * settings.answers
    to_measure = held_out * settings.answers * (settings.number + 1)
    total = to_train + to_measure
    kind = "prompts" if dealt else "prompts at most"
    line = (
        f"{settings.number} of {', '.join(f'{each:,}' for each in prompts)} {kind}, "
        f"{settings.answers} answers each: {to_train:,} answers, and {to_measure:,} to "
        f"{held_out:,} held-out prompts; at most {total * settings.max_new_tokens:,} tokens; "
        f"{total:,} marks of the judge{_requests(recipe, total)}"
    )
    return [("rounds", line), *_measured(recipe, run_dir, total)]


def _requests(recipe: Recipe, total: int) -> str:
    """What the marks ask of a language model: like answers are asked for once."""
    if recipe.judge is None or recipe.judge.endpoint is None:
        return ""
    return f", {total * recipe.judge.repeats:,} requests at most"


def _measured(recipe: Recipe, run_dir: RunDir, total: int) -> list[Line]:
    """What the first policy's answers to the held-out prompts say of all of them."""
    first = place_of_policy(recipe, run_dir, 0).run_dir
    sampled, marked = first.manifest("sample"), first.manifest("mark")
    if not sampled or not marked:
        return [("time", "of the answers: known once the first policy has answered, rounds/0")]
    rows = json_lines(first.path / MARKED)
    share = total / max(1, marked["num_answers"])
    tokens = fmean(number for row in rows for number in row["num_tokens"]) * total
    seconds = share * (sampled.get("seconds", 0.0) + marked.get("seconds", 0.0))
    read, written = (share * number for number in marked["judge_tokens"])
    words = f"about {console.duration(seconds)} and {tokens:,.0f} tokens, as rounds/0 took"
    if read:
        words += f"; the judge reads {read:,.0f} tokens and writes {written:,.0f}"
    if marked["cost"] is not None:
        words += f", for {share * marked['cost']:.2f}"
    return [("answers", words)]
