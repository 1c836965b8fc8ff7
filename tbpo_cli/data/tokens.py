"""Messages → token ids that training and inference both see: prompt and responses, each tokenized
on its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from tbpo_cli.config.recipe import Data
from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, make_pair
from tbpo_cli.data.templates import CLOSE, OPEN, Chat, render_pair, unmask

TAIL_CHARACTERS = 32


@dataclass(frozen=True)
class TokenizedPair:
    """One comparison as token ids.

    Args:
        pair_id: that of the PreferencePair.
        prompt_ids: at least one id.
        chosen_ids: at least one id, the last is the end of the turn (unless the response was
            truncated).
        rejected_ids: likewise; empty for a demonstration.
        score_margin, reversed_id, prompt_hash: those of the PreferencePair, and
        is_cut: whether a response was truncated; all four for the making of a store, which does not
            give them back.
    """

    pair_id: str
    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    score_margin: float | None = None
    reversed_id: str = ""
    prompt_hash: str = ""
    is_cut: bool = False

    def __post_init__(self) -> None:
        if not len(self.prompt_ids) or not len(self.chosen_ids):
            raise ValueError(f"pair {self.pair_id} has an empty prompt or chosen response")

    @property
    def aligned_length(self) -> int:
        """T = min(|y^w|, |y^l|), tokens."""
        return min(len(self.chosen_ids), len(self.rejected_ids))


Result = TokenizedPair | RejectedRow


def tokenize_pairs(pairs: Sequence[PreferencePair], chat: Chat, data: Data) -> list[Result]:
    """The pairs as tokens, in order; in place of a pair that cannot be used, the reason.

    Raises:
        TbpoError: if the chat template does not allow the cut between prompt and response.
    """
    results: dict[int, Result] = {}
    texts: dict[int, tuple[str, str, str]] = {}
    for place, pair in enumerate(pairs):
        try:
            texts[place] = render_pair(pair, chat)
        except RejectedRow as reason:
            results[place] = reason
    prompts = _encode([prompt for prompt, *_ in texts.values()], chat)
    responses = iter(
        _encode_after([(prompt, text) for prompt, *both in texts.values() for text in both], chat)
    )
    for place, prompt in zip(texts, prompts, strict=True):
        results[place] = _fit(pairs[place], prompt, next(responses), next(responses), data)
    return [results[place] for place in range(len(pairs))]


def tokenize_prompt(messages: Messages, chat: Chat) -> list[int]:
    """The ids of a prompt with the generation prompt, as in every pair."""
    return _encode([chat.render(messages, (), add_generation_prompt=True)], chat)[0]


def end_of_turn(chat: Chat) -> int:
    """The id that ends every response."""
    messages = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))
    ]
    _, response, _ = render_pair(make_pair({}, (messages[0],), messages[1], None), chat)
    return _encode([response], chat)[0][-1]


def _encode(texts: Sequence[str], chat: Chat) -> list[list[int]]:
    """Ids of rendered texts. One with masked control tokens is encoded piece by piece, between the
    real ones.
    """
    together = chat.encode(texts)
    return [
        _encode_masked(text, chat) if OPEN in text else ids
        for text, ids in zip(texts, together, strict=True)
    ]


def _encode_masked(text: str, chat: Chat) -> list[int]:
    before, *rest = re.split(
        f"({chat.controls.pattern})", text
    )  # text, control token, text, control token, text, …
    ids = chat.encode([unmask(before)], controls_as_text=True)[0]
    for control, after in zip(rest[::2], rest[1::2], strict=True):
        token = chat.control_tokens[control]
        after = (
            after.lstrip() if token.rstrip else after
        )  # some control tokens swallow the white space around them
        ids += [cast(int, chat.tokenizer.convert_tokens_to_ids(control))]
        ids += chat.encode([unmask(after)], controls_as_text=True)[0]
    return ids


def _encode_after(responses: Sequence[tuple[str, str]], chat: Chat) -> list[list[int]]:
    """Ids of responses, each tokenized on its own, given as (prompt, response).

    A tokenizer that puts a space before whatever it is given (SentencePiece) is shown the end of
    the prompt as well,
    whose tokens are then taken away: the space is not in the text, and inference will not see it.
    """
    alone = [response for _, response in responses]
    newline, word, both = _encode(["\n", "ab", "\nab"], chat)
    if newline + word == both:
        return _encode(alone, chat)
    tails = [_tail(prompt, chat) for prompt, _ in responses]
    joint = _encode([tail + response for tail, response in zip(tails, alone, strict=True)], chat)
    return [
        ids[len(before) :] if ids[: len(before)] == before else _encode([response], chat)[0]
        for ids, before, response in zip(joint, _encode(tails, chat), alone, strict=True)
    ]


def _tail(prompt: str, chat: Chat) -> str:
    """The last characters of a prompt, from its last control token on if that is near."""
    start = max(len(prompt) - TAIL_CHARACTERS, prompt.rfind(CLOSE) + 1)
    last = max((match.start() for match in chat.controls.finditer(prompt, start)), default=start)
    return prompt[last:]


def _fit(
    pair: PreferencePair, prompt: list[int], chosen: list[int], rejected: list[int], data: Data
) -> Result:
    """The pair within `data.max_length` tokens, dropped or with its responses cut, as
    `data.overlong` says.
    """
    longest, room = len(prompt) + max(len(chosen), len(rejected)), data.max_length - len(prompt)
    is_cut = longest > data.max_length
    if is_cut and (data.overlong == "drop" or room < 1):
        return RejectedRow("overlong", f"{longest} tokens, max_length is {data.max_length}")
    if is_cut:
        chosen, rejected = chosen[:room], rejected[:room]
    if chosen == rejected:
        return RejectedRow("identical", "chosen and rejected are the same tokens")
    about = (pair.score_margin, pair.reversed_id, pair.prompt_hash, is_cut)
    return TokenizedPair(pair.pair_id, prompt, chosen, rejected, *about)
