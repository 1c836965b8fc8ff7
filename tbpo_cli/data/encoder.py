"""Rendered text → token ids, where only the control tokens of the chat template are control tokens.

A tokenizer finds its control tokens in any text, whoever wrote it. Here it works on a copy in which
each control token has another name, one that no text has. The rendered text is given with these
names where the template wrote a control token; what a user wrote is given as it is, and is text.
So a whole text is encoded at once, as at inference, whatever a user writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tbpo_cli.data.pairs import RejectedRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Private-use characters, around the hexadecimal form of a control token in a user's text.
OPEN = "\ue0fa"
CLOSE = "\ue0fb"
MASKED = re.compile(f"{OPEN}([0-9a-f]+){CLOSE}")
# Characters that Unicode reserves for programs, around the number of a control token: its new name.
NAME = "\ufdd0{}\ufdd1"
NAMED = re.compile("\ufdd0[0-9]+\ufdd1")
# Words in the names of control tokens that a model itself writes, around reasoning and tool calls.
OF_REASONING = frozenset({"think", "thinking", "thought", "reasoning"})
OF_CALLS = frozenset({"call", "calls"})
BESIDE_THEM = frozenset({"begin", "start", "end", "of", "tool", "function"})
# Texts that hardly any tokenizer merges with what follows them.
ANCHORS = ("\n", "\x01", "a", ".")


@dataclass(frozen=True)
class Encoder:
    """The encoding side of a tokenizer."""

    tokenizer: PreTrainedTokenizerFast

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """The ids of the tokenizer's control tokens by their text, the longest first."""
        added = self.tokenizer.added_tokens_decoder.items()
        ids = {token.content: number for number, token in added if token.special}
        return dict(sorted(ids.items(), key=lambda item: -len(item[0])))

    @cached_property
    def controls(self) -> re.Pattern[str]:
        """Matches any control token."""
        return re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")

    @cached_property
    def _of_others(self) -> re.Pattern[str]:
        """Matches the control tokens that an answer's own text cannot have: all but the marks of
        reasoning and of calls that a model writes itself.
        """
        others = (text for text in self.control_tokens if not _is_of_answers(text))
        return re.compile("|".join(map(re.escape, others)) or r"(?!)")

    def mask_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with masked control tokens; the text of an answer keeps the marks of reasoning
        and of calls, which its template looks for, and which the model writes.
        """
        masked: dict[str, Any] = self.mask(message)
        if message.get("role") == "assistant" and isinstance(message.get("content"), str):
            masked["content"] = self.mask(message["content"], self._of_others)
        return masked

    def mask(self, content: Any, controls: re.Pattern[str] | None = None) -> Any:
        """Messages, or parts of them, with the control tokens in texts as private-use characters.

        Args:
            controls: matches those to mask; None: all.

        Raises:
            RejectedRow: invalid_text, if a text has the characters that are used for masking.
        """
        if isinstance(content, str):
            if NAMED.search(content):
                raise RejectedRow("invalid_text", "it has U+FDD0, which is not a character")
            if OPEN in content or CLOSE in content:
                content = re.sub(f"[{OPEN}{CLOSE}]", _masked, content)
            return (controls or self.controls).sub(_masked, content)
        if isinstance(content, dict):
            return {self.mask(key): self.mask(value) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return [self.mask(item) for item in content]
        return content

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered texts with masked control tokens; nothing is added, cut or padded."""
        named = [self.controls.sub(self._named, text) for text in texts]
        return self._encode([unmask(text) if OPEN in text else text for text in named])

    def decode(self, ids: Sequence[int]) -> str:
        """An answer as text, without control tokens but for the marks of reasoning and calls."""
        return str(
            self.tokenizer.decode([number for number in ids if number not in self._not_said])
        )

    @cached_property
    def _not_said(self) -> frozenset[int]:
        """The ids of the control tokens that are no part of an answer's text."""
        marks = self.control_tokens.items()
        return frozenset(number for text, number in marks if not _is_of_answers(text))

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which nothing is a control token."""
        return self._encode([text.replace("\ufdd0", "\ufffd") for text in texts])

    def encode_after(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """Ids of rendered responses, each tokenized on its own, not together with its prompt.

        1. A tokenizer that adds nothing before a text encodes a response as it stands.
        2. One that puts a space before whatever it is given (SentencePiece) encodes the end of the
           prompt and the response together; the prompt's tokens are taken away again. The space is
           not in the text, and inference does not see it.
        3. Where a token would span the end of the prompt and the beginning of the response, the
           response is encoded behind another text, with which it shares no token.
        """
        newline, word, both = self.encode(["\n", "ab", "\nab"])
        if newline + word == both:
            return self.encode(responses)
        tails = [self._tail(prompt) for prompt in prompts]
        joint = self.encode([tail + text for tail, text in zip(tails, responses, strict=True)])
        return [
            ids[len(before) :] if ids[: len(before)] == before else self._encode_behind(response)
            for ids, before, response in zip(joint, self.encode(tails), responses, strict=True)
        ]

    def _encode_behind(self, response: str) -> list[int]:
        """Ids of a text behind the first of ANCHORS that shares no token with it."""
        for anchor in ANCHORS:
            before, both = self.encode([anchor, anchor + response])
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.encode([response])[0]

    def _tail(self, prompt: str) -> str:
        """The last characters of a prompt, from its last control token on if that is near."""
        start = max(len(prompt) - 32, prompt.rfind(CLOSE) + 1)
        for match in self.controls.finditer(prompt, start):
            start = match.start()
        return prompt[start:]

    def _named(self, match: re.Match[str]) -> str:
        return NAME.format(self.control_tokens[match.group()])

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._copy.encode_batch_fast(texts)]

    @cached_property
    def _copy(self) -> Tokenizer:
        """The tokenizer with its control tokens under other names, in its vocabulary as well.

        No merge makes a control token out of parts of a text, and nothing is added to a text.
        """
        from tokenizers import Tokenizer

        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {text: NAME.format(number) for text, number in self.control_tokens.items()}
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = spec["model"]
        if "merges" in model:
            model["merges"] = [
                (first, second)
                for first, second in model["merges"]
                if names.keys().isdisjoint((first, second, first + second))
            ]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {names.get(text, text): number for text, number in vocab.items()}
        else:
            model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        spec |= {"truncation": None, "padding": None, "post_processor": None}
        return Tokenizer.from_str(json.dumps(spec))


def _is_of_answers(control: str) -> bool:
    """Whether a control token is a mark of reasoning or of a call, by the words of its name."""
    words = {*re.findall(r"[a-z]+", control.lower())}
    return bool(words & (OF_REASONING | OF_CALLS)) and words <= (
        OF_REASONING | OF_CALLS | BESIDE_THEM
    )


def _masked(match: re.Match[str]) -> str:
    return OPEN + match.group().encode().hex() + CLOSE


def unmask(text: str) -> str:
    """The text with what was masked written out."""
    return MASKED.sub(lambda match: bytes.fromhex(match.group(1)).decode(), text)
