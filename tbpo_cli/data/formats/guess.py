"""Guesses what rows of no known format hold, and says how to read them: lines to paste, or a change
of the rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tbpo_cli.data.formats.columns import Columns
from tbpo_cli.data.formats.winners import number_of

# Words in the names of columns, by what such a column may be.
LIKELY = {
    "rejected": ("reject", "worse", "bad", "lose", "loser", "negative", "dispreferred", "_l"),
    "chosen": ("chosen", "better", "good", "win", "positive", "prefer", "accept", "_w"),
    "prompt": (
        "prompt",
        "question",
        "instruction",
        "query",
        "input",
        "problem",
        "request",
        "user",
        "context",
        "history",
    ),
    "completion": ("completion", "answer", "response", "output", "target", "text", "solution"),
}
# In the names of columns that say which answer is better, or how good one is.
DECIDING = (
    *("winner", "prefer", "better", "best", "label", "choice", "choose", "verdict", "vote", "judg"),
    *("score", "rating", "rank", "reward", "mark", "grade", "helpful", "correct", "quality"),
)
# In the names of columns of numbers that say neither.
INCIDENTAL = {
    *("id", "idx", "index", "seed", "turn", "turns", "num", "len", "length", "tokens", "count"),
    *("time", "timestamp", "date", "year", "version", "split", "source", "lang", "weight"),
}
PAIRED = (("a", "b"), ("0", "1"), ("1", "2"), ("left", "right"))  # how two names may end
BESIDE = ("system", "tools", "id")  # columns of text or lists that are no answers
A_RANK = "if each number is the rank of the answer at its place, 1 for the best: "


def advice(content: Columns) -> tuple[str, str]:
    """A sentence on what is in a row of no known format, and one on what to do about it.

    A column that says how good the answers are is never ignored by the lines that are given.

    1. Find the columns that say which answer is better, and those that hold texts.
    2. Of a list of answers, of two answers and of one, say what decides between answers, if
       anything does, and which of our names they would have.
    """
    deciding = _deciding(content)
    texts = [
        name
        for name, value in content.items()
        if isinstance(value, str | list) and name not in (*deciding, *BESIDE)
    ]
    lists = [name for name in texts if _is_list_of_answers(content[name])]
    if lists:
        texts = [name for name in texts if name not in lists]
        asked = {"prompt": _likely(texts, "prompt") or next(iter(texts), "…")}
        return _of_list(content, lists[0], deciding, asked)
    worse = _likely(texts, "rejected")
    better = _likely([name for name in texts if name != worse], "chosen")
    if worse and better:
        left = [name for name in texts if name not in (worse, better)]
        asked = {"prompt": _likely(left, "prompt") or next(iter(left), "…")}
        return "", _lines({**asked, "chosen": better, "rejected": worse})
    if len(answers := _numbered(texts)) > 2:
        return (
            f"the rows have {len(answers)} answers each, {', '.join(answers)}",
            "write them as a list, responses, with a number for each in scores; or the better one"
            " as chosen and a worse one as rejected",
        )
    sides = _paired(texts)
    left = [name for name in texts if name not in sides]
    prompt = _likely(left, "prompt") or next(iter(left), "…")
    left = [name for name in left if name != prompt]
    if not sides and len(left) == 2 and deciding:
        sides = left
    if sides:
        return _of_two(sides, deciding, {"prompt": prompt}, content)
    if len(left) == 1 or _likely(left, "completion"):
        return _of_one(_likely(left, "completion") or left[0], deciding, prompt, content)
    first, second = [*left, "…", "…"][:2]
    return "", _lines({"prompt": prompt, "chosen": first, "rejected": second})


def _of_list(
    content: Columns, answers: str, deciding: Sequence[str], asked: dict[str, str]
) -> tuple[str, str]:
    marks = [name for name in deciding if isinstance(content[name], list)]
    if marks and "rank" in marks[0].lower():
        return (
            f"the column {marks[0]} says how good the answers in {answers} are",
            f"{A_RANK}{_lines({**asked, 'responses': answers, 'ranks': marks[0]})}"
            "\n    if it lists the places of the answers, the best one first, write ranks instead",
        )
    if marks:
        what = f"the column {marks[0]} says how good the answers in {answers} are"
        return what, _lines({**asked, "responses": answers, "scores": marks[0]})
    if deciding:
        return (
            f"the column {deciding[0]} says how good the answers in {answers} are",
            "write the better answer as chosen and a worse one as rejected, or a list of numbers"
            " as scores, one for each answer",
        )
    return (
        f"nothing says which of the answers in {answers} is better",
        "write the better answer as chosen and the other one as rejected, or all of them as"
        " responses, with a number for each in scores (of two answers in output, LLaMA-Factory"
        " took the first one for the better)",
    )


def _of_two(
    sides: Sequence[str], deciding: Sequence[str], asked: dict[str, str], content: Columns
) -> tuple[str, str]:
    first, second = sides
    both = f"{first} and {second}"
    if not deciding:
        lines = _lines({**asked, "chosen": first, "rejected": second})
        return (
            f"nothing says which of {both} is better",
            f'add a column winner, "a" or "b"; only if {first} is always better: {lines}',
        )
    if len(deciding) > 1:
        return (
            f"the columns {', '.join(deciding)} decide which of {both} is better",
            'write one column winner in their place: "a" for the first, "b" for the second, or'
            ' "tie"; or one list of responses and one of scores',
        )
    (column,) = deciding
    what = f"the column {column} decides which of {both} is better"
    if isinstance(content[column], bool):
        fix = f'write "a" (for {first}) or "b" in the column {column}, then '
    else:
        fix = f'if {column} is "a" or "b", 0 or 1, or 1 or 2 (for {first} or {second}), or "tie": '
    names = {**asked, "response_a": first, "response_b": second, "winner": column}
    return what, fix + _lines(names)


def _of_one(answer: str, deciding: Sequence[str], prompt: str, content: Columns) -> tuple[str, str]:
    names = {"prompt": prompt, "completion": answer}
    if not deciding:
        what = "the rows have one answer each, which is for sft.train: nothing is compared"
        return what, f"for `tbpo sft`, {_lines(names)}"
    values = [content[name] for name in deciding]
    if len(deciding) == 1 and (isinstance(values[0], bool) or values[0] in (0, 1)):
        what = f"the rows have one answer each, and the column {deciding[0]} marks it"
        fix = "if it says whether the answer is good (two of one prompt, one of them bad, make a"
        return what, f"{fix} pair): {_lines(names | {'label': deciding[0]})}"
    return (
        f"the rows have one answer each, marked by {', '.join(deciding)}",
        "put the rows of one prompt together into one row, "
        f'{{"prompt": {prompt}, "responses": [{answer}, …], "scores": [{deciding[0]}, …]}}, '
        "with the marks that you want",
    )


def _deciding(content: Columns) -> list[str]:
    """The columns that say which answer is better, by their names, or else by what they hold."""
    marks = [name for name, value in content.items() if _is_mark(value)]
    named = [name for name in marks if any(word in name.lower() for word in DECIDING)]
    return named or [
        name
        for name in marks
        if not INCIDENTAL & {*re.split(r"[^a-z]+", name.lower())}
        and not any(_likely([name], ours) for ours in LIKELY)
    ]


def _is_mark(value: Any) -> bool:
    """Whether a value is a number, true or false, a list of numbers, or the word for an answer."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, int | float) for each in value)
    if isinstance(value, str):
        said = value.strip().lower()
        return (
            said in ("a", "b", "tie")
            or bool(re.fullmatch(r"(model|response|answer)[_ ]?[ab]", said))
            or number_of(said) is not None
        )
    return isinstance(value, bool | int | float)


