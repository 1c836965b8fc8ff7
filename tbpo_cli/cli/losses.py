"""`tbpo losses`: the losses as their classes describe themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from dataclasses import dataclass

from tbpo_cli.config.loss import instead_of
from tbpo_cli.core.generators import GENERATORS
from tbpo_cli.core.head import REFERENCE_FREE, STATISTICS
from tbpo_cli.core.losses import LOSSES, Loss
from tbpo_cli.errors import TbpoError

COMPARED = {  # by the span of the loss, and then by what it compares
    "chosen": "nothing: it reads the chosen response",
    "aligned": "tokens",
    "aligned_and_chosen": "tokens",
    "response": "whole responses",
}
COLUMNS = ("loss", "compares", "needs", "a step, over dpo's", "fields", "source", "when to take it")
# The time of a step over that of dpo's, as measured: tests/benchmarks/results/loss_costs.md.
COSTS = {
    "sft": 0.38,
    "dpo": 1.0,
    "dpo_norm": 1.02,
    "robust": 1.06,
    "ipo": 1.03,
    "hinge": 1.01,
    "simpo": 0.69,
    "cpo": 0.67,
    "orpo": 0.68,
    "apo_zero": 0.97,
    "apo_down": 0.97,
    "dpop": 1.0,
    "bpo": 1.01,
    "tdpo": 1.13,
    "wpo": 1.02,
    "ld_dpo": 1.06,
    "d2po": 1.02,
    "confpo": 0.71,
    "tis_dpo": 1.71,
    "tgdpo": 1.36,
    "tbpo_q": 0.95,
    "tbpo_a": 0.83,
}
WHERE_MEASURED = "on the CPU, with a small model and LoRA"
LOGITS = "policy logits"
FROZEN_HEAD = (
    "tbpo_a computes no policy logits where the head is frozen, as with LoRA; where all weights "
    "are trained, its steps compute them as well."
)
HELPERS = {1: "a helper policy", 2: "two helper policies"}


@dataclass(frozen=True)
class Description:
    """What is shown of a loss to a person who chooses one.

    Args:
        name: in `[align.loss]`.
        summary: its formula, the first paragraph of the class's docstring.
        compares: whole responses, or tokens.
        needs: beside the policy's hidden states.
        cost: the time of a step over that of dpo's; None for a loss that was not measured.
        fields: the keys of `[align.loss]`, with their defaults as TOML has them.
        source: the paper.
        when: when to take it.
    """

    name: str
    summary: str
    compares: str
    needs: str
    cost: float | None
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
        cost=COSTS.get(name),
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
        models.append(LOGITS)
    return ", ".join(models)


def _toml(value: object) -> str:
    """A field's value as TOML has it."""
    names: dict[type, str] = {cls: name for name, cls in GENERATORS.items()}
    if type(value) in names:
        fields = [f"{key} = {_toml(each)}" for key, each in vars(value).items()]
        return "{" + ", ".join([f'name = "{names[type(value)]}"', *fields]) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def as_text(wanted: str | None = None, width: int = 100) -> str:
    """The losses, then the generators, for a terminal: a paragraph each.

    Args:
        wanted: the only loss or generator that is described.
        width: columns of a line.

    Raises:
        TbpoError: if there is none of that name.
    """
    paragraphs: dict[str, str] = {}
    for each in descriptions():
        lines = [
            each.summary,
            f"compares {each.compares}; needs {each.needs}{_cost(each)}",
            "" if LOGITS in each.needs else FROZEN_HEAD,
            each.fields,
            each.source,
            each.when,
        ]
        paragraphs[each.name] = _paragraph(each.name, lines, width)
    for name, cls in GENERATORS.items():
        lines = [_summary(cls), f"generator = {_toml(cls())}"]
        paragraphs[name] = _paragraph(f"generator {name}", lines, width)
    if wanted is None:
        return "\n\n".join(paragraphs.values())
    if wanted not in paragraphs:
        expected = f"one of {', '.join(paragraphs)}"
        near, why = instead_of(wanted, list(paragraphs))
        fix = why or (f"tbpo losses {near}" if near else "tbpo losses")
        raise TbpoError(f"there is no loss {wanted!r}", "the command line", expected, fix)
    return paragraphs[wanted]


def _cost(each: Description) -> str:
    return "" if each.cost is None else f"; with LoRA, a step takes {each.cost:.2g} times dpo's"


def _paragraph(name: str, lines: list[str], width: int) -> str:
    """The name, and under it the lines that say something, indented."""
    wrapped = [
        textwrap.fill(line, width, initial_indent="  ", subsequent_indent="    ")
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
        cost = "" if each.cost is None else f"{each.cost:.2f}"
        row = (f"`{each.name}`", each.compares, each.needs, cost, fields, each.source, each.when)
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
