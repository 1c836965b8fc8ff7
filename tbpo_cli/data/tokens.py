"""TokenizedPair: exactly the tokens that inference will see, cut into prompt and responses.

The prompt is rendered with the generation prompt (the assistant's header belongs to it); a response is what the full
rendering adds, tokenized on its own, up to and including the end-of-turn token. Control tokens come from the chat
template only: written inside a user's text, they are text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow
from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Data, Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Private-use characters that stand for control tokens written in a user's text while the template is rendered.
_OPEN, _CLOSE = "\ue0fa", "\ue0fb"


@dataclass(frozen=True)
class TokenizedPair:
    """One comparison as token ids.

    Args:
        pair_id: that of the PreferencePair.
        prompt_ids: at least one id.
        chosen_ids: at least one id, the last is the end of the turn (unless the response was truncated).
        rejected_ids: likewise; empty for a demonstration.
    """

    pair_id: str
    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]

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
    except (OSError, ValueError) as error:
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
    return tokenizer


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerFast, data: Data
) -> list[TokenizedPair | RejectedRow]:
    """The pairs as tokens, in order; in place of a pair that cannot be used, the reason.

    Raises:
        TbpoError: if the chat template does not allow the cut between prompt and response.
    """
    results: list[TokenizedPair | RejectedRow | None] = [None] * len(pairs)
    texts: list[str] = []
    wanted: list[int] = []
    for number, pair in enumerate(pairs):
        try:
            rendered = _render(pair, tokenizer)
        except RejectedRow as rejected:
            results[number] = rejected
            continue
        wanted.append(number)
        texts += rendered
    ids = _encode(texts, tokenizer)
    for position, number in enumerate(wanted):
        prompt, chosen, rejected = ids[3 * position : 3 * position + 3]
        try:
            results[number] = _fit(pairs[number].pair_id, prompt, chosen, rejected, data)
        except RejectedRow as reason:
            results[number] = reason
    return [result for result in results if result is not None]


def _render(pair: PreferencePair, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str, str]:
    """(prompt with the generation prompt, what chosen adds, what rejected adds), control tokens of users masked."""
    from jinja2 import TemplateError

    controls = _controls(tokenizer)
    try:
        prompt = tokenizer.apply_chat_template(
            _masked(pair.prompt, controls), tokenize=False, add_generation_prompt=True
        )
        responses = [
            tokenizer.apply_chat_template(_masked(pair.prompt + response, controls), tokenize=False) if response else ""
            for response in (pair.chosen, pair.rejected)
        ]
    except TemplateError as error:
        raise RejectedRow("template_error", str(error)) from None
    for full in filter(None, responses):
        if not full.startswith(prompt):
            raise TbpoError(
                "the chat template renders the prompt differently once an answer follows",
                f"pair {pair.pair_id}\n    prompt alone: …{_around_split(prompt, full)!r}\n"
                f"    with answer:  …{_around_split(full, prompt)!r}",
                "the full rendering begins with the rendering of the prompt and its generation prompt",
                "give a template of your own as model.chat_template",
            )
    chosen, rejected = (_up_to_end_of_turn(full[len(prompt) :], controls) if full else "" for full in responses)
    return prompt, chosen, rejected


def _around_split(text: str, other: str) -> str:
    """The part of a text around the place where it leaves the other."""
    split = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[max(0, split - 80) : split + 80]


def _controls(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Matches the tokenizer's control tokens, the longest first."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _masked(messages: Messages, controls: re.Pattern[str]) -> list[dict[str, str]]:
    """The messages with each control token inside a content written as private-use characters."""
    return [
        message | {"content": controls.sub(lambda m: _OPEN + m.group().encode().hex() + _CLOSE, message["content"])}
        for message in messages
    ]


def _unmasked(text: str) -> str:
    return re.sub(f"{_OPEN}([0-9a-f]+){_CLOSE}", lambda m: bytes.fromhex(m.group(1)).decode(), text)


def _up_to_end_of_turn(response: str, controls: re.Pattern[str]) -> str:
    """The response up to the first control token after its text: what a template adds behind it is never generated."""
    cut, end = None, len(response)
    for match in reversed(list(controls.finditer(response))):
        if response[match.end() : end].strip():
            break
        cut, end = match.end(), match.start()
    if cut is None:
        raise TbpoError(
            "the chat template ends an answer without an end-of-turn token",
            f"the answer renders as …{response[-80:]!r}",
            "a control token after the answer, so that the model learns to stop",
            "give a template of your own as model.chat_template",
        )
    return response[:cut]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Ids of rendered texts. One with masked control tokens is encoded piece by piece, between the real ones."""
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    controls = _controls(tokenizer)
    for number, text in enumerate(texts):
        if _OPEN in text:
            ids[number] = [i for piece in _pieces(text, controls) for i in _encode_piece(piece, tokenizer, controls)]
    return ids


def _pieces(text: str, controls: re.Pattern[str]) -> list[str]:
    return [piece for piece in re.split(f"({controls.pattern})", text) if piece]


def _encode_piece(piece: str, tokenizer: PreTrainedTokenizerFast, controls: re.Pattern[str]) -> list[int]:
    if controls.fullmatch(piece):
        return [tokenizer.convert_tokens_to_ids(piece)]
    return tokenizer(_unmasked(piece), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _fit(pair_id: str, prompt: list[int], chosen: list[int], rejected: list[int], data: Data) -> TokenizedPair:
    """The pair within `data.max_length` tokens, dropped or with its responses cut, as `data.overlong` says."""
    longest = len(prompt) + max(len(chosen), len(rejected))
    if longest > data.max_length:
        room = data.max_length - len(prompt)
        if data.overlong == "drop" or room < 1:
            raise RejectedRow("overlong", f"{longest} tokens, max_length is {data.max_length}")
        chosen, rejected = chosen[:room], rejected[:room]
    return TokenizedPair(pair_id, prompt, chosen, rejected)
