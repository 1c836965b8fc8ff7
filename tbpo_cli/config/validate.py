"""TOML tables → checked dataclasses, with every fault in the words of a recipe.

pydantic finds the faults, all of them at once and for nested unions; it words them for programmers.
Each of its kinds of fault has one function here that words it for a person.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from tbpo_cli.config.advice import advice_on
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

# What must stand there, by pydantic's kind of fault; braces hold what its context names.
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text in quotes",
    "tuple_type": 'a list, ["…"]',
    "dict_type": "a table, {{name = value}}",
    "too_short": "at least one value",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}
WORDS = {
    "true": "true",
    "yes": "true",
    "on": "true",
    "false": "false",
    "no": "false",
    "off": "false",
}
SHORT_NAMES = {"lr": "learning_rate", "rank": "r", "steps": "max_steps", "path": "base"}
FEW = 12  # keys that a message lists beside a better answer

# Of an unknown key, the nearest one that its table has, and the value that it was given.
Hint = Callable[[Keys, str, Any], str]


def did_you_mean(keys: Keys, near: str, given: Any = None) -> str:
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
        return None, _faults_in_words(error.errors(), where, cls, path, hint)
    if not is_table:
        value = cls(**{each.name: getattr(value, each.name) for each in fields(value)})
    return value, []


def _faults_in_words(
    entries: Sequence[Any], where: Keys, cls: type, path: str, hint: Hint
) -> list[TbpoError]:
    """pydantic's errors in our words: one a key, though each type of a union has its own."""
    by_key: dict[Keys, list[Any]] = {}
    for entry in entries:
        by_key.setdefault(tuple(str(part) for part in entry["loc"] if _is_key(part)), []).append(
            entry
        )
    faults = []
    for keys, (entry, *others) in by_key.items():
        # A list of which an entry is faulty also has too few.
        if entry["type"] == "too_short" and any(
            keys == other[: len(keys)] != other for other in by_key
        ):
            continue
        faults.append(_in_words(entry, (*where, *keys), cls, path, hint, others))
    return faults


def _is_key(part: Any) -> bool:
    """Whether a part of pydantic's location is a key of ours, and not one member of a union."""
    types_of_unions = {"str", "none", "bool", "int", "float"}
    return isinstance(part, str) and part.isidentifier() and part not in types_of_unions


def place(path: str, keys: Keys) -> str:
    """Where a key of the recipe stands."""
    return (
        f"{path}, [{'.'.join(keys[:-1])}] {keys[-1]}" if len(keys) > 1 else f"{path}, [{keys[0]}]"
    )


def fault(what: str, path: str, keys: Keys, expected: str, fix: str = "") -> TbpoError:
    """A fault at a key of the recipe; without a `fix`, the key is to be changed."""
    fix = fix or f"change it there, or give --set {'.'.join(keys)}=…"
    return TbpoError(what, place(path, keys), expected, fix)


def _in_words(
    entry: Any, keys: Keys, cls: type, path: str, hint: Hint, others: Sequence[Any]
) -> TbpoError:
    """One of pydantic's errors in our words.

    Args:
        others: of the other types that the key may have.
    """
    kind = entry["type"]
    given = entry["input"]
    if kind == "unexpected_keyword_argument":
        names = [each.name for each in fields(_owner(cls, entry["loc"]))]
        return unknown_key(keys, names, path, given, hint)
    if kind == "missing":
        return _missing(keys, path)
    if kind == "value_error" and isinstance(given, dict):  # of a __post_init__
        return _refused_together(entry, keys, path)
    return _impossible(entry, keys, path, others)


def unknown_key(keys: Keys, names: list[str], path: str, given: Any, hint: Hint) -> TbpoError:
    """A key that its table does not have.

    Args:
        names: the keys that the table has.
        given: its value.
        hint: see `validate`.
    """
    near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
    if SHORT_NAMES.get(keys[-1]) in names:
        near = [SHORT_NAMES[keys[-1]]]
    fix = hint(keys, near[0] if near else "", given)
    what = f"{'.'.join(keys)} is an unknown {'table' if isinstance(given, dict) else 'key'}"
    expected = f"one of {', '.join(names)}" if names else "no further keys"
    if fix and len(names) > FEW:
        expected = f"a key of [{'.'.join(keys[:-1])}]; tbpo show lists them"
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


def _impossible(entry: Any, keys: Keys, path: str, others: Sequence[Any]) -> TbpoError:
    """A value of the wrong type or out of its range."""
    kind = entry["type"]
    given = entry["input"]
    name = ".".join(keys)
    wanted = [_expected(each, name) for each in (entry, *others)]
    options: list[str] = []
    for each, text in zip((entry, *others), wanted, strict=True):
        if each["type"] in {"literal_error", "value_error"}:
            options += text.replace("'", "").replace(" or ", ", ").split(", ")
    near = difflib.get_close_matches(str(given), options, n=1)
    fix = _as_wanted(kind, given, keys[-1])
    if near:
        is_in_list = isinstance(entry["loc"][-1], int)
        fix = f"{keys[-1]} = {json.dumps(near[:1] if is_in_list else near[0])}"
    what = f"{name} = {json.dumps(given, default=str, ensure_ascii=False)} is not possible"
    if advice := advice_on(name, given):
        return fault(what, path, keys, *advice)
    return fault(what, path, keys, " or ".join(dict.fromkeys(wanted)), fix)


def _expected(entry: Any, name: str) -> str:
    """What pydantic expected, in our words."""
    kind = entry["type"]
    context = entry.get("ctx", {})
    if kind in {"dataclass_type", "dataclass_exact_type"}:
        return f"a table: [{name}]"
    if kind == "string_pattern_mismatch":
        return PATTERNS[context["pattern"]]
    if kind in EXPECTED:
        return EXPECTED[kind].format(**context)
    message: str = entry["msg"]
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def _as_wanted(kind: str, given: Any, key: str) -> str:
    """The line with the value that was meant, where that can be seen; else ""."""
    text = str(given)
    if kind in {"int_type", "float_type"} and isinstance(given, str):
        with suppress(ValueError):
            float(text)
            return f"without quotes: {key} = {text}"
    if kind == "bool_type":
        word = WORDS.get(text.lower()) or {"1": "true", "0": "false"}.get(text)
        return f"{key} = {word}" if word else ""
    if kind == "tuple_type" and isinstance(given, str):
        return f"{key} = [{json.dumps(given, ensure_ascii=False)}]"
    return ""


def _owner(table: Any, loc: tuple[Any, ...]) -> Any:
    """The dataclass of the table that a key is in, by way of unions and lists of tables."""
    for key in filter(_is_key, loc[:-1]):
        hints: list[Any] = [typing.get_type_hints(table)[key]]
        while not dataclasses.is_dataclass(hints[0]):
            hints = [*hints[1:], *typing.get_args(hints[0])]
        table = hints[0]
    return table
