"""TokenizedPair: exactly the tokens that inference will see, cut into prompt and responses.

The prompt is rendered with the generation prompt (the assistant's header belongs to it); a response is what the full
rendering adds, tokenized on its own, up to and including the end-of-turn token. Control tokens come from the chat
template only: those written in a user's text are masked while the template is rendered, so that whatever a template
does with the text, they stay text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError, TemplateSyntaxError

from tbpo_cli.config.recipe import Data, Model
from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, make_pair
from tbpo_cli.errors import TbpoError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

OPEN, CLOSE = (
    "\ue0fa",
    "\ue0fb",
)  # private-use characters, around the hexadecimal form of a masked control token
TAIL_CHARACTERS = 32
OTHER_TEMPLATE = "give a template of your own as model.chat_template"


@dataclass(frozen=True)
class TokenizedPair:
    """One comparison as token ids.

    Args:
        pair_id: that of the PreferencePair.
        prompt_ids: at least one id.
        chosen_ids: at least one id, the last is the end of the turn (unless the response was truncated).
        rejected_ids: likewise; empty for a demonstration.
        score_margin, reversed_id, prompt_hash: those of the PreferencePair, and
        is_cut: whether a response was truncated; all four for the making of a store, which does not give them back.
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


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The base's fast tokenizer, with the recipe's chat template if it names one.

    Raises:
        TbpoError: if there is none, if it is not a fast one, or if it has no chat template.
    """
    from transformers import AutoTokenizer

    where = f"model.base = {model.base!r}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        what = f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}"
        expected = "a folder with tokenizer.json, or the id of a Hub repository"
        raise TbpoError(what, where, expected, "check model.base and the network") from error
    if not tokenizer.is_fast:
        expected, fix = (
            "a tokenizer.json beside the model",
            "convert it with transformers and save it in the folder",
        )
        raise TbpoError("the model has no fast tokenizer", where, expected, fix)
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TbpoError(
                f"the chat template cannot be read: {error}", model.chat_template, "a Jinja file"
            ) from None
    if tokenizer.chat_template is None:
        expected, fix = (
            "a template that renders the chat",
            "write it to a file and name it as model.chat_template",
        )
        raise TbpoError("the tokenizer has no chat template", where, expected, fix)
    return cast("PreTrainedTokenizerFast", tokenizer)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that decides which tokens a text becomes: of a tokenizer as it was loaded."""
    content = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template; `template_date`, YYYY-MM-DD, is printed by templates that print a date."""

    tokenizer: PreTrainedTokenizerFast
    template_date: str

    @cached_property
    def control_tokens(self) -> dict[str, AddedToken]:
        """The tokenizer's control tokens by their text, the longest first."""
        tokens = {
            token.content: token
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special
        }
        return dict(sorted(tokens.items(), key=lambda item: -len(item[0])))

    @cached_property
    def controls(self) -> re.Pattern[str]:
        """Matches any control token."""
        return re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")

    def mask(self, content: Any) -> Any:
        """Messages, or anything in them, with every control token in a text written as private-use characters."""
        if isinstance(content, str):
            if OPEN in content or CLOSE in content:
                content = re.sub(f"[{OPEN}{CLOSE}]", _masked, content)
            return self.controls.sub(_masked, content)
        if isinstance(content, dict):
            return {key: self.mask(value) for key, value in content.items()}
        return (
            [self.mask(item) for item in content] if isinstance(content, list | tuple) else content
        )

    def encode(self, texts: Sequence[str], controls_as_text: bool = False) -> list[list[int]]:
        """Ids of texts as they stand: nothing is added, cut or padded."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = controls_as_text
        return [
            encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def render(
        self,
        messages: tuple[dict[str, Any], ...],
        tools: tuple[dict[str, Any], ...],
        **options: Any,
    ) -> str:
        """The messages, masked, as text.

        Raises:
            RejectedRow: template_error, if the template refuses the messages.
            TbpoError: if it is no template.
        """
        masked: Any = self.mask(tools) or None
        try:
            template = _with_date(
                self.tokenizer.get_chat_template(tools=masked), self.template_date
            )
            options |= {"chat_template": template, "tokenize": False}
            return cast(
                str, self.tokenizer.apply_chat_template(self.mask(messages), masked, **options)
            )
        except TemplateSyntaxError as error:
            what, where = (
                f"the chat template is no Jinja template: {error.message}",
                f"line {error.lineno} of the template",
            )
            fix = "mend the file that model.chat_template names, or the tokenizer's own template"
            raise TbpoError(what, where, "a template that renders the chat", fix) from None
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise RejectedRow("template_error", f"{type(error).__name__}: {error}") from None


@lru_cache
def _with_date(template: str, day: str) -> str:
    """The template with the calls that print today's date replaced by the text for that day."""
    on = date.fromisoformat(day)
    return re.sub(
        r"""strftime_now\(\s*(['"])(.+?)\1\s*\)""",
        lambda call: repr(on.strftime(call.group(2))),
        template,
    )


