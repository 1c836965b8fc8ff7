"""What a stage is made from: settings, the content of files, and the results of other stages."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.config.toml import PATHS, is_local
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import sha256
from tbpo_cli.runs.stage import Stage
from tbpo_cli.runs.task_files import files_of_task

NO_FILES = "(a Hub repository or nothing)"  # in words, where a key names no local files

Files = dict[str, dict[str, Any]]  # by path: size, times and hash

# The name of the file of the prompts, of which the ids of its prompts are made.
NAME_OF_PROMPTS = "sample.prompts.name"
# Keys that decide how a result is reached or shown: changing them invalidates nothing. Those that
# change the order of sums (max_tokens_per_device, layout, activation_checkpointing, sharding,
# log_every, batch_size), and the number of processes, change the result by rounding alone.
FREE_KEYS = {
    "data.max_reject_fraction", "data.workers", "sample.batch_size", "sample.endpoint",
    "sample.endpoint_adapter", "rounds.batch_size", "rounds.endpoint", "rounds.endpoint_folder",
    "eval.gate", "judge.concurrency", "judge.timeout", "eval.judge.concurrency",
    "eval.judge.timeout",
    *(f"{table}.{key}" for table in ("sft", "align") for key in (
        "max_tokens_per_device", "layout", "checkpoint_every", "eval_every", "eval_pairs",
        "log_every", "activation_checkpointing", "sharding", "shard_over")),
}  # fmt: skip


def inputs_of(
    stage: Stage, recipe: Recipe, known: dict[str, Files], outputs: dict[str, str]
) -> dict[str, Any]:
    """What a stage would start from now.

    Args:
        known: files by key, with hashes that hold while size, times and inode are the same.
        outputs: hashes of the results of the stages before.

    Raises:
        TbpoError: if the recipe names a file that is not there.
    """
    settings = {
        key: value
        for key, value in recipe.settings().items()
        if key.startswith(stage.keys) and key not in FREE_KEYS
    }
    files: dict[str, Files] = {}
    for setting, value in list(settings.items()):
        key = re.sub(r"\.\d+\.path$", "", setting)  # of one of several sources
        if key not in PATHS or not value:
            continue
        sources = value if isinstance(value, list) else [value]
        patterns = stage.base_files if key == "model.base" else PATHS[key]
        local = [files_of(key, source, patterns) for source in sources]
        for path in (path for paths in local for path in paths):
            before = known.get(key, {}).get(str(path))
            files.setdefault(key, {})[str(path)] = _fingerprint(path, before)
        if all(local):  # their content counts, not where they are
            settings.pop(setting, None)
        if key == "sample.prompts" and all(local):
            settings[NAME_OF_PROMPTS] = Path(sources[0]).name
        if sources[0].startswith("python:"):
            settings[f"{setting}.name"] = sources[0].rpartition(":")[2]
    return {"settings": settings, "files": files, "outputs": outputs}


def differences(before: dict[str, Any], now: dict[str, Any], run: Path) -> list[str]:
    """What differs between two inputs of a stage of a run, one line each."""
    lines = []
    keys = sorted(before["files"].keys() | now["files"].keys())
    for key in sorted((before["settings"].keys() | now["settings"].keys()).difference(keys)):
        old, new = before["settings"].get(key), now["settings"].get(key)
        if old != new and not (key == NAME_OF_PROMPTS and old is None):  # not noted in old runs
            lines.append(f"{key}: {_shown(old)} → {_shown(new)}")
    for key in keys:
        old, new = before["files"].get(key, {}), now["files"].get(key, {})
        if _hashes(old) == _hashes(new):
            continue
        changed = f"the content of {_names(new)} changed"
        lines.append(
            f"{key}: {f'{_names(old)} → {_names(new)}' if old.keys() != new.keys() else changed}"
        )
    for need, digest in now["outputs"].items():
        if digest == before["outputs"].get(need):
            continue
        missing = run / need / "manifest.json"
        is_lost = f"the result of {need} is not there: {missing} is missing"
        lines.append(f"the result of {need} changed" if digest else is_lost)
    return lines


def files_of(key: str, source: str, patterns: tuple[str, ...]) -> list[Path]:
    """The local files behind a source; none for a Hub repository, which settings name."""
    is_code = source.startswith("python:")
    path = Path(source.split(":")[1] if is_code else source)
    # A recipe's local paths are absolute: a name may be that of a folder here as well.
    if path.is_absolute() and path.is_dir():
        found = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
        return sorted(found)
    if path.is_absolute() and path.is_file() and key == "eval.suites":
        return files_of_task(path, _imported)
    if path.is_absolute() and path.is_file():
        return [path, *sorted(_imported(path))] if is_code else [path]
    if is_local(source):
        raise TbpoError(
            f"{key} names a file that is not there",
            source,
            "an existing file or folder",
            f"change {key} in the recipe, or give --set {key}=PATH",
        )
    return []


def _imported(path: Path) -> set[Path]:
    """The local modules that a file of code imports, directly or through others; not run.

    They are looked for beside the file, and in the folders that a string of the code names, seen
    from there, as `sys.path.insert(0, os.path.join(HERE, "helper"))` does.
    """
    found: set[Path] = set()
    folders = [path.parent]
    trees: list[tuple[Path, ast.Module]] = []
    left = [path]
    while left:
        here = left.pop()
        try:
            tree = ast.parse(here.read_bytes())
        except (SyntaxError, ValueError, RecursionError):  # reported when the file is loaded
            continue
        trees.append((here, tree))
        folders += _named_folders(tree, here.parent, folders)
        # A folder may be named after the import that needs it, or by a module that comes later.
        modules = {file for each in trees for file in _modules(*each, folders)}
        new = modules - found - {path}
        found |= new
        left += new
    return found


def _named_folders(tree: ast.Module, here: Path, known: list[Path]) -> list[Path]:
    """The folders that the texts of some code name from where it is, which are not known yet."""
    texts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    texts = {text for text in texts if 0 < len(text) < 256 and text.isprintable()}
    found: list[Path] = []
    left = [here]
    for _ in range(3):  # parts of a path that are given one by one
        paths = [base / text for base in left for text in sorted(texts)]
        new = [path for path in paths if path not in (*known, *found)]
        left = [path for path in new if os.path.isdir(path)]  # noqa: PTH112 - any text is no error
        found += left
    return found


def _modules(file: Path, tree: ast.Module, folders: list[Path]) -> set[Path]:
    """The files of the modules that some code imports, with those of the packages around them."""
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        bases = folders
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = [node.module] if node.module else []
            names = [".".join([*package, alias.name]) for alias in node.names]
            if node.level:
                bases = [*file.parents][node.level - 1 : node.level]
        for name in names:
            parts = name.split(".")
            stems = [base.joinpath(*parts[:n]) for base in bases for n in range(1, len(parts) + 1)]
            for stem in stems:
                for each in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
                    if each.is_file():
                        found.add(each)
    return found


def _fingerprint(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """Hash of a file, and what tells that the file is still the one that was hashed."""
    status = path.stat()
    identity = {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,  # nobody can set it back
        "inode": status.st_ino,
    }
    if known and all(known.get(key) == value for key, value in identity.items()):
        return known
    return identity | {"sha256": sha256(path)}


def _hashes(files: Files) -> list[str]:
    return sorted(file["sha256"] for file in files.values())


def _names(files: Files) -> str:
    return ", ".join(files) or NO_FILES


def _shown(value: Any) -> str:
    return "(not set)" if value is None else json.dumps(value)
