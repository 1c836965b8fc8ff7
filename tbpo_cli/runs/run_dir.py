"""A run's directory: what each stage was made from, and what it has produced."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import (
    damage,
    explaining_disk_errors,
    read_sealed,
    sha256,
    sync,
    sync_tree,
    write_sealed,
    write_whole,
)
from tbpo_cli.runs.inputs import differences, inputs_of
from tbpo_cli.runs.lock import hold, read_owner
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
MANIFEST, INPUTS = "manifest.json", "inputs.json"  # both carry their own hash
RESTARTED = ".restarted"  # in a stage's folder that --restart has begun and that is not complete
NOT_SEALED = {MANIFEST, INPUTS, "checkpoints", "logs"}  # with hidden files: nobody reads them later


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Everything written here appears whole or not at all.

    Args:
        path: the folder.
        root: of a round, the folder of the run that it belongs to, whose lock holds for it as well.
    """

    path: Path
    root: Path | None = None

    @classmethod
    def of(cls, recipe: Recipe, run_dir: Path | None) -> RunDir:
        """`run_dir` if given, else run.dir/run.name, seen from the current folder."""
        return cls((run_dir or Path(recipe.run.dir).expanduser() / recipe.run.name).absolute())

    def stage(self, name: str) -> Path:
        return self.path / name

    def weights(self, name: str) -> Path:
        """Where a training stage puts its adapter, or its model without [model.lora]."""
        lora = any(
            key.startswith("model.lora.") for key in self.started_from(name).get("settings", {})
        )
        return self.stage(name) / ("adapter" if lora else "model")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes this process, and the workers that it starts, the one writer of the run.

        Raises:
            TbpoError: if another process is, or the folder cannot be written.
        """
        with explaining_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with hold(self.path / "lock"):
                yield

    def owner(self) -> str:
        """Which process has the run, or had it and was killed; "" if none."""
        return read_owner((self.root or self.path) / "lock").name

    def manifest(self, name: str) -> dict[str, Any]:
        """What a complete stage says of itself; empty if it is not complete."""
        return read_sealed(self.stage(name) / MANIFEST)

    def require(self, name: str, how: str = "its manifest is missing") -> None:
        """Raises TbpoError if a stage that has ended is not complete; `how` says why."""
        if not self.manifest(name):
            raise TbpoError(
                f"the stage {name} ended and is not complete: {how}",
                str(self.stage(name)),
                "a stage that runs to its end",
                "look at code of your own that the recipe names; the same command goes on from "
                "there",
            )

    def damage(self, name: str) -> list[str]:
        """What of a complete stage is not as it was written, one line a file. Reads all of it."""
        manifest = self.manifest(name)
        hashes = manifest.get("outputs", {}) | manifest.get("others", {})
        faults = damage(self.stage(name), hashes)
        if "stage" in manifest and self.started_from(name) != manifest["inputs"]:
            faults.append(f"{self.stage(name) / INPUTS} is missing, or of another start")
        return faults

    def check(self, name: str) -> None:
        """Raises TbpoError if a file of a complete stage is not as it was written."""
        if faults := self.damage(name):
            raise TbpoError(
                f"the complete stage {name} is not as it was written: {'; '.join(faults)}",
                str(self.path),
                f"the files whose hashes are in {self.stage(name) / MANIFEST}",
                f"put them back from a copy, or tbpo {name} RECIPE --restart makes them anew "
                "(the old folder is kept, renamed)",
            )

    def started_from(self, name: str) -> dict[str, Any]:
        """The inputs a stage was started with; empty if it was never started."""
        return read_sealed(self.stage(name) / INPUTS)

    def inputs(self, stage: Stage, recipe: Recipe) -> dict[str, Any]:
        """What a stage would start from now. Raises TbpoError without one of its files."""
        outputs = {need: self.outputs_hash(need) for need in stage.needs(recipe)}
        known = self.started_from(stage.name).get("files", {})
        return inputs_of(stage, recipe, known, outputs)

    def changes(self, stage: Stage, recipe: Recipe) -> list[str]:
        """What differs between the inputs of a started stage and those of now, one line each.

        A line is added for each thing that this version makes otherwise from the same inputs.
        """
        if not (before := self.started_from(stage.name)):
            return []
        lines = differences(before, self.inputs(stage, recipe), self.path)
        return lines + stage.outdated(self.manifest(stage.name))

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes the recipe as it is read by workers, by people and by runs that compare."""
        write_whole(self.path / "recipe.toml", recipe.to_toml())

    def begin(self, stage: Stage, recipe: Recipe) -> Path:
        """Makes a stage's folder, and notes its inputs unless it was begun before."""
        folder = self.stage(stage.name)
        folder.mkdir(parents=True, exist_ok=True)
        self.write_recipe(recipe)
        if not self.started_from(stage.name):
            write_sealed(folder / INPUTS, self.inputs(stage, recipe))
        sync(self.path)
        return folder

    def finish(self, name: str, outputs: list[Path], facts: dict[str, Any]) -> None:
        """Seals a stage: puts its files on the disk, then writes the manifest with their hashes.

        Args:
            outputs: the files that later stages read, which are made anew if one of them changes.
                The other files of the folder are sealed as well.
        """
        folder = self.stage(name)
        sync_tree(folder)
        others = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path not in outputs and _is_sealed(path.relative_to(folder))
        ]
        manifest = {
            "stage": name,
            "inputs": self.started_from(name),
            "outputs": {str(path.relative_to(folder)): sha256(path) for path in sorted(outputs)},
            "others": {str(path.relative_to(folder)): sha256(path) for path in others},
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_sealed(folder / MANIFEST, manifest | facts)

    def reopen(self, name: str) -> None:
        """Makes a complete stage one that is not, before its files are written again."""
        (self.stage(name) / MANIFEST).unlink(missing_ok=True)
        sync(self.stage(name))

    def renew(self, stage: Stage, recipe: Recipe) -> None:
        """Reopens a stage, and notes the inputs of now in place of those that it was begun with."""
        if not self.is_restarted(stage.name):
            (self.stage(stage.name) / RESTARTED).unlink(missing_ok=True)
        self.reopen(stage.name)
        write_sealed(self.stage(stage.name) / INPUTS, self.inputs(stage, recipe))

    def set_aside(self, name: str) -> Path | None:
        """Moves a stage's folder to NAME.old-1, or the next free number; returns that."""
        folder = self.stage(name)
        numbered = (self.path / f"{name}.old-{number}" for number in itertools.count(1))
        if not folder.exists():
            return None
        old = folder.rename(next(path for path in numbered if not path.exists()))
        sync(self.path)
        return old

    def is_restarted(self, name: str) -> bool:
        """Whether --restart has begun a stage that is not complete yet."""
        return (self.stage(name) / RESTARTED).exists() and not self.manifest(name)

    def restart(self, name: str) -> Path | None:
        """Moves a stage's folder aside, and notes that a new one is begun; returns the old one."""
        folder = self.stage(name)
        old = self.set_aside(name)
        folder.mkdir(parents=True)
        (folder / RESTARTED).touch()
        sync_tree(folder)
        return old

    def outputs_hash(self, name: str) -> str:
        """Names what a complete stage has produced; "" if it is not complete."""
        if not (manifest := self.manifest(name)):
            return ""
        return hashlib.sha256(json.dumps(manifest["outputs"]).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Those of Python and of the libraries that decide a result."""
    return {"python": platform.python_version(), **{lib: version(lib) for lib in LIBRARIES}}


def _is_sealed(path: Path) -> bool:
    return path.parts[0] not in NOT_SEALED and not any(part.startswith(".") for part in path.parts)
