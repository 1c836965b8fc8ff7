"""A run's directory: what each stage was made from, whether that is still so, and what it has produced."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.config.toml import PATHS, is_local
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import read_sealed, sha256, told_as_unwritable, write_sealed, write_whole
from tbpo_cli.runs.stage import Stage

LIBRARIES = (
    "tbpo",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)


# Keys that decide how a result is reached or shown, never what it is: changing them invalidates nothing.
FREE_KEYS = {
    "data.max_reject_fraction", "data.workers", "sample.batch_size", "sample.endpoint",
    "eval.gate", "eval.judge.concurrency", "eval.judge.timeout",
    *(f"{table}.{key}" for table in ("sft", "align") for key in (
        "max_tokens_per_device", "layout", "checkpoint_every", "eval_every", "log_every",
        "activation_checkpointing", "sharding")),
}  # fmt: skip


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Everything written here appears whole or not at all."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe, run_dir: Path | None) -> RunDir:
        """`run_dir` if given, else run.dir/run.name, seen from the current folder."""
        return cls((run_dir or Path(recipe.run.dir).expanduser() / recipe.run.name).absolute())

    def stage(self, name: str) -> Path:
        return self.path / name

    def weights(self, name: str) -> Path:
        """Where a training stage puts what it trained: the adapter, or the model if the recipe has no [model.lora]."""
        lora = any(
            key.startswith("model.lora.") for key in self.started_from(name).get("settings", {})
        )
        return self.stage(name) / ("adapter" if lora else "model")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes this process the one writer of the run; TbpoError names another. The kernel ends the lock with it."""
        path, host = self.path / "lock", platform.node()
        with told_as_unwritable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        with file:
            owner = self.owner()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A file system may not share locks between machines: then only what is written there tells.
                is_free = not owner or owner.endswith(f"on {host}")
            except OSError:
                is_free = False
            if not is_free:
                what = f"the run is in use by {owner or 'an unknown process'}"
                fix = f"wait for it, or give another --run-dir; if it is gone, remove {path}"
                raise TbpoError(what, str(self.path), "one process a run directory", fix)
            if owner:
                console.say(f"taking over the run from {owner}, which ended without a word")
            path.write_text(f"process {os.getpid()} on {host}", encoding="utf-8")
            try:
                yield
            finally:
                path.write_text("")

    def owner(self) -> str:
        """Which process has the run, or had it and ended without a word; "" if none."""
        path = self.path / "lock"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def manifest(self, name: str) -> dict[str, Any]:
        """What a complete stage says of itself; empty if it is not complete."""
        return read_sealed(self.stage(name) / "manifest.json")

    def started_from(self, name: str) -> dict[str, Any]:
        """The inputs a stage was started with; empty if it was never started."""
        return read_sealed(self.stage(name) / "inputs.json")

    def inputs(self, stage: Stage, recipe: Recipe) -> dict[str, Any]:
        """What a stage would start from now: settings, hashes of files (TbpoError without one), results of others."""
        settings = {
            key: value
            for key, value in recipe.settings().items()
            if key.startswith(stage.keys) and key not in FREE_KEYS
        }
        known = self.started_from(stage.name).get("files", {})
        files: dict[str, dict[str, Any]] = {}
        for setting, value in list(settings.items()):
            key = re.sub(r"\.\d+\.path$", "", setting)  # of one of several sources
            if key not in PATHS or not value:
                continue
            sources = value if isinstance(value, list) else [value]
            patterns = stage.base_files if key == "model.base" else PATHS[key]
            local = [_files_of(key, source, patterns) for source in sources]
            for path in itertools.chain(*local):
                files.setdefault(key, {})[str(path)] = _fingerprint(
                    path, known.get(key, {}).get(str(path))
                )
            if all(local):  # their content counts, not where they lie
                settings.pop(setting, None)
            if sources[0].startswith("python:"):
                settings[f"{setting}.name"] = sources[0].rpartition(":")[2]
        outputs = {need: self.outputs_hash(need) for need in stage.needs(recipe)}
        return {"settings": settings, "files": files, "outputs": outputs}

    def changes(self, stage: Stage, recipe: Recipe) -> list[str]:
        """What differs between the inputs of a started stage and those of now, one line each."""
        before = self.started_from(stage.name)
        if not before:
            return []
        now = self.inputs(stage, recipe)
        lines = []
        files = sorted(before["files"].keys() | now["files"].keys())
        for key in sorted((before["settings"].keys() | now["settings"].keys()).difference(files)):
            old, new = before["settings"].get(key), now["settings"].get(key)
            if old != new:
                lines.append(f"{key}: {_shown(old)} → {_shown(new)}")
        for key in files:
            old, new = before["files"].get(key, {}), now["files"].get(key, {})
            if _hashes(old) != _hashes(new):
                moved = f"{_names(old)} → {_names(new)}"
                lines.append(
                    f"{key}: {moved if old.keys() != new.keys() else f'the content of {_names(new)} changed'}"
                )
        changed = (
            need for need, digest in now["outputs"].items() if digest != before["outputs"].get(need)
        )
        return lines + [f"the result of {need} changed" for need in changed]

    def begin(self, stage: Stage, recipe: Recipe) -> Path:
        """Makes a stage's folder and notes its inputs, unless it was begun before; returns the folder."""
        folder = self.stage(stage.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "recipe.toml", recipe.to_toml())
        if not self.started_from(stage.name):
            write_sealed(folder / "inputs.json", self.inputs(stage, recipe))
        return folder

    def finish(self, name: str, outputs: list[Path], facts: dict[str, Any]) -> None:
        """Writes a stage's manifest, its last act: from now on it is complete."""
        folder = self.stage(name)
        manifest = {
            "stage": name,
            "inputs": self.started_from(name),
            "outputs": {str(path.relative_to(folder)): sha256(path) for path in sorted(outputs)},
            "versions": {
                "python": platform.python_version(),
                **{lib: version(lib) for lib in LIBRARIES},
            },
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_sealed(folder / "manifest.json", manifest | facts)

    def set_aside(self, name: str) -> Path | None:
        """Moves a stage's folder to NAME.old-1 (or the next free number); returns where it is now."""
        folder, numbered = (
            self.stage(name),
            (self.path / f"{name}.old-{number}" for number in itertools.count(1)),
        )
        return (
            folder.rename(next(path for path in numbered if not path.exists()))
            if folder.exists()
            else None
        )

    def outputs_hash(self, name: str) -> str:
        """Names what a complete stage has produced; "" if it is not complete."""
        manifest = self.manifest(name)
        return (
            hashlib.sha256(json.dumps(manifest["outputs"]).encode()).hexdigest() if manifest else ""
        )


def _files_of(key: str, source: str, patterns: tuple[str, ...]) -> list[Path]:
    """The local files behind a source; none for a Hub repository, whose name and revision are settings."""
    path = Path(source.split(":")[1] if source.startswith("python:") else source)
    if (
        path.is_absolute() and path.is_dir()
    ):  # a recipe's local paths are; a name may be that of a folder here
        return sorted(
            {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
        )
    if path.is_absolute() and path.is_file():
        return [path]
    if is_local(source):
        what, fix = (
            f"{key} names a file that is not there",
            f"change {key} in the recipe, or give --set {key}=PATH",
        )
        raise TbpoError(what, source, "an existing file or folder", fix)
    return []


def _fingerprint(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """Size, time and hash of a file; the known hash is taken over while size and time are the same."""
    status = path.stat()
    if known and (known["size"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
        return known
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(path)}


def _hashes(files: dict[str, Any]) -> list[str]:
    return sorted(file["sha256"] for file in files.values())


def _names(files: dict[str, Any]) -> str:
    return ", ".join(files) or "(a Hub repository or nothing)"


def _shown(value: Any) -> str:
    return "(not set)" if value is None else json.dumps(value)
