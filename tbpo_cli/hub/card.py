"""The model card: metadata that is always made here, and a text from a template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from jinja2 import Environment, StrictUndefined, TemplateError, Undefined

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.core.losses import LOSSES
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.measures import MEASURES
from tbpo_cli.hub.base import Base
from tbpo_cli.hub.markdown import code, escaped
from tbpo_cli.runs.inputs import FREE_KEYS

TEMPLATE = Path(__file__).parent / "templates" / "card.md"


def is_whole(recipe: Recipe) -> bool:
    """Whether whole weights are published, not an adapter."""
    return recipe.push.merge or recipe.model.lora is None


def render_card(
    recipe: Recipe,
    base: Base,
    results: dict[str, Any] | None,
    manifests: dict[str, Any],
    end_ids: Sequence[int] = (),
) -> str:
    """The card of a run: its text is that of push.card, or of templates/card.md.

    No name, value or result can add to its metadata or its markup.

    Args:
        end_ids: the tokens at which generation is to stop. Whole weights have them in their
            generation config; an adapter has none, and its base may stop at others.

    Raises:
        TbpoError: if the template cannot be rendered.
    """
    source = inspect.getdoc(LOSSES[recipe.align.loss_name]) or ""
    paper = re.search(r"arXiv ([\d.]+\d)", source)
    settings = {key: value for key, value in recipe.settings().items() if key not in FREE_KEYS}
    names = {
        "recipe": recipe,
        "repo": recipe.push.repo or "USER/NAME",
        "base": base,
        "whole": is_whole(recipe),
        "end_ids": list(end_ids),
        "results": results,
        "manifests": manifests,
        "judge": _judge(recipe),
        "name_of": name_of,
        "measures": MEASURES,
        "settings": settings,
        "meaning": source.partition("\n\n")[0].partition(" Source:")[0],
        "paper": paper and paper[1],
    }
    path = Path(recipe.push.card) if recipe.push.card else TEMPLATE
    try:
        text = _environment().from_string(path.read_text("utf-8")).render(names)
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        raise TbpoError(
            f"the card cannot be made: {error}",
            f"{path}, line {getattr(error, 'lineno', '?')}",
            "a Jinja template with the names of templates/card.md",
            "correct the template",
        ) from None
    return f"---\n{_metadata(recipe, base, results).to_yaml()}\n---\n\n{text.strip()}\n"


def _judge(recipe: Recipe) -> str:
    """Who marked the answers that the pairs are made of; "" if nobody has."""
    judge = recipe.judge
    if recipe.rounds is None or judge is None:
        return ""
    name = str(judge.scorer or judge.reward_model or judge.model)
    return name_of(name.removeprefix("python:"))


def _environment() -> Environment:
    """Values are escaped for Markdown, unless a filter has made them markup: `code`, `tojson` for
    a text in a program, `urlencode` in an address, `safe` for what is Markdown.
    """
    environment = Environment(
        autoescape=True,  # what a macro makes is markup, and not escaped again
        finalize=lambda value: value if isinstance(value, Undefined) else escaped(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    return environment


def _metadata(recipe: Recipe, base: Base, results: dict[str, Any] | None) -> hf.ModelCardData:
    """What the Hub reads of a card."""
    whole = is_whole(recipe)
    datasets = [source.path for source in recipe.data.train if not Path(source.path).is_absolute()]
    tags = ["tbpo", "preference-optimization", recipe.align.loss_name]
    return hf.ModelCardData(
        library_name="transformers" if whole else "peft",
        base_model=base.id,
        base_model_relation="finetune" if whole else "adapter",
        datasets=datasets or None,
        tags=tags if whole else [*tags, "lora"],
        pipeline_tag="text-generation",
        **base.licence,
        **(_model_index(recipe, results) if results else {}),
    )


def _model_index(recipe: Recipe, results: dict[str, Any]) -> dict[str, Any]:
    """The measured figures, in the form of the Hub's leaderboards."""
    policy = results["models"]["policy"]
    figures = {("accuracy", "reward accuracy"): policy["preference"]["all"].get("accuracy")}
    for rate in results["win_rates"]:
        if rate["model"] == "policy":
            name = f"win rate against {rate['against']} by {rate['judge']}"
            figures["win_rate", name] = rate["raw"]
    for suite, tasks in policy.get("suites", {}).items():
        figures |= {(task, f"{suite}: {task}"): figure for task, figure in tasks.items()}
    data = name_of((recipe.data.eval or recipe.data.train)[0].path)
    evaluated = [
        hf.EvalResult("text-generation", data, data, kind, figure["value"], metric_name=name)
        for (kind, name), figure in figures.items()
        if figure is not None
    ]
    repo = recipe.push.repo or "USER/NAME"
    return {"model_name": repo.partition("/")[2], "eval_results": evaluated}


def name_of(path: str) -> str:
    """A source as the card names it: a local file without its folder, or the id on the Hub."""
    return Path(path).name if Path(path).is_absolute() else path