def _masked(match: re.Match[str]) -> str:
    return OPEN + match.group().encode().hex() + CLOSE


def _unmask(text: str) -> str:
    return re.sub(
        f"{OPEN}([0-9a-f]+){CLOSE}", lambda match: bytes.fromhex(match.group(1)).decode(), text
    )


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


def render_pair(pair: PreferencePair, chat: Chat) -> tuple[str, str, str]:
    """(the prompt with the generation prompt, what chosen adds, what rejected adds or ""), masked.

    Raises:
        RejectedRow: see `Chat.render`.
        TbpoError: likewise, or if the template does not allow the cut between prompt and response.
    """
    prompt = chat.render(pair.prompt, pair.tools, add_generation_prompt=True)
    chosen, rejected = (
        _response(pair, prompt, chat.render((*pair.prompt, response), pair.tools), chat)
        if response
        else ""
        for response in (pair.chosen, pair.rejected)
    )
    return prompt, chosen, rejected


def _response(pair: PreferencePair, prompt: str, full: str, chat: Chat) -> str:
    """What the full rendering adds to the prompt, up to the first control token after its text.

    What a template adds behind that is never generated.
    """
    if not full.startswith(prompt):
        split = next(
            (i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full)
        )
        alone, followed = (text[max(0, split - 80) : split + 80] for text in (prompt, full))
        raise TbpoError(
            "the chat template renders the prompt differently once an answer follows",
            f"pair {pair.pair_id}\n    prompt alone: …{alone!r}\n    with answer:  …{followed!r}",
            "the full rendering begins with the rendering of the prompt and its generation prompt",
            OTHER_TEMPLATE,
        )
    response, control = full[len(prompt) :], chat.controls.pattern
    end = re.search(rf"({control})(?:\s|{control})*\Z", response)
    if end is None:
        raise TbpoError(
            "the chat template ends an answer without an end-of-turn token",
            f"the answer renders as …{response[-80:]!r}",
            "a control token after the answer, so that the model learns to stop",
            OTHER_TEMPLATE,
        )
    return response[: end.end(1)]


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
    """Ids of rendered texts. One with masked control tokens is encoded piece by piece, between the real ones."""
    together = chat.encode(texts)
    return [
        _encode_masked(text, chat) if OPEN in text else ids
        for text, ids in zip(texts, together, strict=True)
    ]


def _encode_masked(text: str, chat: Chat) -> list[int]:
    before, *rest = re.split(
        f"({chat.controls.pattern})", text
    )  # text, control token, text, control token, text, …
    ids = chat.encode([_unmask(before)], controls_as_text=True)[0]
    for control, after in zip(rest[::2], rest[1::2], strict=True):
        token = chat.control_tokens[control]
        after = (
            after.lstrip() if token.rstrip else after
        )  # some control tokens swallow the white space around them
        ids += [cast(int, chat.tokenizer.convert_tokens_to_ids(control))]
        ids += chat.encode([_unmask(after)], controls_as_text=True)[0]
    return ids


def _encode_after(responses: Sequence[tuple[str, str]], chat: Chat) -> list[list[int]]:
    """Ids of responses, each tokenized on its own, given as (prompt, response).

    A tokenizer that puts a space before whatever it is given (SentencePiece) is shown the end of the prompt as well,
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
    """The pair within `data.max_length` tokens, dropped or with its responses cut, as `data.overlong` says."""
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
