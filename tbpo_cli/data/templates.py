"""Messages → text, by the chat template of the model, cut into prompt and responses.

The prompt is rendered with the generation prompt (the assistant's header belongs to it); a response
is what the full rendering adds, up to and including the token at which generation stops. Control
tokens come from the chat template only: those written in a user's text are masked while the
template is rendered, so that they stay text whatever a template does with them.
"""

from __future__ import annotations

import itertools
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateSyntaxError

from tbpo_cli.data.encoder import Encoder, unmask
from tbpo_cli.data.limits import limited
from tbpo_cli.data.pairs import Message, Messages, PreferencePair, RejectedRow, Tools
from tbpo_cli.data.rendering import changed_answer, changed_prompt, check_rendering, squeezed
from tbpo_cli.errors import TbpoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_CHARACTERS = 10_000_000  # of a rendered row

OTHER_TEMPLATE = "give a template of your own as model.chat_template"
# Plain conversations, one of which most templates render.
QUESTION = {"role": "user", "content": "question"}
ANSWER = {"role": "assistant", "content": "reply"}
REASONED = (
    {**ANSWER, "reasoning_content": "because"},
    {**ANSWER, "content": "<think>\nbecause\n</think>\n\nreply"},
)
PROBES: tuple[Messages, ...] = ((QUESTION,), ({"role": "system", "content": "help"}, QUESTION))
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "cat"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CALLED = (
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "finds a word",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "any"}},
                "required": ["word"],
            },
        },
    },
)


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template.

    Args:
        template_date: YYYY-MM-DD, printed by templates that print today's date.
        base_end_ids: the tokens at which the base, as it was published, stops to generate.
    """

    tokenizer: PreTrainedTokenizerFast
    template_date: str
    base_end_ids: tuple[int, ...] = ()

    @cached_property
    def encoder(self) -> Encoder:
        """Rendered text → token ids."""
        return Encoder(self.tokenizer)

    @limited
    def render(self, messages: Messages, tools: Tools, **options: Any) -> str:
        """The messages as text, with masked control tokens; within a limit of time and memory.

        Arguments of tool calls are given to the template as objects; to one that fails on them, or
        prints them in Python's notation, as JSON text.

        Raises:
            RejectedRow: template_error, if the template refuses the messages.
            TbpoError: if it is not a template, or does not end.
        """
        arguments = [
            call["function"]["arguments"]
            for message in messages
            for call in message.get("tool_calls", ())
            if isinstance(call.get("function", {}).get("arguments"), dict)
        ]
        try:
            text = self._render(messages, tools, options)
            if not any(argument and str(argument) in unmask(text) for argument in arguments):
                return text
        except RejectedRow:
            if not arguments:
                raise
        return self._render(tuple(map(_with_arguments_as_text, messages)), tools, options)

    def _render(self, messages: Messages, tools: Tools, options: dict[str, Any]) -> str:
        masked = [self.encoder.mask_message(message) for message in messages]
        if self._reads_parts:
            masked = [_in_parts(message) for message in masked]
        return self._apply(masked, self.encoder.mask(tools), options)

    def _apply(self, messages: list[Message], tools: Any, options: dict[str, Any]) -> str:
        try:
            template = self.tokenizer.get_chat_template(tools=tools or None)
            options = {**options, "chat_template": _with_date(template, self.template_date)}
            text = self.tokenizer.apply_chat_template(
                messages, tools or None, tokenize=False, **options
            )
        except TemplateSyntaxError as error:
            raise TbpoError(
                f"the chat template is no Jinja template: {error.message}",
                f"line {error.lineno} of the template",
                "a template that renders the chat",
                "mend the file that model.chat_template names, or the tokenizer's own template",
            ) from None
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it can raise what it likes
            raise RejectedRow("template_error", f"{type(error).__name__}: {error}") from None
        if len(text) > MAX_CHARACTERS:
            raise RejectedRow("template_error", f"it renders {len(text):,} characters")
        return cast(str, text)

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template renders text only where it is in a list of parts, as some of models
        with images do.
        """
        found = ["", ""]
        for place, message in enumerate((QUESTION, _in_parts(QUESTION))):
            with suppress(RejectedRow):
                found[place] = self._apply([message], [], {})
        as_text, as_parts = (str(QUESTION["content"]) in text for text in found)
        return as_parts and not as_text and "'text'" not in found[1]

    def prompt(self, messages: Messages, tools: Tools) -> str:
        """A prompt with the generation prompt, as text with masked control tokens.

        Raises:
            RejectedRow: as `render`; not_rendered, if the template leaves out a message or a tool.
            TbpoError: as `render`.
        """
        text = self.render(messages, tools, add_generation_prompt=True)
        check_rendering(
            text,
            (messages, tools),
            self._template_text,
            lambda change: changed_prompt(messages, tools, change),
            lambda changed: self.render(*changed, add_generation_prompt=True),
        )
        return text

    def response(self, messages: Messages, answer: Message, tools: Tools, prompt: str) -> str:
        """What an answer adds to the rendered prompt, up to the token that ends it.

        Raises:
            RejectedRow: as `render`; not_rendered, if the template leaves out a part of the answer;
                template_error, if the answer cannot be cut from its rendering, but a plain one can.
            TbpoError: as `render`; or if no answer can be cut from its rendering.
        """
        full = self.render((*messages, answer), tools)
        try:
            response = self._cut(prompt, full, with_end=not answer.get("is_cut"))
        except TbpoError as error:
            if messages not in PROBES and self._cuts_a_plain_chat:
                raise RejectedRow("template_error", f"{error.what}: {error.where}") from None
            raise
        check_rendering(
            response,
            (messages, answer, tools),
            self._template_text,
            lambda change: changed_answer(answer, change),
            lambda changed: self.render((*messages, changed), tools),
        )
        return response

    @cached_property
    def _template_text(self) -> str:
        return squeezed(str(self.tokenizer.chat_template))

    def _cut(self, prompt: str, full: str, with_end: bool = True) -> str:
        """What the full rendering adds to the prompt, up to the token that ends the answer, or
        without it.

        Behind the answer's text stand one or more control tokens. The answer ends with the first of
        them at which generation stops. If it stops at none of them, it ends with the last.
        """
        if not full.startswith(prompt):
            same = len(_same_start(unmask(prompt), unmask(full)))
            alone, followed = (
                unmask(text)[max(0, same - 80) : same + 80] for text in (prompt, full)
            )
            raise TbpoError(
                "the chat template renders the prompt differently once an answer follows",
                f"\n    prompt alone: …{alone!r}\n    with answer:  …{followed!r}",
                "a full rendering that begins with the prompt and its generation prompt",
                OTHER_TEMPLATE,
            )
        response, control = full[len(prompt) :], self.encoder.controls.pattern
        closing = re.search(rf"(?:{control})(?:\s|{control})*\Z", response)
        if closing is None:
            raise TbpoError(
                "the chat template ends an answer without an end-of-turn token",
                f"the answer renders as …{unmask(response)[-80:]!r}",
                "a control token after the answer, so that the model learns to stop",
                OTHER_TEMPLATE,
            )
        if not with_end:
            return response[: closing.start()]
        found = list(self.encoder.controls.finditer(response, closing.start()))
        end = next((token for token in found if token.group() in self._ends), found[-1])
        return response[: end.end()]

    @cached_property
    def turn_end(self) -> str:
        """The control token that ends an answer in a conversation; "" if the template has none.

        What the template puts behind an answer whether or not a user's message follows belongs to
        the answer; its last control token is the end. What it puts behind the last message alone is
        never seen within a conversation.
        """
        for probe in PROBES:
            try:
                last = self.render((*probe, ANSWER), ())
                within = self.render((*probe, ANSWER, QUESTION), ())
            except RejectedRow:
                continue
            behind = [text.rpartition(str(ANSWER["content"]))[2] for text in (last, within)]
            found = self.encoder.controls.findall(_same_start(*behind))
            return found[-1] if found else ""
        return ""

    @property
    def _known_end_ids(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        return self.base_end_ids if eos is None else (*self.base_end_ids, cast(int, eos))

    @cached_property
    def _ends(self) -> set[str]:
        known = self.tokenizer.convert_ids_to_tokens(list(self._known_end_ids))
        return {self.turn_end, *known}

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens at which generation stops; the first is the one that ends a plain answer.

        They are what ends an answer, and a call of a tool, by the chat template, and the end tokens
        of the base and of its tokenizer.

        Raises:
            TbpoError: if there is none.
        """
        ends: dict[int, None] = {}
        for answer, tools in ((ANSWER, ()), (CALLING, CALLED)):
            for probe in PROBES:
                try:
                    prompt = self.prompt(probe, tools)
                    response = self.response(probe, answer, tools, prompt)
                except (RejectedRow, TbpoError):
                    continue
                ends[self.encoder.encode([response])[0][-1]] = None
                break
        ends |= dict.fromkeys(self._known_end_ids)
        if not ends:
            raise TbpoError(
                "neither the chat template nor the tokenizer says where an answer ends",
                "the tokenizer of model.base",
                "a template that closes an answer with a control token, or an end-of-text token",
                OTHER_TEMPLATE,
            )
        return tuple(ends)

    @cached_property
    def _cuts_a_plain_chat(self) -> bool:
        """Whether some plain answer, with reasoning or without, can be cut from its rendering."""
        for probe, answer in itertools.product(PROBES, (ANSWER, *REASONED)):
            try:
                self._cut(
                    self.render(probe, (), add_generation_prompt=True),
                    self.render((*probe, answer), ()),
                )
                return True
            except (RejectedRow, TbpoError):
                continue
        return False


@limited
def render_pair(pair: PreferencePair, chat: Chat) -> tuple[str, str, str]:
    """(the prompt with the generation prompt, what chosen adds, what rejected adds or ""), masked.

    Raises:
        RejectedRow, TbpoError: see `Chat.prompt` and `Chat.response`.
    """
    prompt = chat.prompt(pair.prompt, pair.tools)
    chosen, rejected = (
        chat.response(pair.prompt, response, pair.tools, prompt) if response else ""
        for response in (pair.chosen, pair.rejected)
    )
    return prompt, chosen, rejected


def _same_start(first: str, second: str) -> str:
    """What two texts both begin with."""
    pairs = zip(first, second, strict=False)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return first[:length]


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_arguments_as_text(message: Message) -> Message:
    calls = []
    for call in message.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": text}}
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


@lru_cache
def _with_date(template: str, day: str) -> str:
    """The template with the calls that print today's date replaced by the text for that day."""
    on = date.fromisoformat(day)
    return re.sub(
        r"""strftime_now\(\s*(['"])(.+?)\1\s*\)""",
        lambda call: repr(on.strftime(call.group(2))),
        template,
    )
