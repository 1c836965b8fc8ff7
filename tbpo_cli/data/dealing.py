"""The prompts of rows of any format, and which of them each round answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from tbpo_cli.config.recipe import Data, Source
from tbpo_cli.config.rounds import Rounds
from tbpo_cli.data.choosing import EVERY_PAIR
from tbpo_cli.data.formats import FORMATS, read_prompt, renamed, to_pairs
from tbpo_cli.data.formats.columns import PROMPTS, first_of
from tbpo_cli.data.formats.demonstrations import CHATS
from tbpo_cli.data.formats.winners import WINNERS
from tbpo_cli.data.pairs import Messages, RejectedRow, Tools, draw, make_pair
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row, read_rows
from tbpo_cli.data.templates import Chat
from tbpo_cli.data.tokens import tokenize_prompt
from tbpo_cli.errors import TbpoError

ANSWER = {"role": "assistant", "content": "an answer"}  # so that a prompt is checked as a pair


@dataclass(frozen=True)
class Question:
    """A prompt of a row.

    Args:
        prompt_hash: the same as that of its pairs.
        messages: the turns before the answer.
        tools: the JSON schemas of the functions that the answer may call.
    """

    prompt_hash: str
    messages: Messages
    tools: Tools

    def as_row(self) -> dict[str, Any]:
        """As `sample.prompts` reads it."""
        row: dict[str, Any] = {"prompt": list(self.messages)}
        return row | ({"tools": list(self.tools)} if self.tools else {})


@dataclass(frozen=True)
class Dealt:
    """Which prompts each round answers.

    Args:
        rounds: the prompts of each round.
        held_out: the prompts that no round trains on.
    """

    rounds: list[list[Question]]
    held_out: list[Question]


def question_of(content: Any, data: Data) -> Question:
    """The prompt of a row: of a prompt alone, of a comparison or of a demonstration.

    Raises:
        RejectedRow: with the reason why it has none.
    """
    content = {"prompt": content} if isinstance(content, str) else renamed(content, data.columns)
    if not isinstance(content, dict):
        raise RejectedRow("wrong_type", f"the row is {type(content).__name__}")
    name = _format(content)
    if not name or first_of(content, PROMPTS):
        messages, tools = read_prompt(content)
    else:
        if name == "winner":  # whichever answer is better, if any is: only the prompt is read
            content = content | {first_of(content, WINNERS): "a"}
        with_our_names = replace(data, columns={})
        (pair, *_) = to_pairs(Row("", 0, content), name, with_our_names, EVERY_PAIR).pairs
        messages = pair.prompt
        tools = pair.tools
    pair = make_pair({"tools": list(tools)}, messages, ANSWER, None)
    return Question(pair.prompt_hash, messages, tools)


def are_prompts_alone(source: Source, split: str, key: str, data: Data) -> bool:
    """Whether the first row of a source that has a prompt has nothing but that.

    Raises:
        TbpoError: if the source cannot be read.
    """
    for row in itertools.islice(read_rows(source, split, key), ROWS_AT_A_TIME):
        with suppress(RejectedRow):
            question_of(row.content, data)
            content = renamed(row.content, data.columns)
            return isinstance(content, str) or not _format(content)
    return False


def _format(content: dict[str, Any]) -> str:
    """The format of a row with answers; "" if it has none."""
    name = next((name for name, known in FORMATS.items() if known.fits(content)), "")
    if name == "sft_messages":
        turns = content[first_of(content, CHATS)]
        last = turns[-1] if isinstance(turns, list) and turns else {}
        role = last.get("role", last.get("from", "")) if isinstance(last, dict) else ""
        return name if role in ("assistant", "gpt") else ""
    return name


def questions_of(
    sources: Sequence[Source], split: str, key: str, data: Data, chat: Chat, seed: int
) -> Iterator[Question | tuple[Row, RejectedRow]]:
    """Yields the prompts of all rows, each once; in place of one that cannot be used, why.

    Args:
        split: of a Hub data set, where a source names none.
        key: the recipe key that names the sources.
        chat: whose template renders them, to at most `data.max_length` tokens.
        seed: of the share of a source with a weight below 1.
    """
    seen: set[str] = set()
    for source in sources:
        for row in read_rows(source, split, key):
            try:
                question = question_of(row.content, data)
                length = len(tokenize_prompt(question.messages, question.tools, chat))
                if length >= data.max_length:
                    raise RejectedRow("overlong", f"the prompt has {length:,} tokens")
            except RejectedRow as reason:
                yield row, reason
                continue
            except TbpoError as error:
                raise row.named(error) from None
            is_drawn = source.weight >= 1 or draw(seed, question.prompt_hash) < source.weight
            if is_drawn and question.prompt_hash not in seen:
                seen.add(question.prompt_hash)
                yield question


def deal(
    questions: Iterable[Question], held_out: Iterable[Question], settings: Rounds, seed: int
) -> Dealt:
    """Which prompts each round answers, and which are only measured on.

    1. Order all by a number that the seed and the prompt decide.
    2. Leave out of the training prompts those that are held out.
    3. Deal them out as `rounds.prompts` says: in as many parts as there are rounds (the first ones
       one prompt longer, if the parts cannot be equal); all to each round; or so many to each in
       turn, from the first prompt again after the last.
    """
    measured = _in_order(held_out, seed)
    names = {each.prompt_hash for each in measured}
    left = [each for each in _in_order(questions, seed) if each.prompt_hash not in names]
    turns = itertools.cycle(left)
    parts = [list(itertools.islice(turns, size)) for size in shares(len(left), settings)]
    return Dealt(parts, measured[: settings.held_out_prompts])


def shares(num_prompts: int, settings: Rounds) -> list[int]:
    """How many of some prompts each round answers, as `rounds.prompts` says."""
    number = settings.number
    how = settings.prompts
    if how == "dealt":
        size, longer = divmod(num_prompts, number)
        return [size + (place < longer) for place in range(number)]
    return [num_prompts if how == "same" else min(how, num_prompts)] * number


def _in_order(questions: Iterable[Question], seed: int) -> list[Question]:
    """In an order that the seed decides, whatever the order of the rows."""
    return sorted(
        questions, key=lambda each: (draw(seed, f"deal {each.prompt_hash}"), each.prompt_hash)
    )
