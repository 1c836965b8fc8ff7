"""The judges of [judge]: a table from a key of it to the function that makes that judge.

A new judge is a file here, a line in the table, and a key of `Judge` in config/judging.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tbpo_cli.config.judging import Judge as Settings
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.pairs import Messages
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges import language_judge, reward_model, scorer
from tbpo_cli.evaluation.judges.judge import Judge

# Makes a judge of the table, the table's name and the file that keeps what the judge has said.
JudgeOf = Callable[[Settings, str, Path | None], Judge]

JUDGES: dict[str, JudgeOf] = {
    "scorer": scorer.judge_of,
    "reward_model": reward_model.judge_of,
    "endpoint": language_judge.judge_of,
}


def judges_of(
    settings: Settings | None, table: str, cache_of: Callable[[str], Path] | None = None
) -> list[Judge]:
    """Every judge that a table names, in the order of JUDGES.

    Args:
        settings: None if there is no such table.
        table: its name, "judge" or "eval.judge", for messages.
        cache_of: gives the file that keeps what the judge of a key has said; None: nothing is kept.

    Raises:
        TbpoError: if one of them cannot be made.
    """
    named = settings.named if settings is not None else ()
    return [
        JUDGES[key](settings, table, cache_of(key) if cache_of else None)
        for key in named
        if settings is not None
    ]


def check_prompts(settings: Settings | None, table: str, prompts: Sequence[Messages]) -> None:
    """Finds out which prompts a judge cannot read, before anybody answers them.

    Raises:
        TbpoError: if it can read none.
    """
    if settings is not None and settings.reward_model is not None:
        reward_model.check_prompts(settings, table, prompts)


def marker_of(recipe: Recipe, cache_of: Callable[[str], Path] | None = None) -> Judge:
    """The judge of [judge] whose marks say which answers make pairs.

    Raises:
        TbpoError: if the recipe names none, or several, or it cannot be made.
    """
    named = recipe.judge.named if recipe.judge is not None else ()
    if len(named) != 1:
        what = "nobody gives marks to the answers"
        fix = 'write [judge] with scorer = "python:FILE:NAME", reward_model or endpoint and model'
        if named:
            what = f"{len(named)} judges would give marks to the answers: {', '.join(named)}"
            fix = "leave one in [judge], and name the others under [eval.judge]"
        raise TbpoError(what, "[judge]", "one judge whose marks are compared", fix)
    (judge,) = judges_of(recipe.judge, "judge", cache_of)
    return judge
