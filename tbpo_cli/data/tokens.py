"""TokenizedPair: exactly the tokens that inference will see, cut into prompt and responses.

The prompt is rendered with the generation prompt (the assistant's header belongs to it); a response is what the full
rendering adds, tokenized on its own, up to and including the end-of-turn token. Control tokens come from the chat
template only: written inside a user's text, they are text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, make_pair
from tbpo_cli.data.template import CLOSE, OPEN, Chat, render_pair, unmask
from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Data, Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TAIL_CHARACTERS = 32


@dataclass(frozen=True)
class TokenizedPair:
    """One comparison as token ids.

    Args:
        pair_id: that of the PreferencePair.
        prompt_ids: at least one id.
        chosen_ids: at least one id, the last is the end of the turn (unless the response was truncated).
        rejected_ids: likewise; empty for a demonstration.
        is_cut: whether a response was truncated; counted when pairs are made, not kept in the store.
    """

    pair_id: str
    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    is_cut: bool = False

    def __post_init__(self) -> None:
        if not len(self.prompt_ids) or not len(self.chosen_ids):
            raise ValueError(f"pair {self.pair_id} has an empty prompt or chosen response")

    @property
    def aligned_length(self) -> int:
        """T = min(|y^w|, |y^l|), tokens."""
        return min(len(self.chosen_ids), len(self.rejected_ids))


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The base's fast tokenizer, with the recipe's chat template if it names one.

    Raises:
        TbpoError: if there is none, if it is not a fast one, or if it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise TbpoError(
            f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}",
            f"model.base = {model.base!r}",
            "a folder with tokenizer.json, or the id of a Hub repository",
            "check model.base and the network",
        ) from error
    if not tokenizer.is_fast:
        raise TbpoError(
            "the model has no fast tokenizer",
            f"model.base = {model.base!r}",
            "a tokenizer.json beside the model",
            "convert it with transformers and save it in the folder",
        )
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TbpoError(f"the chat template cannot be read: {error}", model.chat_template, "a Jinja file") from None
    if tokenizer.chat_template is None:
        raise TbpoError(
            "the tokenizer has no chat template",
            f"model.base = {model.base!r}",
            "a template that renders the chat",
            "write it to a file and name it as model.chat_template",
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that decides which tokens a text becomes: of a tokenizer as it was loaded."""
    content = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()


def tokenize_pairs(pairs: Sequence[PreferencePair], chat: Chat, data: Data) -> list[TokenizedPair | RejectedRow]:
    """The pairs as tokens, in order; in place of a pair that cannot be used, the reason.

    Raises:
        TbpoError: if the chat template does not allow the cut between prompt and response.
    """
    rendered: list[tuple[str, str, str] | RejectedRow] = []
    for pair in pairs:
        try:
            rendered.append(render_pair(pair, chat))
        except RejectedRow as reason:
            rendered.append(reason)
    prompts = [texts[0] for texts in rendered if isinstance(texts, tuple)]
    responses = [(texts[0], text) for texts in rendered if isinstance(texts, tuple) for text in texts[1:]]
    prompt_ids = iter(_encode(prompts, chat))
    response_ids = iter(_encode_after(responses, chat))
    results: list[TokenizedPair | RejectedRow] = []
    for pair, texts in zip(pairs, rendered, strict=True):
        if isinstance(texts, RejectedRow):
            results.append(texts)
            continue
        try:
            results.append(_fit(pair, next(prompt_ids), next(response_ids), next(response_ids), data))
        except RejectedRow as reason:
            results.append(reason)
    return results


def tokenize_prompt(messages: Messages, chat: Chat) -> list[int]:
    """The ids of a prompt with the generation prompt, as in every pair."""
    return _encode([chat.render(messages, (), add_generation_prompt=True)], chat)[0]


def end_of_turn(chat: Chat) -> int:
    """The id that ends every response."""
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))]
    _, response, _ = render_pair(make_pair({}, (messages[0],), messages[1], None), chat)
    return _encode([response], chat)[0][-1]


def _encode(texts: Sequence[str], chat: Chat) -> list[list[int]]:
    """Ids of rendered texts. One with masked control tokens is encoded piece by piece, between the real ones."""
    ids = chat.encode(texts)
    for number, text in enumerate(texts):
        if OPEN in text:
            ids[number] = _encode_masked(text, chat)
    return ids


def _encode_masked(text: str, chat: Chat) -> list[int]:
    before, *rest = re.split(f"({chat.controls.pattern})", text)  # text, control token, text, control token, text, …
    ids = chat.encode([unmask(before)], controls_as_text=True)[0]
    for control, after in zip(rest[::2], rest[1::2], strict=True):
        token = chat.control_tokens[control]
        after = after.lstrip() if token.rstrip else after  # some control tokens swallow the white space around them
        ids += [cast(int, chat.tokenizer.convert_tokens_to_ids(control))]
        ids += chat.encode([unmask(after)], controls_as_text=True)[0]
    return ids


def _encode_after(responses: Sequence[tuple[str, str]], chat: Chat) -> list[list[int]]:
    """Ids of responses, each tokenized on its own, given as (prompt, response).

    A tokenizer that puts a space before whatever it is given (SentencePiece) is shown the end of the prompt as well,
    whose tokens are then taken away: the space is not in the text, and inference will not see it.
    """
    alone = [response for _, response in responses]
    if not _adds_prefix(chat):
        return _encode(alone, chat)
    tails = [_tail(prompt, chat) for prompt, _ in responses]
    tail_ids = _encode(tails, chat)
    joint = _encode([tail + response for tail, response in zip(tails, alone, strict=True)], chat)
    return [
        ids[len(before) :] if ids[: len(before)] == before else _encode([response], chat)[0]
        for ids, before, response in zip(joint, tail_ids, alone, strict=True)
    ]


def _adds_prefix(chat: Chat) -> bool:
    newline, word, both = _encode(["\n", "ab", "\nab"], chat)
    return newline + word != both


def _tail(prompt: str, chat: Chat) -> str:
    """The last characters of a prompt, from its last control token on if that is near."""
    start = max(len(prompt) - TAIL_CHARACTERS, prompt.rfind(CLOSE) + 1)
    last = max((match.start() for match in chat.controls.finditer(prompt, start)), default=start)
    return prompt[last:]


def _fit(pair: PreferencePair, prompt: list[int], chosen: list[int], rejected: list[int], data: Data) -> TokenizedPair:
    """The pair within `data.max_length` tokens, dropped or with its responses cut, as `data.overlong` says."""
    longest = len(prompt) + max(len(chosen), len(rejected))
    if longest > data.max_length:
        room = data.max_length - len(prompt)
        if data.overlong == "drop" or room < 1:
            raise RejectedRow("overlong", f"{longest} tokens, max_length is {data.max_length}")
        chosen, rejected = chosen[:room], rejected[:room]
    if chosen == rejected:
        raise RejectedRow("identical", "chosen and rejected are the same tokens")
    return TokenizedPair(pair.pair_id, prompt, chosen, rejected, is_cut=longest > data.max_length)
