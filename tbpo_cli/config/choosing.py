"""The table of a recipe that says which answers to a prompt make a pair: [choose].

The text under a field says what its key means; docs/recipe.md is made of these texts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tbpo_cli.config.validate import table
from tbpo_cli.config.values import NotNegative


@table
class Choose:
    """[choose] Which answers to a prompt make pairs, by their marks."""

    pairs: Literal["best_worst", "best_two_sigma", "best_random", "best_each", "all"] = "best_worst"
    """Which answers are compared: the best one with the worst, with the one nearest to two standard
    deviations below the mean mark, with a random lower one or with each lower one; or each answer
    with each lower one."""
    min_margin: NotNegative = 0.0
    """The least difference of the two marks, in the judge's own unit. Equal marks make no pair."""
    max_length_difference: Annotated[int, Field(ge=0)] | None = None
    """The largest difference of the two lengths, tokens. Default: any."""
