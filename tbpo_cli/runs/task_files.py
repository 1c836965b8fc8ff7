"""The files that a task of lm-eval is made of, beside its YAML file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML with any tag: `!function utils.score` is the text "utils.score.py"."""


def _tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    text = loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else ""
    return f"{str(text).partition('.')[0]}.py" if tag == "function" else text


_Loader.add_multi_constructor("!", _tagged)


def files_of_task(path: Path, imported: Callable[[Path], set[Path]]) -> list[Path]:
    """A task's YAML file, and the local files that it names: rows, other YAML files, code.

    Relative paths are looked for beside the file that names them, and in the current folder.

    Args:
        imported: gives the local modules that a file of code imports.
    """
    found: dict[Path, None] = {}
    left = [path]
    while left:
        here = left.pop()
        if here in found:
            continue
        found[here] = None
        if here.suffix == ".py":
            found |= dict.fromkeys(sorted(imported(here)))
        elif here.suffix in (".yaml", ".yml"):
            left += _named_in(here)
    return [path, *sorted({*found} - {path})]


def _named_in(path: Path) -> list[Path]:
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except (yaml.YAMLError, OSError, ValueError, RecursionError):  # said when the task is loaded
        return []
    places = [base / text for text in _texts(content) for base in (path.parent, Path.cwd())]
    return [place for place in places if _is_file(place)]


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of YAML that may be paths."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
    elif isinstance(value, str) and 0 < len(value) < 1024 and value.isprintable():
        yield value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text that is too long for a name
        return False
