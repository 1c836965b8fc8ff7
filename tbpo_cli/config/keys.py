"""The keys of a recipe, found by name: where a misplaced key belongs, what may be left out."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from tbpo_cli.config.advice import ADDRESSES, TABLES
from tbpo_cli.config.other_tools import THEIRS, counterpart
from tbpo_cli.config.validate import did_you_mean

# A key of one training stage that has another name in the other.
TWINS = {("sft", "batch_pairs"): "batch_examples", ("align", "batch_examples"): "batch_pairs"}

# A key of an earlier version: what it is called now.
RENAMED = {
    "data.ranking": "choose.pairs",
    "eval.scorer": "judge.scorer",
    "eval.reward_model": "judge.reward_model",
}

# A key that is often written for one of the same table.
MISTAKEN = {
    **{f"{table}.{name}": "endpoint" for table in ("judge", "eval.judge") for name in ADDRESSES},
    **{f"{table}.path": "scorer" for table in ("judge", "eval.judge")},
}


def all_keys(table: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a table and of the tables in it, as ("align.batch_pairs", its type)."""
    hints = typing.get_type_hints(table)
    for each in dataclasses.fields(table):
        key = prefix + each.name
        kind = hints[each.name]
        yield key, kind
        for part in _members(kind):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from all_keys(part, f"{key}.")


def _members(kind: Any) -> tuple[Any, ...]:
    """The types that a value may have: those of a union, else the one."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def may_be_absent(recipe: type, key: str) -> bool:
    """Whether a recipe may leave a table or a key out, as with "model.lora"."""
    return any(key == name and type(None) in _members(kind) for name, kind in all_keys(recipe))


def hint_for_unknown(recipe: type, keys: tuple[str, ...], near: str, given: Any = None) -> str:
    """What to write in place of a key that its table does not have; "" if nothing is like it.

    A key of another tool is answered with ours; one that is spelt like a key of its table with that
    key; one of another table with its place. [sft] and [align] are alike: there, a key of the same
    table comes before one of the other.
    """
    name = keys[-1]
    if keys in {(each.name,) for each in dataclasses.fields(recipe)}:  # by --set TABLE=VALUE
        return f"{name} is a table: --set {name}.KEY=VALUE"
    if isinstance(given, dict) and (place := TABLES.get(name)):
        return place
    if now := RENAMED.get(".".join(keys)):
        return f"it is called {now} now"
    if meant := MISTAKEN.get(".".join(keys)):
        return did_you_mean(keys, meant)
    theirs = THEIRS.get(name)
    if theirs is not None and theirs.ours != ".".join(keys):
        return counterpart(name, given)
    if keys in TWINS:
        return did_you_mean(keys, TWINS[keys])
    places = [key for key, _ in all_keys(recipe) if key.rpartition(".")[2] == name]
    places += [place for place in places_in_loss(name) if place != ".".join(keys)]
    is_misspelt = difflib.SequenceMatcher(None, name, near).ratio() > 0.8
    if near and (is_misspelt or not places or keys[0] in ("sft", "align")):
        return did_you_mean(keys, near)
    if not places:
        return ""
    own = [place for place in places if place.startswith("align.")] or places
    return f"it belongs to another table: {' or '.join(own)}"


def places_in_loss(name: str) -> list[str]:
    """Where the losses, and their generators, have a key of that name."""
    from tbpo_cli.core.generators import GENERATORS
    from tbpo_cli.core.losses import LOSSES

    tables: dict[str, dict[str, Any]] = {"align.loss": LOSSES, "align.loss.generator": GENERATORS}
    return [
        f"{table}.{name}"
        for table, classes in tables.items()
        if any(name == each.name for cls in classes.values() for each in dataclasses.fields(cls))
    ]


def nearest(name: str, names: list[str], cutoff: float = 0.5) -> str:
    """The most similar of some names, or ""."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), "")
