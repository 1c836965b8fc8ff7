"""Prompts to sample from: those of the held-out pairs, of a file, or of the command line."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tbpo_cli.config.recipe import Data, Recipe, Source
from tbpo_cli.data.choosing import EVERY_PAIR
from tbpo_cli.data.formats import read_prompt, recognise, to_pairs
from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, Tools
from tbpo_cli.data.sources import Row, read_rows
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.templates import Chat
from tbpo_cli.data.tokens import tokenize_prompt
from tbpo_cli.errors import TbpoError


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Args:
        prompt_id: the pair's id, or the prompt's place in its file.
        token_ids: of the rendered messages, with the generation prompt.
        messages: the turns before the answer.
        tools: the JSON schemas of the functions that the answer may call.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    messages: Messages
    tools: Tools = ()


def prompts_of(recipe: Recipe, held_out: Path, chat: Chat) -> list[Prompt]:
    """The first `sample.max_prompts` of the prompts that `sample.prompts` names.

    Args:
        held_out: the folder of the store of held-out pairs.
    """
    settings = recipe.sample
    if settings.prompts == "eval":
        prompts = prompts_of_pairs(PairStore(held_out), recipe.data, settings.max_prompts)
    else:
        rows = read_rows(Source(settings.prompts), "train", "sample.prompts")
        prompts = [prompt_of(row, chat) for row in itertools.islice(rows, settings.max_prompts)]
    if not prompts:
        expected = (
            "a file with prompts, or held-out pairs (data.eval, or data.eval_fraction above 0)"
        )
        raise TbpoError(
            "there are no prompts to answer", f"sample.prompts = {settings.prompts!r}", expected
        )
    return prompts


def prompts_of_pairs(store: PairStore, data: Data, max_prompts: int | None = None) -> list[Prompt]:
    """The first prompts of the held-out pairs, each once."""
    first: dict[tuple[int, ...], str] = {}
    for index in range(len(store)):
        if len(first) == max_prompts:
            break
        pair = store[index]
        first.setdefault(tuple(map(int, pair.prompt_ids)), pair.pair_id)
    texts = held_out_texts(data, set(first.values()))
    return [
        Prompt(pair_id, ids, texts[pair_id].prompt, texts[pair_id].tools)
        for ids, pair_id in first.items()
    ]


def held_out_texts(data: Data, pair_ids: set[str]) -> dict[str, PreferencePair]:
    """Held-out pairs as text, by their ids, from their rows: a store has only tokens.

    Raises:
        TbpoError: if a pair is not there any more.
    """
    key, split = ("data.eval", data.eval_split) if data.eval else ("data.train", data.train_split)
    found: dict[str, PreferencePair] = {}
    for source in data.eval or data.train:
        format_name, rows = recognise(partial(read_rows, source, split, key), data)
        for row in rows:
            if found.keys() == pair_ids:
                return found
            with suppress(RejectedRow):
                pairs = to_pairs(row, format_name, data, EVERY_PAIR).pairs
                found |= {pair.pair_id: pair for pair in pairs if pair.pair_id in pair_ids}
    if missing := pair_ids - found.keys():
        what = (
            f"{len(missing)} held-out pairs are not among the rows any more, {min(missing)} for one"
        )
        fix = "tbpo prepare RECIPE --restart"
        raise TbpoError(what, f"{key} of the recipe", "the rows that were prepared", fix)
    return found


def prompt_of(row: Row, chat: Chat) -> Prompt:
    """One prompt: text, or a row with `prompt` or `messages`. Raises TbpoError if it is neither."""
    content = {"prompt": row.content} if isinstance(row.content, str) else row.content
    try:
        messages, tools = read_prompt(content)
        ids = tokenize_prompt(messages, tools, chat)
    except RejectedRow as reason:
        what = f"a prompt cannot be used: {reason.reason} {reason.detail}"
        where = f"{row.source}, row {row.number}: {json.dumps(row.content, default=str)[:80]}"
        expected = (
            'text, or {"prompt": text or messages}, {"messages": [...]}, {"instruction": text} or '
            '{"turns": [one question]}'
        )
        raise TbpoError(what, where, expected, "mend that line") from None
    except TbpoError as error:
        raise row.named(error) from None
    return Prompt(_id_of(row), tuple(ids), messages, tools)


def prompt_rows(recipe: Recipe) -> dict[str, Any]:
    """The rows of the file that `sample.prompts` names, by the ids of their prompts; none of the
    held-out pairs.
    """
    if recipe.sample.prompts == "eval":
        return {}
    rows = read_rows(Source(recipe.sample.prompts), "train", "sample.prompts")
    first = itertools.islice(rows, recipe.sample.max_prompts)
    return {_id_of(row): row.content for row in first}


def conversations_of(recipe: Recipe, held_out: Path) -> dict[str, Messages]:
    """The messages of the prompts that `prompts_of` gives, by their ids, without a tokenizer.

    Raises:
        TbpoError: if the file, or a row of it, cannot be read.
    """
    if recipe.sample.prompts == "eval":
        prompts = prompts_of_pairs(PairStore(held_out), recipe.data, recipe.sample.max_prompts)
        return {prompt.prompt_id: prompt.messages for prompt in prompts}
    found = {}
    for prompt_id, content in prompt_rows(recipe).items():
        with suppress(RejectedRow):  # of which the sample stage gives the reason
            found[prompt_id] = read_prompt(
                {"prompt": content} if isinstance(content, str) else content
            )[0]
    return found


def _id_of(row: Row) -> str:
    return f"{Path(row.source).name}:{row.number}"
