"""A recipe's file and the command line's --set, as nested dicts with local paths made absolute."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tbpo_cli.config.not_toml import explain
from tbpo_cli.errors import TbpoError

FILE_SUFFIXES = {
    ".jsonl",
    ".json",
    ".gz",
    ".parquet",
    ".csv",
    ".tsv",
    ".arrow",
    ".jinja",
    ".txt",
    ".yaml",
    ".yml",
}
SOURCE_KEYS = ("data.train", "data.eval", "sft.train")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "*.model",
    "vocab*",
    "merges.txt",
)
# What the token ids of a text depend on; tokenization*.py for model.trust_remote_code.
ENCODING_FILES = (*TOKENIZER_FILES, "tokenization*.py")
WEIGHT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
# What a model's weights depend on; *.py is its own code, for model.trust_remote_code.
BASE_FILES = (*WEIGHT_FILES, "*.py")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# In the folder of an adapter or model, or in a run directory.
_TRAINED = (
    "*.safetensors",
    "adapter_config.json",
    "config.json",
    "align/[am]*/*.safetensors",
    "align/[am]*/*config.json",
)
_ROWS = ("**/*",)
_FILE = ("*",)

# The keys whose values may be paths; where one is a folder, the patterns of its files that count.
PATHS = {
    "model.base": BASE_FILES,
    "model.chat_template": _FILE,
    "model.adapter": _ADAPTER,
    **dict.fromkeys(SOURCE_KEYS, _ROWS),
    "align.start": _TRAINED,
    "align.loss.positive": _TRAINED,
    "align.loss.negative": _TRAINED,
    "align.loss.guide": _TRAINED,
    "sample.prompts": _FILE,
    "sample.adapter": _TRAINED,  # in rounds without [model.lora], a model
    "eval.against": _TRAINED,
    "eval.answers": _FILE,
    **{
        f"{table}.{key}": patterns
        for table in ("judge", "eval.judge")
        for key, patterns in {
            "scorer": _FILE,
            "reward_model": BASE_FILES,
            "template": _FILE,
            "mark_template": _FILE,
        }.items()
    },
    "eval.suites": _FILE,
    "push.card": _FILE,
}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a recipe's file. Raises TbpoError if it is not there or not TOML."""
    expected = "a TOML file"
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark says nothing
    except FileNotFoundError:
        raise TbpoError(
            "there is no such recipe", str(path), expected, _recipes_beside(path)
        ) from None
    except IsADirectoryError:
        what = "the recipe is a folder"
        raise TbpoError(what, str(path), expected, _recipes_beside(path / "x.toml")) from None
    except OSError as error:
        what = f"the recipe cannot be read: {error.strerror}"
        raise TbpoError(what, str(path), expected, "give one that can be read") from None
    except UnicodeDecodeError as error:
        what = "the recipe is not UTF-8 text"
        where = f"{path}, byte {error.start}"
        raise TbpoError(what, where, expected, "save it as UTF-8") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, expected, fix = explain(text, str(error), path)
        raise TbpoError(what, f"{path}: {error}", expected, fix) from None
    except RecursionError:
        what = "the recipe is nested too deeply"
        fix = "write tables of at most a few levels"
        raise TbpoError(what, str(path), expected, fix) from None
    except ValueError as error:  # of Python itself, about a number of thousands of digits
        what = f"the recipe has a value that cannot be read: {error}"
        fix = "write a shorter one"
        raise TbpoError(what, str(path), expected, fix) from None


def _recipes_beside(path: Path) -> str:
    """What to type instead of a recipe that is not there."""
    from tbpo_cli.config.keys import nearest

    there = sorted(map(str, path.parent.glob("*.toml")))
    if near := nearest(str(path), there, cutoff=0.6):
        return f"did you mean {near}?"
    if there:
        return f"recipes in that folder: {', '.join(there)}"
    return "tbpo init lists the shipped recipes and writes one"


