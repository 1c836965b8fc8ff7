"""`tbpo losses`: what `[align.loss]` can name."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from tbpo_cli import console
from tbpo_cli.core.generators import GENERATORS
from tbpo_cli.core.losses import LOSSES


def show_losses() -> None:
    """Prints every loss and generator: its name, its keys with their defaults, its first lines."""
    losses = {name: cls for name, cls in LOSSES.items() if name != "sft"}
    tables: dict[str, dict[str, Any]] = {"losses": losses, "generators": dict(GENERATORS)}
    for title, table in tables.items():
        console.out.print(f"{title}:", markup=False)
        for name, cls in table.items():
            keys = [f"{key.name} = {_default(key)}" for key in dataclasses.fields(cls)]
            begin = f"  {name}: " if keys else f"  {name}"
            for line in textwrap.wrap(begin + ", ".join(keys), 80, subsequent_indent=" " * 6):
                console.out.print(line, markup=False)
            meaning = (cls.__doc__ or "").partition("\n\n")[0]
            for line in textwrap.wrap(" ".join(meaning.split()), 74):
                console.out.print(f"      {line}", markup=False)


def _default(key: Any) -> str:
    """The default of a key, as TOML has it."""
    value = key.default_factory() if callable(key.default_factory) else key.default
    if key.name == "generator":
        (name,) = [name for name, cls in GENERATORS.items() if cls is type(value)]
        fields = ", ".join(f"{part} = {number}" for part, number in vars(value).items())
        return f'{{name = "{name}", {fields}}}' if fields else f'"{name}"'
    return f'"{value}"' if isinstance(value, str) else str(value)
