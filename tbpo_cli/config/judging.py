"""The table of a recipe that says who judges answers: [judge], and [eval.judge] in its place.

The text under a field says what its key means; docs/recipe.md is made of these texts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, ClassVar

from tbpo_cli.config.validate import table
from tbpo_cli.config.values import Address, Count, NotNegative, Positive


def default_body() -> dict[str, Any]:
    """The further keys of a request to a language model, where the recipe gives none."""
    return {"temperature": 0.0, "max_tokens": 1024}


@table
class Judge:
    """[judge] Who judges answers: a function, a reward model, a language model on a server.

    `tbpo eval` measures the win rate by each that is named, and pairs of the policy's own answers
    are chosen by the marks of one.
    """

    scorer: str | None = None
    """"python:FILE:NAME", a function of the prompt's and the answer's text that gives its mark."""
    reward_model: str | None = None
    """A sequence classification model that gives marks: a folder or a Hub repository."""
    endpoint: Address | None = None
    """The address, up to and including /v1, of a server with OpenAI's API that has a language
    model; its key is read from OPENAI_API_KEY. It compares two answers, or marks one."""
    model: str | None = None
    """The language model's name on the server."""
    template: str | None = None
    """A text file with {prompt}, {a} and {b} that asks for [[A]], [[B]] or [[C]]."""
    mark_template: str | None = None
    """A text file with {prompt}, {answer}, {low} and {high} that asks for a mark as [[MARK]]."""
    scale: tuple[float, float] = (1.0, 10.0)
    """The lowest and the highest mark of the language model; a number outside is not a mark."""
    body: dict[str, Any] = field(default_factory=default_body)
    """Further keys of each request."""
    concurrency: Count = 8
    """Requests at a time."""
    timeout: Positive = 120.0
    """Seconds for a whole answer of the server."""
    repeats: Count = 1
    """How often each question is asked; more than once only at a temperature above 0."""
    price_per_million: tuple[NotNegative, NotNegative] | None = None
    """The price of a million tokens of prompts and of completions, for the report."""

    kinds: ClassVar[tuple[str, ...]] = ("scorer", "reward_model", "endpoint")

    def __post_init__(self) -> None:
        if (self.endpoint is None) != (self.model is None):
            raise ValueError("endpoint and model must be given together")
        if not self.named:
            raise ValueError("scorer must be given, or reward_model, or endpoint and model")
        if not self.scale[0] < self.scale[1]:
            raise ValueError("scale must be the lowest and the highest mark")
        if self.endpoint is None and (unread := self._given_of_a_server()):
            raise ValueError(f"{unread[0]} is not read: it is of a language model, with endpoint")
        if self.repeats > 1 and self.body.get("temperature") == 0:
            raise ValueError(
                "repeats must be 1 at temperature 0, where all answers to a question are alike: "
                "give body a temperature above 0, as in {temperature = 0.7, max_tokens = 1024}"
            )

    def _given_of_a_server(self) -> list[str]:
        """The keys of a language model that do not have their default."""
        usual = {
            each.name: each.default
            if each.default_factory is dataclasses.MISSING
            else each.default_factory()
            for each in dataclasses.fields(Judge)
            if each.name not in self.kinds
        }
        return [name for name, value in usual.items() if getattr(self, name) != value]

    def in_common(self, other: Judge) -> tuple[str, ...]:
        """The kinds of judges that are the same in both tables. A language model is the same one at
        another address.
        """
        keys = {"endpoint": "model"}
        return tuple(
            kind
            for kind in self.named
            if kind in other.named
            and getattr(self, keys.get(kind, kind)) == getattr(other, keys.get(kind, kind))
        )

    @property
    def named(self) -> tuple[str, ...]:
        """The kinds of judges that the table names, in order."""
        return tuple(kind for kind in self.kinds if getattr(self, kind) is not None)
