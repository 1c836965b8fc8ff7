"""`ranked`: a prompt and several answers with scores or ranks, of which pairs are made."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from tbpo_cli.data.choosing import Chooser, MarkedAnswer, choose
from tbpo_cli.data.formats.columns import PROMPTS, Columns, first_of, messages, prompt, with_system
from tbpo_cli.data.formats.dialogues import is_dialogue, read_dialogue
from tbpo_cli.data.pairs import MadePairs, Message, Messages, RejectedRow, make_pair

# Names of the columns; the last one of LISTS and of SCORES is of SimPO's data.
LISTS = (
    "responses",
    "completions",
    "answers",
    "candidates",
    "generations",
    "outputs",
    "all_generated_responses",
)
SCORES = (
    "scores",
    "ratings",
    "rating",
    "overall_scores",
    "all_rm_scores",
)  # the higher, the better
# 1 is the best. Not "ranking", which may as well be the places of the answers, the best one first.
RANKS = ("ranks", "rank")
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


def from_ranked(row: Columns, chooser: Chooser) -> MadePairs:
    """{"prompt", "responses": [text, …], "scores": [number, …]}, or each answer with its score.

    UltraFeedback's rows have `completions` with `overall_score`, Nectar's `answers` with `rank`. An
    answer whose score is null or not finite has none. `truncated` says which answers were cut:
    these are never chosen, and a rejected one ends without an end token, which no model gave it.
    `num_tokens`, a list of numbers, says how long the answers are; else their tokens are counted.

    Raises:
        RejectedRow: wrong_type; a reason of `choose`, if no pair can be made of the answers.
    """
    asked = _prompt(row)
    answers, marks = _scored(row)
    texts = [json.dumps(answer, sort_keys=True) for answer in answers]
    cut = _truncated(row)
    lengths = _lengths(row, answers, cut, chooser)
    marked = [MarkedAnswer(*one) for one in zip(texts, marks, lengths, cut, strict=True)]
    choice = choose(marked, chooser.settings, chooser.seed, json.dumps(asked))
    if choice.reason:
        raise RejectedRow(choice.reason, choice.detail, choice.noted)
    pairs = [
        make_pair(
            row | {"score_chosen": marks[chosen], "score_rejected": marks[rejected]},
            asked,
            answers[chosen],
            answers[rejected] | ({"is_cut": True} if marked[rejected].is_cut else {}),
        )
        for chosen, rejected in choice.pairs
    ]
    return MadePairs(pairs, choice.noted)


def _prompt(row: Columns) -> Messages:
    column = first_of(row, PROMPTS)
    if not column:
        return prompt(row | {"prompt": row["input"], "input": None})
    if is_dialogue(row[column]):
        turns = read_dialogue(row[column])
        return with_system(row, turns[:-1] if not turns[-1]["content"] else turns)
    return prompt(row)


def _scored(row: Columns) -> tuple[list[Message], list[float | None]]:
    """The answers and their scores; a rank is taken as a score below zero.

    Raises:
        RejectedRow: wrong_type; marks_differ, if scores and ranks put the answers in other orders.
    """
    name = first_of(row, LISTS)
    answers = row[name]
    if not isinstance(answers, list) or not answers:
        raise RejectedRow("wrong_type", f"{name} is not a list of answers")
    columns = [column for names in (SCORES, RANKS) if (column := first_of(row, names))]
    numbers = {column: _list(row, column, len(answers), "numbers") for column in columns}
    if not columns:
        tables = [answer if isinstance(answer, dict) else {} for answer in answers]
        score = next((key for key in SCORE_OF_ANSWER if _has(tables, key)), "")
        columns = [key for key in (score, "rank") if _has(tables, key)] or ["score"]
        numbers = {key: [table.get(key) for table in tables] for key in columns}
    marks, *others = (
        [_mark(number, name, is_rank=column in RANKS) for number in numbers[column]]
        for column in columns
    )
    if any(_differ(marks, other) for other in others):
        both = " and ".join(columns)
        raise RejectedRow("marks_differ", f"{both} put the answers of {name} in other orders")
    return [_answer(answer, name) for answer in answers], marks


def _has(tables: list[Columns], key: str) -> bool:
    return any(table.get(key) is not None for table in tables)


def _differ(marks: list[float | None], other: list[float | None]) -> bool:
    """Whether an answer is better than another one by one list, and worse by the other list."""
    both = [(a, b) for a, b in zip(marks, other, strict=True) if a is not None and b is not None]
    return any((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(both, 2))


def _list(row: Columns, column: str, length: int, of: str) -> list[Any]:
    """A column with a value for each answer. Raises RejectedRow: wrong_type."""
    found = row[column]
    if not isinstance(found, list) or len(found) != length:
        raise RejectedRow("wrong_type", f"{column} is not a list of {length} {of}")
    return found


def _mark(given: Any, name: str, is_rank: bool) -> float | None:
    """The higher, the better; None for one that is null or not finite.

    Raises:
        RejectedRow: wrong_type.
    """
    try:
        number = math.nan if given is None else float(given)
    except (TypeError, ValueError, OverflowError):
        raise RejectedRow(
            "wrong_type", f"a score of {name} is {given!r:.100}, not a number"
        ) from None
    if not math.isfinite(number):
        return None
    return -number if is_rank else number


def _truncated(row: Columns) -> list[bool]:
    """Which answers were cut, as the column `truncated` or a key of each answer says."""
    answers = row[first_of(row, LISTS)]
    if row.get("truncated") is None:
        return [isinstance(answer, dict) and bool(answer.get("truncated")) for answer in answers]
    return [bool(one) for one in _list(row, "truncated", len(answers), "true or false")]


def _lengths(row: Columns, answers: list[Message], cut: list[bool], chooser: Chooser) -> list[int]:
    """The tokens of each answer, with the end of its turn unless it was cut.

    As the policy wrote them, where the row says so: `num_tokens` of the rounds' answers.jsonl. Else
    they are counted, if the choice depends on them.
    """
    given = row.get("num_tokens")
    if isinstance(given, list) and [type(number) for number in given] == [int] * len(answers):
        return given
    if chooser.settings.max_length_difference is None or chooser.count_tokens is None:
        return [0] * len(answers)
    counted = chooser.count_tokens([answer["content"] for answer in answers])
    return [number + (not is_cut) for number, is_cut in zip(counted, cut, strict=True)]


def _answer(given: Any, name: str) -> Message:
    if isinstance(given, dict) and not (given.get("role") or given.get("from")):
        given = given.get(first_of(given, TEXT_OF_ANSWER))
    found = messages({name: given}, name, role_of_text="assistant")
    if [message["role"] for message in found] != ["assistant"]:
        raise RejectedRow("roles", f"an answer of {name} is not one message of the assistant")
    return found[0]
