"""TOML tables → checked dataclasses, with pydantic's findings told in the words of a recipe."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from dataclasses import fields
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from tbpo_cli.errors import TbpoError

STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
Table = TypeVar("Table")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def table(cls: type[Table]) -> type[Table]:
    """A frozen dataclass whose values are checked, strictly, when one is made."""
    return cast(type[Table], validated(cls, frozen=True, config=STRICT))


def validate(cls: type, raw: Any, path: str, where: tuple[str, ...]) -> tuple[Any, list[TbpoError]]:
    """An instance of a dataclass from TOML values, or its faults. `core`'s plain dataclasses are checked alike."""
    checked = (
        cls if hasattr(cls, "__pydantic_config__") else validated(cls, frozen=True, config=STRICT)
    )
    try:
        # By way of JSON, where "strict" takes an array for a tuple and a table for a dataclass, and nothing else.
        value: Any = TypeAdapter(checked).validate_json(json.dumps(raw, default=str))
        return (
            value
            if checked is cls
            else cls(**{f.name: getattr(value, f.name) for f in fields(value)})
        ), []
    except ValidationError as error:
        faults: dict[tuple[str, ...], TbpoError] = {}
        for entry in error.errors():
            keys = tuple(str(part) for part in entry["loc"] if _is_key(part))
            faults.setdefault(keys, _of_entry(entry, (*where, *keys), cls, path))
        return None, list(faults.values())


def _is_key(part: Any) -> bool:
    """Whether a part of pydantic's location is a key of ours, not the name of one member of a union."""
    return isinstance(part, str) and part.isidentifier() and part not in {"str", "none"}


def fault(what: str, path: str, keys: tuple[str, ...], expected: str, fix: str = "") -> TbpoError:
    where = (
        f"{path}, [{'.'.join(keys[:-1])}] {keys[-1]}" if len(keys) > 1 else f"{path}, [{keys[0]}]"
    )
    return TbpoError(
        what, where, expected, fix or f"change it there, or give --set {'.'.join(keys)}=…"
    )


def _of_entry(entry: Any, keys: tuple[str, ...], cls: type, path: str) -> TbpoError:
    """One of pydantic's errors in our words."""
    name, given = ".".join(keys), entry["input"]
    if entry["type"] == "unexpected_keyword_argument":
        names = [f.name for f in fields(_owner(cls, entry["loc"]))]
        near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
        fix = f"did you mean {'.'.join((*keys[:-1], near[0]))}?" if near else "remove it"
        what = f"{name} is an unknown {'table' if isinstance(given, dict) else 'key'}"
        return fault(
            what, path, keys, f"one of {', '.join(names)}" if names else "no further keys", fix
        )
    if entry["type"] == "missing":
        fix = (
            f"add {keys[-1]} = … under [{'.'.join(keys[:-1])}]"
            if len(keys) > 1
            else f"add a table [{name}]"
        )
        return fault(f"{name} is missing", path, keys, "a value: it has no default", fix)
    expected = entry["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if entry["type"] == "value_error" and isinstance(
        given, dict
    ):  # of a __post_init__: it begins with the key
        keys = (*keys, expected.split()[0])
        return fault(f"{'.'.join(keys)} is not possible", path, keys, expected)
    if entry["type"] in {"dataclass_type", "dataclass_exact_type"}:
        expected = f"a table: [{name}]"
    known = entry["type"] in {"literal_error", "value_error"}
    options = expected.replace("'", "").replace(" or ", ", ").split(", ") if known else []
    near = difflib.get_close_matches(str(given), options, n=1)
    fix = f'{keys[-1]} = "{near[0]}"' if near else ""
    return fault(
        f"{name} = {json.dumps(given, default=str)} is not possible", path, keys, expected, fix
    )


def _owner(table: Any, loc: tuple[Any, ...]) -> Any:
    """The dataclass of the table that a key is in, by way of tables that may be optional, or one of several."""
    for key in filter(_is_key, loc[:-1]):
        hints: list[Any] = [typing.get_type_hints(table)[key]]
        while not dataclasses.is_dataclass(hints[0]):
            hints = [*hints[1:], *typing.get_args(hints[0])]
        table = hints[0]
    return table
