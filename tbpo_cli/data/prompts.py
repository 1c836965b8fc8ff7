"""Prompts to sample from: those of the held-out pairs, of a file, or of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tbpo_cli.data.pairs import Messages, RejectedRow, read_prompt
from tbpo_cli.data.sources import Row, read_rows
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.template import Chat
from tbpo_cli.data.tokens import tokenize_prompt
from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Source


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Args:
        prompt_id: tells it from the others: the pair's id, or where it stands in its file.
        token_ids: with the generation prompt.
    """

    prompt_id: str
    token_ids: tuple[int, ...]


def prompts_of_pairs(store: PairStore) -> Iterator[Prompt]:
    """The prompts of a split, each once."""
    seen = set()
    for index in range(len(store)):
        pair = store[index]
        ids = tuple(map(int, pair.prompt_ids))
        if ids not in seen:
            seen.add(ids)
            yield Prompt(pair.pair_id, ids)


def prompts_of_file(path: str, chat: Chat) -> Iterator[Prompt]:
    """The prompts of a .jsonl[.gz] file (`prompt`: text or messages; or `messages`), or the lines of a .txt file.

    Raises:
        TbpoError: for a line that is no prompt.
    """
    if path.endswith(".txt"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        rows: Iterable[Row] = (Row(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    else:
        rows = read_rows(Source(path), "train", "sample.prompts")
    for row in rows:
        yield prompt_of(row, chat)


def prompt_of(row: Row, chat: Chat) -> Prompt:
    """One prompt: text, or a row with `prompt` or `messages`. Raises TbpoError if it is none."""
    content = {"prompt": row.content} if isinstance(row.content, str) else row.content
    try:
        messages: Messages = read_prompt(content)
        ids = tokenize_prompt(messages, chat)
    except RejectedRow as reason:
        raise TbpoError(
            f"a prompt cannot be used: {reason.reason} {reason.detail}",
            f"{row.source}, row {row.number}: {json.dumps(row.content, default=str)[:80]}",
            'text, or {"prompt": text or messages}, or {"messages": [...]}',
            "mend that line",
        ) from None
    return Prompt(f"{Path(row.source).name}:{row.number}", tuple(ids))
