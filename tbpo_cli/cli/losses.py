"""`tbpo losses`: the losses as their classes describe themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from dataclasses import dataclass

from tbpo_cli.core.generators import GENERATORS
from tbpo_cli.core.head import REFERENCE_FREE, STATISTICS
from tbpo_cli.core.losses import LOSSES, Loss

COMPARED = {  # by the span of the loss, and then by what it compares
    "chosen": "nothing: it reads the chosen response",
    "aligned": "tokens",
    "aligned_and_chosen": "tokens",
    "response": "whole responses",
}
COLUMNS = ("loss", "compares", "needs", "fields", "source", "when to take it")
HELPERS = {1: "a helper policy", 2: "two helper policies"}
WIDTH = 100


@dataclass(frozen=True)
class Description:
    """What a person who chooses a loss reads of it.

    Args:
        name: in `[align.loss]`.
        summary: its formula, the first paragraph of the class's docstring.
        compares: whole responses, or tokens.
        needs: beside the policy's hidden states.
        fields: the keys of `[align.loss]`, with their defaults as TOML has them.
        source: the paper.
        when: when to take it.
    """

    name: str
    summary: str
    compares: str
    needs: str
    fields: str
    source: str
    when: str


def describe(name: str, loss: Loss) -> Description:
    """The description of a loss, from its class and the values of its fields."""
    text = " ".join((inspect.getdoc(type(loss)) or "").split())
    source = re.search(r"Source: (.*?)(?:[.;,] |\.?$)", text)
    return Description(
        name=name,
        summary=_summary(type(loss)),
        compares=COMPARED[loss.span],
        needs=_needs(loss),
        fields=", ".join(
            f"{field.name} = {_toml(getattr(loss, field.name))}"
            for field in sorted(dataclasses.fields(loss), key=lambda one: one.name == "sft_weight")
        ),
        source=source[1] if source else "",
        when=loss.when,
    )


def descriptions() -> list[Description]:
    """Of all losses, with their defaults, in the order of their table."""
    return [describe(name, cls()) for name, cls in LOSSES.items()]


def _needs(loss: Loss) -> str:
    """The models and the logits that a step of the loss computes."""
    statistics = loss.needs & STATISTICS
    models = [] if statistics <= REFERENCE_FREE else ["a reference"]
    if loss.helpers:
        models.append(HELPERS[len(loss.helpers)])
    if "state_baseline" in loss.needs:
        models.append("a learned baseline")
    if statistics != {"advantage"}:
        models.append("policy logits")
    return ", ".join(models)


def _toml(value: object) -> str:
    """A field's value as TOML has it."""
    names: dict[type, str] = {cls: name for name, cls in GENERATORS.items()}
    if type(value) in names:
        fields = [f"{key} = {_toml(each)}" for key, each in vars(value).items()]
        return "{" + ", ".join([f'name = "{names[type(value)]}"', *fields]) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def as_text() -> str:
    """The losses, then the generators, for a terminal: a paragraph each."""
    paragraphs = []
    for each in descriptions():
        lines = [
            each.summary,
            f"compares {each.compares}; needs {each.needs}",
            each.fields,
            each.source,
            each.when,
        ]
        paragraphs.append(_paragraph(each.name, lines))
    for name, cls in GENERATORS.items():
        lines = [_summary(cls), f"generator = {_toml(cls())}"]
        paragraphs.append(_paragraph(f"generator {name}", lines))
    return "\n\n".join(paragraphs)


def _paragraph(name: str, lines: list[str]) -> str:
    """The name, and under it the lines that say something, indented."""
    wrapped = [
        textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
        for line in lines
        if line
    ]
    return "\n".join([name, *wrapped])


def _summary(cls: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def as_markdown() -> str:
    """The losses as a table for the documentation."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for each in descriptions():
        fields = f"`{each.fields}`" if each.fields else ""
        rows.append((f"`{each.name}`", each.compares, each.needs, fields, each.source, each.when))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
