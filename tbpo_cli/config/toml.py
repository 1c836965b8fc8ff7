"""A recipe's file and the command line's --set, as nested dicts with local paths made absolute."""

from __future__ import annotations

import difflib
import json
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from tbpo_cli.errors import TbpoError

FILE_SUFFIXES = {
    ".jsonl",
    ".json",
    ".gz",
    ".parquet",
    ".csv",
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
WEIGHT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_TRAINED = (
    "*.safetensors",
    "align/[am]*/*.safetensors",
)  # in the folder of an adapter or model, or in a run directory
_ROWS, _FILE = ("**/*",), ("*",)

# The keys whose values may be paths; and where one is a folder, the patterns of the files in it that count.
PATHS = {
    "model.base": WEIGHT_FILES,
    "model.chat_template": _FILE,
    "model.adapter": _ADAPTER,
    **dict.fromkeys(SOURCE_KEYS, _ROWS),
    "align.loss.positive": _TRAINED,
    "align.loss.negative": _TRAINED,
    "sample.prompts": _FILE,
    "sample.adapter": _ADAPTER,
    "eval.against": _TRAINED,
    "eval.scorer": _FILE,
    "eval.judge.template": _FILE,
    "eval.reward_model": WEIGHT_FILES,
    "eval.suites": _FILE,
    "push.card": _FILE,
}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a recipe's file. Raises TbpoError if there is none, or if it is not TOML."""
    where, expected = str(path), "a TOML file"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = sorted(map(str, path.parent.glob("*.toml")))
        near = difflib.get_close_matches(str(path), there, n=1)
        fix = (
            f"did you mean {near[0]}?"
            if near
            else f"recipes in that folder: {', '.join(there) or 'none'}"
        )
        what = "there is no such recipe"
    except OSError as error:
        reason = (
            "is a folder"
            if isinstance(error, IsADirectoryError)
            else f"cannot be read: {error.strerror}"
        )
        what, fix = f"the recipe {reason}", "give one that can be read"
    except UnicodeDecodeError as error:
        what, where, fix = (
            "the recipe is not UTF-8 text",
            f"{path}, byte {error.start}",
            "save it as UTF-8",
        )
    except tomllib.TOMLDecodeError as error:
        what, where = "the recipe is not valid TOML", f"{path}: {error}"
        expected, fix = (
            "key = value lines under [table] headings",
            'mend that line; text needs quotes: key = "text"',
        )
    raise TbpoError(what, where, expected, fix)


def apply_overrides(raw: dict[str, Any], overrides: tuple[str, ...]) -> list[TbpoError]:
    """Puts the "table.key=value" of the command line into `raw`; returns the faults of those that are none."""
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        one: dict[str, Any] = {}
        for value in (
            text,
            json.dumps(text, ensure_ascii=False),
        ):  # TOML or, if it is none, bare text
            with suppress(tomllib.TOMLDecodeError):
                one = one or tomllib.loads(f"{key} = {value}")
        if one and equals and "." in key:
            resolve_paths(one, Path.cwd())
            _merge(raw, one)
        else:
            where, fix = f"--set {override}", "e.g. --set run.seed=1"
            faults.append(TbpoError("--set is not understood", where, "table.key=value", fix))
    return faults


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
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
    """Makes the local paths among PATHS absolute, seen from `folder`, and each of SOURCE_KEYS a list of tables."""
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
    """A path, several, or tables with a "path"; anything else, also the name of a Hub repository, stays as it is."""
    if isinstance(value, list):
        return [_resolve(one, folder) for one in value]
    if isinstance(value, dict):
        return value | {"path": _resolve(value["path"], folder)} if "path" in value else value
    if not isinstance(value, str) or not value:
        return value
    if value.startswith("python:") and value.count(":") == 2:
        _, file, name = value.split(":")
        return f"python:{(folder / Path(file).expanduser()).resolve()}:{name}"
    path = folder / Path(value).expanduser()
    return str(path.resolve()) if path.exists() or is_local(value) else value
