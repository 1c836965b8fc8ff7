"""What became of the policy in rounds: its answers to held-out prompts, and each round's pairs."""

from __future__ import annotations

from statistics import fmean, pstdev
from typing import Any

import numpy as np

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.store import PairStore
from tbpo_cli.evaluation.stats import Figure, figure, rate_figure
from tbpo_cli.runs.files import json_lines
from tbpo_cli.runs.rounds import MARKED, place_of_policy, place_of_round
from tbpo_cli.runs.run_dir import RunDir

Json = dict[str, Any]
Rows = list[Json]  # of answers.jsonl: a prompt each, with all its answers and their marks


def rounds_of(recipe: Recipe, run_dir: RunDir) -> list[Json]:
    """An entry for the first policy, and one for that of each complete round.

    Returns:
        Of the answers to the held-out prompts, with intervals over these prompts: `mark`, the mean;
        `win_rate` against the first policy by the marks, the n-th answer against the n-th; `length`
        in tokens; `cut`, the share that stops at the limit; `top`, the share with the highest mark
        of all. Of the round that the policy comes from: `pairs`; `no_pair`, the share of prompts
        that gave none; `pair_margin`, the mean difference of their marks; `spread`, the mean
        standard deviation of the marks of a prompt; `kl`, nats a token, from the round's reference;
        `reference`, which that is: `rounds.reference`.
    """
    settings = recipe.rounds
    assert settings is not None
    answered: list[Rows] = []
    entries: list[Json] = []
    for number in range(settings.number + 1):
        place = place_of_policy(recipe, run_dir, number)
        if not place.run_dir.manifest("mark"):
            break
        answered.append(json_lines(place.run_dir.path / MARKED))
        entry: Json = {"round": number, **_of_answers(answered[-1])}
        if number:
            entry["win_rate"] = _win_rate(answered[-1], answered[0])
            entry |= _of_training(place_of_round(recipe, run_dir, number).run_dir)
            entry["reference"] = settings.reference
        entries.append(entry)
    marks = [_marks(row) for rows in answered for row in rows]
    highest = max((mark for of_prompt in marks for mark in of_prompt), default=0.0)
    for entry, rows in zip(entries, answered, strict=True):
        known = [mark for row in rows for mark in _marks(row)]
        entry["top"] = sum(mark == highest for mark in known) / max(1, len(known))
    return entries


def _marks(row: Json) -> list[float]:
    return [mark for mark in row["scores"] if mark is not None]


def _of_answers(rows: Rows) -> Json:
    """The figures of one policy's answers alone."""
    marks = [fmean(_marks(row)) for row in rows if _marks(row)]
    return {
        "mark": figure(marks) if marks else None,
        "length": figure([fmean(row["num_tokens"]) for row in rows]),
        "cut": fmean(cut for row in rows for cut in row["truncated"]),
    }


def _win_rate(rows: Rows, first: Rows) -> Figure | None:
    """How often an answer has a higher mark than the first policy's; a tie is half a win."""
    of_prompts = []
    for row, before in zip(rows, first, strict=True):
        both = zip(row["scores"], before["scores"], strict=True)
        won = [(a > b) + (a == b) / 2 for a, b in both if a is not None and b is not None]
        of_prompts += [fmean(won)] if won else []
    return rate_figure(of_prompts) if of_prompts else None


def _of_training(run_dir: RunDir) -> Json:
    """The figures of a round's own answers, pairs and training."""
    rows = json_lines(run_dir.path / MARKED)
    # The round's own pairs come first, then those of `rounds.replay`.
    counts = run_dir.manifest("prepare")["counts"]
    own = next(count for count in counts if count["key"] == "data.train")
    margins = PairStore(run_dir.stage("prepare") / "train").score_margins[: own["kept"]["train"]]
    lines = json_lines(run_dir.stage("align") / "metrics.jsonl")
    measured = [line["kl"] for line in lines if line["split"] == "eval" and "kl" in line]
    spreads = [pstdev(_marks(row)) for row in rows if len(_marks(row)) > 1]
    return {
        "pairs": own["kept"]["train"],
        "no_pair": sum(own["rejected"].values()) / max(1, len(rows)),
        "pair_margin": float(np.mean(margins)) if len(margins) else None,
        "spread": fmean(spreads) if spreads else None,
        "kl": measured[-1] if measured else None,
    }