def _is_list_of_answers(value: Any) -> bool:
    """Whether a value is a list of texts, or of tables that are no messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(each, str) or (isinstance(each, dict) and not {"role", "from"} & each.keys())
            for each in value
        )
    )


def _likely(names: Sequence[str], ours: str) -> str:
    """The first name with a word of LIKELY in it; "" if there is none."""
    return next((name for name in names if any(word in name.lower() for word in LIKELY[ours])), "")


def _paired(names: Sequence[str]) -> list[str]:
    """Two names that differ in how they end, as answer_1 and answer_2; none if there is a third."""
    for first, second in PAIRED:
        for name in names:
            stem = name[: len(name) - len(first)]
            other = next((n for n in names if n.lower() == f"{stem}{second}".lower()), "")
            if name.lower() == f"{stem}{first}".lower() and stem and other:
                return [name, other]
    return []


def _numbered(names: Sequence[str]) -> list[str]:
    """The names that differ in one digit or letter at the end alone, if there are several."""
    stems = [name[:-1] for name in names if re.fullmatch(r".*(_[a-z]|[0-9])", name.lower())]
    return next(
        (found for stem in stems if len(found := [n for n in names if n[:-1] == stem]) > 1), []
    )


def _lines(names: dict[str, str]) -> str:
    """The lines that give columns our names, without those that have them."""
    lines = [f'{ours} = "{theirs}"' for ours, theirs in names.items() if ours != theirs]
    return "\n    ".join(["name the columns:", "[data.columns]", *lines])
