"""Files of answers to compare with: how they are read, and which prompts they answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbpo_cli.console import counted
from tbpo_cli.data.pairs import Messages
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.answers import question_id

Json = dict[str, Any]
Conversation = tuple[tuple[str, str], ...]  # (role, text) of each message

EXPECTED = (
    'rows of JSON with "instruction" or "prompt" and "output" or "completion"; with "messages" '
    'that end with the answer; or with "question_id" and "choices"'
)
BY_ID, BY_CONVERSATION, BY_LAST_TURN = "question_id", "the whole prompt", "the last turn"


@dataclass(frozen=True)
class Question:
    """A prompt that is to be answered.

    Args:
        messages: the whole conversation.
        number: what its benchmark calls it; "" if nothing.
    """

    messages: Messages
    number: str = ""

    @property
    def conversation(self) -> Conversation:
        return tuple((one["role"], str(one["content"]).strip()) for one in self.messages)


@dataclass(frozen=True)
class Answers:
    """The answers of a file, by what their rows say of the prompt.

    Args:
        by_id: of rows that have nothing but the id of their question.
        by_conversation: of rows with all messages.
        by_text: of rows with one text: the whole prompt, or its last turn.
    """

    file: str
    by_id: dict[str, str] = field(default_factory=dict)
    by_conversation: dict[Conversation, str] = field(default_factory=dict)
    by_text: dict[str, str] = field(default_factory=dict)

    def find(self, question: Question) -> tuple[str, str] | None:
        """(answer to a question, by what it is found), None if there is none."""
        conversation = question.conversation
        if conversation in self.by_conversation:
            return self.by_conversation[conversation], BY_CONVERSATION
        if (text := conversation[-1][1]) in self.by_text:
            how = BY_CONVERSATION if len(conversation) == 1 else BY_LAST_TURN
            return self.by_text[text], how
        if question.number in self.by_id:
            return self.by_id[question.number], BY_ID
        return None


def read_answers(file: str) -> Answers:
    """The answers in a file.

    Source: the formats of AlpacaEval (a list with `instruction`, `input` if need be, and `output`)
    and of Arena-Hard (JSON lines with `messages`, the last one being the answer; in version 0.1
    with `question_id` and `choices`); or lines with `prompt` and `completion`.

    Raises:
        TbpoError: with the row, if one is no answer, or another one than an earlier row's to the
            same prompt; if there are no rows.
    """
    answers = Answers(file)
    number = 0
    for number, row in _rows(file):
        try:
            known, key, answer = _placed(answers, row)
        except ValueError as error:
            raise _unusable(f"row {number} cannot be used: {error}", file, number) from None
        if known.setdefault(key, answer) != answer:
            shown = key[-1][1] if isinstance(key, tuple) else key
            what = f"row {number} has another answer than an earlier row to {shown[:80]!r}"
            raise _unusable(what, file, number)
    if not number:
        raise _unusable("the file has no answers", file)
    return answers


def answers_to(
    answers: Answers, questions: Mapping[str, Question]
) -> tuple[dict[str, str], Counter[str]]:
    """The answers to some questions, by the ids of their prompts, and by what they were found.

    A prompt of several messages is found by all of them; by its last turn where the file has no
    more.

    Raises:
        TbpoError: if no question is answered, or by its last turn one that ends as others do.
    """
    found: dict[str, str] = {}
    how: Counter[str] = Counter()
    ends: dict[str, set[Conversation]] = {}
    for question in questions.values():
        conversation = question.conversation
        ends.setdefault(conversation[-1][1], set()).add(conversation)
    for prompt_id, question in questions.items():
        if (said := answers.find(question)) is None:
            continue
        found[prompt_id], key = said
        how[key] += 1
        text = question.conversation[-1][1]
        if key == BY_LAST_TURN and len(ends[text]) > 1:
            what = f"{len(ends[text])} prompts end with {text[:80]!r}: which one is answered?"
            fix = 'write rows with "messages": the whole conversation, then the answer'
            raise TbpoError(what, f"eval.answers: {answers.file}", "whole prompts", fix)
    if not found:
        first = next(iter(questions.values())).conversation[-1][1] if questions else ""
        what = f"none of {counted(len(questions), 'prompt')} is answered there"
        expected = f"the prompts of [sample], word by word, or their ids; the first: {first[:80]!r}"
        fix = "change sample.prompts or eval.answers"
        raise TbpoError(what, f"eval.answers: {answers.file}", expected, fix)
    return found, how


def _rows(file: str) -> Iterator[tuple[int, Any]]:
    """The rows of a list or of JSON lines, with their numbers from 1, which those of lines are."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise _unusable(f"the answers cannot be read: {reason}", file) from None
    if text.lstrip().startswith("["):
        yield from enumerate(_parsed(text, file, 0), 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parsed(line, file, number)


def _parsed(text: str, file: str, number: int) -> Any:
    """The value of a line, or of the whole file, number 0."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = number or error.lineno
        what = f"line {line} is not JSON: {error.msg}, column {error.colno}"
        raise _unusable(what, file, line) from None
    except RecursionError:
        raise _unusable("the JSON is nested without end", file, number) from None


def _unusable(what: str, file: str, number: int = 0) -> TbpoError:
    where = f"eval.answers: {file}" + (f", row {number}" if number else "")
    return TbpoError(what, where, EXPECTED, "mend the file, or take it out of eval.answers")


def _placed(answers: Answers, row: Any) -> tuple[dict[Any, str], Any, str]:
    """Where a row's answer belongs, its key there, and the answer. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"{row!r:.60} is no object with columns")
    if "choices" in row:
        if not (number := question_id(row)):
            raise ValueError('"choices" stands without a "question_id"')
        return answers.by_id, number, _text(_of_choices(row["choices"]), "choices")
    if "messages" in row:
        *before, last = _conversation(row["messages"], "messages")
        if last[0] != "assistant" or not before:
            raise ValueError('"messages" must be a prompt, and the answer of the assistant as last')
        return answers.by_conversation, tuple(before), last[1]
    asked = _column(row, "instruction", "prompt")
    said = _column(row, "output", "completion")
    if isinstance(row[said], list):
        ((_, answer),) = _conversation(row[said], said)[-1:] or [("", "")]
    else:
        answer = _text(row[said], said)
    if isinstance(row[asked], list):
        return answers.by_conversation, _conversation(row[asked], asked), answer
    prompt = _text(row[asked], asked)
    if row.get("input"):
        prompt = f"{prompt}\n\n{_text(row['input'], 'input')}"
    return answers.by_text, prompt, answer


def _column(row: Json, *names: str) -> str:
    """The first of some columns that a row has."""
    for name in names:
        if row.get(name) is not None:
            return name
    if nulls := [name for name in names if name in row]:
        raise ValueError(f'its "{nulls[0]}" is null, which is no text')
    has = ", ".join(map(str, row)) or "nothing"
    raise ValueError(f'it has no "{names[0]}" or "{names[1]}", but {has:.100}')


def _of_choices(choices: Any) -> Any:
    match choices:
        case [{"turns": [*_, {"content": content}]}, *_]:
            return content
    raise ValueError('"choices" must be [{"turns": [{"content": the answer}]}]')


def _conversation(messages: Any, column: str) -> Conversation:
    """The roles and texts of messages; a text of Arena-Hard 2 may stand in {"answer": text}."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{column}" is no list of messages')
    read = []
    for place, message in enumerate(messages, 1):
        match message:
            case {"role": str(role), "content": {"answer": content}}:
                read.append((role, _text(content, column)))
            case {"role": str(role), "content": content}:
                read.append((role, _text(content, column)))
            case _:
                raise ValueError(f'message {place} of "{column}" has no role or no content')
    return tuple(read)


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'"{column}" has {value!r:.60}, which is no text')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{column}" has half of a surrogate pair, which is no text') from None
    return value.strip()
