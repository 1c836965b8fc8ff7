"""TOML tables → checked dataclasses, with every fault in the words of a recipe.

pydantic finds the faults, all of them at once and for nested unions; it words them for programmers.
Each of its kinds of fault has one function here that words it for a person.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from tbpo_cli.errors import TbpoError

STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
Table = TypeVar("Table")
Keys = tuple[str, ...]

# What a text must be, by the patterns in config/values.py.
PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "letters, digits, '.', '_' and '-', a letter or digit first",
    r"^[\w.-]+/[\w.-]+$": 'a repository\'s id, "user/name"',
    r"^[\w.-]+/[\w.-]+(@.+)?$": 'a repository\'s id, "user/name" or "user/name@revision"',
    r"^https?://\S+$": 'an address, "http://…" or "https://…"',
}


Hint = Callable[[Keys, str], str]  # of an unknown key and the nearest one that its table has


def did_you_mean(keys: Keys, near: str) -> str:
    """What to write in place of an unknown key, of which nothing is known but its table."""
    return f"did you mean {'.'.join((*keys[:-1], near))}?" if near else ""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def table(cls: type[Table]) -> type[Table]:
    """A frozen dataclass whose values are checked, strictly, when one is made."""
    return cast(type[Table], validated(cls, frozen=True, config=STRICT))


def validate(
    cls: type, raw: Any, path: str, where: Keys, hint: Hint = did_you_mean
) -> tuple[Any, list[TbpoError]]:
    """An instance of a dataclass from TOML values, or its faults.

    Args:
        cls: one of our tables, or a plain dataclass of `core`, which is checked alike.
        raw: the value in the recipe.
        path: of the recipe, for messages.
        where: the keys that lead to `raw`.
        hint: what to write in place of an unknown key.
    """
    is_table = hasattr(cls, "__pydantic_config__")
    checked = cls if is_table else validated(cls, frozen=True, config=STRICT)
    # By way of JSON, where "strict" takes an array for a tuple and a table for a dataclass.
    text = json.dumps(raw, default=str)
    try:
        value: Any = TypeAdapter(checked).validate_json(text)
    except ValidationError as error:
        faults: dict[Keys, TbpoError] = {}
        for entry in error.errors():
            keys = tuple(str(part) for part in entry["loc"] if _is_key(part))
            if keys not in faults:
                faults[keys] = _in_words(entry, (*where, *keys), cls, path, hint)
        return None, list(faults.values())
    if not is_table:
        value = cls(**{each.name: getattr(value, each.name) for each in fields(value)})
    return value, []


def _is_key(part: Any) -> bool:
    """Whether a part of pydantic's location is a key of ours, and not one member of a union."""
    return isinstance(part, str) and part.isidentifier() and part not in {"str", "none"}


def fault(what: str, path: str, keys: Keys, expected: str, fix: str = "") -> TbpoError:
    """A fault at a key of the recipe; without a `fix`, the key is to be changed."""
    where = f"[{'.'.join(keys[:-1])}] {keys[-1]}" if len(keys) > 1 else f"[{keys[0]}]"
    fix = fix or f"change it there, or give --set {'.'.join(keys)}=…"
    return TbpoError(what, f"{path}, {where}", expected, fix)


def _in_words(entry: Any, keys: Keys, cls: type, path: str, hint: Hint) -> TbpoError:
    """One of pydantic's errors in our words."""
    kind, given = entry["type"], entry["input"]
    if kind == "unexpected_keyword_argument":
        names = [each.name for each in fields(_owner(cls, entry["loc"]))]
        return unknown_key(keys, names, path, isinstance(given, dict), hint)
    if kind == "missing":
        return _missing(keys, path)
    if kind == "value_error" and isinstance(given, dict):  # of a __post_init__
        return _refused_together(entry, keys, path)
    return _impossible(entry, keys, path)


def unknown_key(keys: Keys, names: list[str], path: str, is_table: bool, hint: Hint) -> TbpoError:
    """A key that its table does not have.

    Args:
        names: the keys that the table has.
        hint: see `validate`.
    """
    near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
    fix = hint(keys, near[0] if near else "")
    what = f"{'.'.join(keys)} is an unknown {'table' if is_table else 'key'}"
    expected = f"one of {', '.join(names)}" if names else "no further keys"
    return fault(what, path, keys, expected, fix or "remove it")


def _missing(keys: Keys, path: str) -> TbpoError:
    name = ".".join(keys)
    fix = f"add a table [{name}]"
    if len(keys) > 1:
        fix = f"add {keys[-1]} = … under [{'.'.join(keys[:-1])}]"
    return fault(f"{name} is missing", path, keys, "a value: it has no default", fix)


def _refused_together(entry: Any, keys: Keys, path: str) -> TbpoError:
    """Keys of a table that cannot stand together; the message begins with the one to change."""
    expected = entry["msg"].removeprefix("Value error, ")
    keys = (*keys, expected.split()[0])
    return fault(f"{'.'.join(keys)} is not possible", path, keys, expected)


def _impossible(entry: Any, keys: Keys, path: str) -> TbpoError:
    """A value of the wrong type or out of its range."""
    kind, given, name = entry["type"], entry["input"], ".".join(keys)
    expected = entry["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    options: list[str] = []
    if kind in {"dataclass_type", "dataclass_exact_type"}:
        expected = f"a table: [{name}]"
    elif kind == "string_pattern_mismatch":
        expected = PATTERNS[entry["ctx"]["pattern"]]
    elif kind in {"literal_error", "value_error"}:
        options = expected.replace("'", "").replace(" or ", ", ").split(", ")
    near = difflib.get_close_matches(str(given), options, n=1)
    fix = f'{keys[-1]} = "{near[0]}"' if near else ""
    what = f"{name} = {json.dumps(given, default=str)} is not possible"
    return fault(what, path, keys, expected, fix)


def _owner(table: Any, loc: tuple[Any, ...]) -> Any:
    """The dataclass of the table that a key is in, by way of unions and lists of tables."""
    for key in filter(_is_key, loc[:-1]):
        hints: list[Any] = [typing.get_type_hints(table)[key]]
        while not dataclasses.is_dataclass(hints[0]):
            hints = [*hints[1:], *typing.get_args(hints[0])]
        table = hints[0]
    return table
