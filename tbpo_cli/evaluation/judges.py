"""The table of judges. A new one is a file with a function that makes it, and its line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tbpo_cli.evaluation.language_judge import language_judge_of
from tbpo_cli.evaluation.reward_model import reward_model_of
from tbpo_cli.evaluation.scorer import scorer_of
from tbpo_cli.evaluation.verdicts import Judge
from tbpo_cli.recipe import Recipe

# key of [eval]: the judge of its value; the path is that of a file for the answers of a server
JUDGES: dict[str, Callable[[Any, Path | None], Judge]] = {
    "scorer": scorer_of,
    "reward_model": reward_model_of,
    "judge": language_judge_of,
}


def judges_of(recipe: Recipe, cache: Path | None = None) -> list[Judge]:
    """Every judge that [eval] names."""
    return [make(given, cache) for key, make in JUDGES.items() if (given := getattr(recipe.eval, key)) is not None]