def apply_overrides(
    raw: dict[str, Any],
    overrides: tuple[str, ...],
    may_be_absent: Callable[[str], bool] = lambda key: False,
    hint: Callable[[tuple[str, ...], str, Any], str] = lambda keys, near, given: "",
) -> list[TbpoError]:
    """Puts the "table.key=value" of the command line into `raw`.

    Args:
        raw: the recipe's tables, which are changed.
        overrides: a value is TOML or else text; "none" leaves a key or a table out.
        may_be_absent: whether a recipe can do without a key or a table.
        hint: what to write in place of an unknown key.

    Returns:
        The faults of those that have no such form.
    """
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        tables: dict[str, Any] = {}
        if text.strip() == "none" and may_be_absent(key):
            _merge(raw, _nested(key, None))
            continue
        for value in (text, json.dumps(text, ensure_ascii=False)):
            with suppress(tomllib.TOMLDecodeError):
                tables = tables or tomllib.loads(f"{key} = {value}")
        is_table = all(isinstance(value, dict) for value in tables.values())  # as of sft={}
        if tables and equals and is_table:
            resolve_paths(tables, Path.cwd())
            _merge(raw, tables)
        else:
            fix = hint((key,), "", tables.get(key)) or "e.g. --set run.seed=1"
            where = f"--set {override}"
            faults.append(TbpoError("--set is not understood", where, "table.key=value", fix))
    return faults


def _nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of "a.b"."""
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, dict) and key == "loss" and isinstance(into.get(key), str):
            into[key] = {"name": into[key], **value}  # [align] loss = "dpo" names a loss
        else:
            into[key] = value


def is_local(source: str) -> bool:
    """Whether a source names a file or folder rather than a Hub repository ("user/name")."""
    return (
        source.startswith((".", "/", "~"))
        or Path(source).suffix in FILE_SUFFIXES
        or source.count("/") > 1
    )


def resolve_paths(table: dict[str, Any], folder: Path, prefix: str = "") -> None:
    """Makes the local paths among PATHS absolute, and each of SOURCE_KEYS a list of tables.

    Args:
        folder: what relative paths are relative to.
    """
    for name, value in table.items():
        key = prefix + name
        if (key, value) == ("sample.prompts", "eval"):
            continue  # the held-out pairs, also where there is a folder of that name
        if key in SOURCE_KEYS and isinstance(value, str | dict | list):
            listed = value if isinstance(value, list) else [value]
            value = [{"path": source} if isinstance(source, str) else source for source in listed]
        if key in PATHS:
            table[name] = _resolve(value, folder)
        elif isinstance(value, dict):
            resolve_paths(value, folder, f"{key}.")


def _resolve(value: Any, folder: Path) -> Any:
    """A path, several, or tables with a "path"; the name of a Hub repository stays as it is."""
    if isinstance(value, list):
        return [_resolve(one, folder) for one in value]
    if isinstance(value, dict):
        return value | {"path": _resolve(value["path"], folder)} if "path" in value else value
    if not isinstance(value, str) or not value:
        return value
    if value.startswith("python:") and value.count(":") == 2:
        _, file, name = value.split(":")
        return f"python:{_absolute(file, folder)}:{name}"
    path = _absolute(value, folder)
    return str(path) if is_local(value) or path.exists() else value


def _absolute(value: str, folder: Path) -> Path:
    """A path seen from a folder. Raises TbpoError if the system cannot have such a path."""
    try:
        path = (folder / Path(value).expanduser()).resolve()
        path.exists()
        return path
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        shown = value if len(value) < 100 else f"{value[:100]}…"
        what = f"a path cannot be used: {reason}"
        expected = "a path that this system can have"
        raise TbpoError(what, shown, expected, "change that path in the recipe") from None


def not_finite(table: Any, key: str = "") -> list[TbpoError]:
    """The faults of numbers that are infinite or not a number."""
    if isinstance(table, float) and not math.isfinite(table):
        what = f"{key} is {table}"
        fix = f"--set {key}=… or change it in the recipe"
        return [TbpoError(what, key, "a finite number", fix)]
    items: list[tuple[Any, Any]] = []
    if isinstance(table, dict | list):
        items = [*(table.items() if isinstance(table, dict) else enumerate(table, 1))]
    prefix = f"{key}." if key else ""
    return [fault for name, value in items for fault in not_finite(value, f"{prefix}{name}")]
