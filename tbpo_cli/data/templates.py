"""Messages → text, by the chat template of the model, cut into prompt and responses.

The prompt is rendered with the generation prompt (the assistant's header belongs to it); a response
is what the full rendering adds, up to and including the end-of-turn token. Control tokens come from
the chat template only: those written in a user's text are masked while the template is rendered, so
    that they stay text whatever a template does
with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError, TemplateSyntaxError

from tbpo_cli.data.pairs import PreferencePair, RejectedRow
from tbpo_cli.errors import TbpoError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

# Private-use characters, around the hexadecimal form of a masked control token.
OPEN = "\ue0fa"
CLOSE = "\ue0fb"
OTHER_TEMPLATE = "give a template of your own as model.chat_template"


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template; `template_date`, YYYY-MM-DD, is printed by templates that
    print a date.
    """

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
        """Messages, or anything in them, with every control token in a text written as private-use
        characters.
        """
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


def unmask(text: str) -> str:
    return re.sub(
        f"{OPEN}([0-9a-f]+){CLOSE}", lambda match: bytes.fromhex(match.group(1)).decode(), text
    )


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
