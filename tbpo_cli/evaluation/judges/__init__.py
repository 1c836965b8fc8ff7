"""The judges of [eval]: a table from a key of the recipe to the function that makes its judge.

A new judge is a file here, a line in the table, and a key of `Eval` in config/evaluation.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.evaluation.judges import language_judge, reward_model, scorer
from tbpo_cli.evaluation.judges.judge import Judge

# Makes the judge of a key's value; the file keeps what it has said.
JudgeOf = Callable[[Any, Path | None], Judge]

JUDGES: dict[str, JudgeOf] = {
    "scorer": scorer.judge_of,
    "reward_model": reward_model.judge_of,
    "judge": language_judge.judge_of,
}


def judges_of(recipe: Recipe, cache_of: Callable[[str], Path] | None = None) -> list[Judge]:
    """Every judge that [eval] names, in the order of the table.

    Args:
        cache_of: gives the file that keeps what the judge of a key has said; None: nothing is kept.

    Raises:
        TbpoError: if one of them cannot be made.
    """
    values = {key: getattr(recipe.eval, key) for key in JUDGES}
    return [
        JUDGES[key](value, cache_of(key) if cache_of else None)
        for key, value in values.items()
        if value is not None
    ]
