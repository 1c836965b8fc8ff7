"""A recipe's file and the command line's --set, as nested dicts with local paths made absolute."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from tbpo_cli.errors import TbpoError

FILE_SUFFIXES = {".jsonl", ".json", ".gz", ".parquet", ".csv", ".arrow", ".jinja", ".txt", ".yaml", ".yml"}
SOURCE_KEYS = ("data.train", "data.eval", "sft.train")
PATH_KEYS = (
    "model.base",
    "model.chat_template",
    "model.adapter",
    "sample.prompts",
    "sample.adapter",
    "push.card",
    "align.loss.positive",
    "align.loss.negative",
    "eval.against",
    "eval.scorer",
    "eval.judge.template",
    "eval.reward_model",
    "eval.suites",
    *SOURCE_KEYS,
)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a recipe's file. Raises TbpoError if there is none, or if it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        fix = f"recipes in that folder: {', '.join(there)}" if there else "give the path of a recipe, a TOML file"
        if near := difflib.get_close_matches(str(path), there, n=1):
            fix = f"did you mean {near[0]}?"
        raise TbpoError("there is no such recipe", str(path), "a TOML file", fix) from None
    except IsADirectoryError:
        raise TbpoError("the recipe is a folder", str(path), "a TOML file", "give the file inside it") from None
    except UnicodeDecodeError as error:
        raise TbpoError(
            "the recipe is not UTF-8 text", f"{path}, byte {error.start}", "a TOML file", "save it as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise TbpoError(
            "the recipe is not valid TOML",
            f"{path}: {error}",
            "key = value lines under [table] headings",
            'mend that line; text needs quotes: key = "text"',
        ) from None
    except OSError as error:
        raise TbpoError(f"the recipe cannot be read: {error.strerror}", str(path), "a readable file") from None


def apply_overrides(raw: dict[str, Any], overrides: tuple[str, ...]) -> list[TbpoError]:
    """Puts the "table.key=value" of the command line into `raw`; returns the faults of those that are none."""
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        names = key.strip().split(".")
        if not equals or len(names) < 2 or not all(names):
            faults.append(
                TbpoError("--set is not understood", f"--set {override}", "table.key=value", "e.g. --set run.seed=1")
            )
            continue
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        one: dict[str, Any] = {names[-1]: value}
        for name in reversed(names[:-1]):
            one = {name: one}
        resolve_paths(one, Path.cwd())
        _merge(raw, one)
    return faults


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def is_local(source: str) -> bool:
    """Whether a source names a file or folder rather than a Hub repository ("user/name")."""
    return source.startswith((".", "/", "~")) or Path(source).suffix in FILE_SUFFIXES or source.count("/") > 1


def resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Makes the local paths among PATH_KEYS absolute, seen from `folder`, and each of SOURCE_KEYS a list of tables."""

    def resolve(source: Any) -> Any:
        if isinstance(source, list):
            return [resolve(one) for one in source]
        if isinstance(source, str) and source.count(":") == 2 and source.startswith("python:"):
            _, file, name = source.split(":")
            return f"python:{(folder / Path(file).expanduser()).resolve()}:{name}"
        if not isinstance(source, str) or not source:
            return source
        path = folder / Path(source).expanduser()
        return str(path.resolve()) if path.exists() or is_local(source) else source

    def as_table(source: Any) -> Any:
        source = {"path": source} if isinstance(source, str) else source
        return source | {"path": resolve(source["path"])} if isinstance(source, dict) and "path" in source else source

    for key in PATH_KEYS:
        *names, leaf = key.split(".")
        owner: Any = raw
        for name in names:
            owner = owner.get(name) if isinstance(owner, dict) else None
        if not isinstance(owner, dict) or leaf not in owner or (key, owner[leaf]) == ("sample.prompts", "eval"):
            continue  # "eval" means the held-out pairs, also where there is a folder of that name
        if key not in SOURCE_KEYS:
            owner[leaf] = resolve(owner[leaf])
        elif isinstance(owner[leaf], str | dict | list):
            listed = owner[leaf] if isinstance(owner[leaf], list) else [owner[leaf]]
            owner[leaf] = [as_table(source) for source in listed]
