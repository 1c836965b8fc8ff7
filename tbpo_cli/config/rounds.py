"""The table of a recipe that makes pairs of the policy's own answers: [rounds].

The text under a field says what its key means; docs/recipe.md is made of these texts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tbpo_cli.config.validate import table
from tbpo_cli.config.values import Address, Count, Fraction, Positive


@table
class Rounds:
    """[rounds] Pairs from the policy's own answers: it answers, [judge] marks, [choose] pairs."""

    number: Count = 1
    """The number of rounds. Each begins with the policy of the round before."""
    prompts: Literal["dealt", "same"] | Count = "dealt"
    """The prompts of a round. "dealt": all prompts, divided among the rounds as the seed decides;
    "same": all, in each round; a number: so many in each, taken in turn, so that a further round
    leaves the earlier ones as they are."""
    held_out_prompts: Count = 100
    """Held-out prompts that the first policy and that of each round answer, for the report."""
    answers: Annotated[int, Field(ge=2)] = 5
    """Answers of the policy to each prompt."""
    temperature: Positive = 1.0
    """The temperature of these answers."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together have this probability are drawn."""
    max_new_tokens: Count = 512
    """The most tokens of an answer. One that is cut there is never chosen."""
    batch_size: Count = 32
    """Answers at a time. It changes the speed, and logits by rounding alone."""
    reference: Literal["first", "previous"] = "first"
    """The reference of each round: the one of the beginning, or the policy of the round before."""
    replay: Fraction = 0.0
    """The share of each earlier round's pairs that is trained on again."""
    endpoint: Address | None = None
    """A server with OpenAI's API that answers for the policy; with [model.lora], a vLLM server that
    loads adapters while it runs."""
    endpoint_model: str | None = None
    """The base's name on that server."""
    endpoint_folder: str | None = None
    """The run's folder as the server sees it. Default: as it is here."""

    def __post_init__(self) -> None:
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError("endpoint and endpoint_model must be given together")
        if self.endpoint is None and self.endpoint_folder is not None:
            raise ValueError("endpoint_folder is of a server, and endpoint names none")
