"""`ranked`: a prompt and several answers with scores or ranks, of which pairs are made."""

from __future__ import annotations

import math
from typing import Any

from tbpo_cli.data.formats.columns import PROMPTS, Columns, first_of, messages, prompt, with_system
from tbpo_cli.data.formats.dialogues import is_dialogue, read_dialogue
from tbpo_cli.data.pairs import Message, Messages, PreferencePair, RejectedRow, make_pair

LISTS = ("responses", "completions", "answers", "candidates")
SCORES = ("scores", "ratings", "overall_scores")  # the higher, the better
RANKS = ("ranks", "ranking", "rank")  # 1 is the best
# Of an answer that is a table of its own.
TEXT_OF_ANSWER = ("response", "content", "text", "completion", "answer", "output")
SCORE_OF_ANSWER = ("overall_score", "score", "rating")


def is_ranked(row: Columns) -> bool:
    """Whether a row with a prompt and a list of answers also has their scores or ranks."""
    found = row[first_of(row, LISTS)]
    if first_of(row, (*SCORES, *RANKS)):
        return isinstance(found, list)
    return (
        isinstance(found, list)
        and bool(found)
        and isinstance(found[0], dict)
        and bool(first_of(found[0], (*SCORE_OF_ANSWER, "rank")))
    )


def from_ranked(row: Columns, how: str) -> list[PreferencePair]:
    """{"prompt", "responses": [text, …], "scores": [number, …]}, or each answer with its score.

    UltraFeedback's rows have `completions` with `overall_score`, Nectar's `answers` with `rank`.

    Args:
        how: "best_worst": the best answer against the worst; "best_each": the best against each
            other one; "all": each against each that has a lower score. Answers with the same score
            are never compared.

    Raises:
        RejectedRow: wrong_type; no_preference, if all have the same score.
    """
    asked = _prompt(row)
    scored = sorted(_scored(row), key=lambda item: -item[0])
    best, worst = scored[0], scored[-1]
    if best[0] == worst[0]:
        raise RejectedRow("no_preference", "all answers have the same score")
    if how == "best_worst":
        chosen = [(best, worst)]
    elif how == "best_each":
        chosen = [(best, other) for other in scored[1:]]
    else:
        chosen = [(one, other) for i, one in enumerate(scored) for other in scored[i + 1 :]]
    return [
        make_pair(row | {"score_chosen": a[0], "score_rejected": b[0]}, asked, a[1], b[1])
        for a, b in chosen
        if a[0] > b[0]
    ]


def _prompt(row: Columns) -> Messages:
    column = first_of(row, PROMPTS)
    if is_dialogue(row[column]):
        turns = read_dialogue(row[column])
        return with_system(row, turns[:-1] if not turns[-1]["content"] else turns)
    return prompt(row)


def _scored(row: Columns) -> list[tuple[float, Message]]:
    """The answers with their scores; a rank is taken as a score below zero."""
    name = first_of(row, LISTS)
    answers = row[name]
    if not isinstance(answers, list) or not answers:
        raise RejectedRow("wrong_type", f"{name} is not a list of answers")
    column = first_of(row, (*SCORES, *RANKS))
    if column:
        numbers = row[column]
        if not isinstance(numbers, list) or len(numbers) != len(answers):
            raise RejectedRow("wrong_type", f"{column} is not a list of {len(answers)} numbers")
        sign = -1 if column in RANKS else 1
    else:
        tables = [answer if isinstance(answer, dict) else {} for answer in answers]
        keys = [first_of(table, (*SCORE_OF_ANSWER, "rank")) for table in tables]
        numbers = [table.get(key) for table, key in zip(tables, keys, strict=True)]
        sign = -1 if keys[0] == "rank" else 1
    return [
        (sign * _number(number, name), _answer(answer, name))
        for number, answer in zip(numbers, answers, strict=True)
    ]


def _number(given: Any, name: str) -> float:
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise RejectedRow("wrong_type", f"a score of {name} is {given!r}, not a number")
    return number


def _answer(given: Any, name: str) -> Message:
    if isinstance(given, dict) and not (given.get("role") or given.get("from")):
        given = given.get(first_of(given, TEXT_OF_ANSWER))
    found = messages({name: given}, name, role_of_text="assistant")
    if [message["role"] for message in found] != ["assistant"]:
        raise RejectedRow("roles", f"an answer of {name} is not one message of the assistant")
    return found[0]
