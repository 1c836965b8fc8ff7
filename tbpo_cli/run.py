"""A run's directory: what each stage was made from, whether that is still so, and what it has produced."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Recipe, is_local

LIBRARIES = ("tbpo", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "*.model", "vocab*", "merges.txt")
WEIGHT_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Stage:
    """What a stage is made from.

    Args:
        name: the command and the folder in the run directory.
        needs: stages whose outputs it reads, if the recipe has them.
        tables: prefixes of the recipe's keys that it depends on.
        files: recipe keys whose files it reads, with the patterns of the files that count in a folder.
    """

    name: str
    needs: tuple[str, ...]
    tables: tuple[str, ...]
    files: dict[str, tuple[str, ...]]


_TOKENIZER = {"model.base": TOKENIZER_FILES, "model.chat_template": ("*",)}
_WEIGHTS = {"model.base": WEIGHT_FILES}
_DATA = dict.fromkeys(("data.train", "data.eval", "sft.train"), ("**/*",))
_HELPERS = dict.fromkeys(("align.loss.positive", "align.loss.negative"), ("*.safetensors", "align/[am]*/*.safetensors"))
_MODEL = ("run.seed", "model.")

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "prepare",
            (),
            ("run.seed", "model.base", "model.revision", "model.chat_template", "data.", "sft.train"),
            _TOKENIZER | _DATA,
        ),
        Stage("sft", ("prepare",), (*_MODEL, "sft."), _WEIGHTS | {"sft.train": ("**/*",)}),
        Stage("align", ("prepare", "sft"), (*_MODEL, "align."), _WEIGHTS | _HELPERS),
    )
}

# Keys that decide how a result is reached or shown, never what it is: changing them invalidates nothing.
FREE_KEYS = {
    "data.max_reject_fraction",
    *(f"{table}.{key}" for table in ("sft", "align") for key in (
        "max_tokens_per_device", "layout", "checkpoint_every", "eval_every", "log_every", "activation_checkpointing")),
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
        started = self.started_from(name) or {"settings": {}}
        lora = any(key.startswith("model.lora.") for key in started["settings"])
        return self.stage(name) / ("adapter" if lora else "model")

    def manifest(self, name: str) -> dict[str, Any] | None:
        """What a complete stage says of itself; None if it is not complete."""
        return read_json(self.stage(name) / "manifest.json")

    def started_from(self, name: str) -> dict[str, Any] | None:
        """The inputs a stage was started with; None if it was never started."""
        return read_json(self.stage(name) / "inputs.json")

    def has_results(self, name: str) -> bool:
        """Whether a stage is complete or has a checkpoint: something that a new start would lose."""
        return self.manifest(name) is not None or any(self.stage(name).glob("checkpoints/step-*"))

    def inputs(self, name: str, recipe: Recipe) -> dict[str, Any]:
        """The inputs a stage would be started with now: settings, hashes of files, outputs of other stages.

        Raises:
            TbpoError: if a file that the recipe names is not there.
        """
        stage, settings = STAGES[name], recipe.settings()
        known = (self.started_from(name) or {}).get("files", {})
        files = {}
        for key, patterns in stage.files.items():
            sources = settings.get(key) or []
            paths = [
                p
                for source in ([sources] if isinstance(sources, str) else sources)
                for p in _files_of(key, source, patterns)
            ]
            if paths:
                files[key] = {str(path): _fingerprint(path, known.get(key, {}).get(str(path))) for path in paths}
        return {
            "settings": {
                key: value
                for key, value in settings.items()
                if key.startswith(stage.tables) and key not in FREE_KEYS and key not in files
            },
            "files": files,
            "outputs": {need: self._outputs_hash(need) for need in self.needed(name, recipe)},
        }

    def needed(self, name: str, recipe: Recipe) -> list[str]:
        """The stages that come before one, in order; [sft] only if the recipe has that table."""
        return [need for need in STAGES[name].needs if need != "sft" or recipe.sft is not None]

    def changes(self, name: str, recipe: Recipe) -> list[str]:
        """What differs between the inputs of a started stage and those of now, one line each."""
        started = self.started_from(name)
        if started is None:
            return []
        now, lines = self.inputs(name, recipe), []
        for key in sorted(started["settings"].keys() | now["settings"].keys()):
            old, new = started["settings"].get(key), now["settings"].get(key)
            if old != new and key not in started["files"].keys() | now["files"].keys():
                lines.append(f"{key}: {_shown(old)} → {_shown(new)}")
        for key in sorted(started["files"].keys() | now["files"].keys()):
            old_files, new_files = started["files"].get(key, {}), now["files"].get(key, {})
            if _hashes(old_files) != _hashes(new_files):
                moved = ", ".join(old_files) != ", ".join(new_files)
                lines.append(
                    f"{key}: {_names(old_files)} → {_names(new_files)}"
                    if moved
                    else f"{key}: the content of {_names(new_files)} changed"
                )
        for need, digest in now["outputs"].items():
            if started["outputs"].get(need) != digest:
                lines.append(f"the result of {need} changed")
        return lines

    def begin(self, name: str, recipe: Recipe) -> Path:
        """Makes a stage's folder and notes its inputs, unless it was begun before; returns the folder."""
        folder = self.stage(name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "recipe.toml", recipe.to_toml())
            if self.started_from(name) is None:
                write_json(folder / "inputs.json", self.inputs(name, recipe))
        except OSError as error:
            raise TbpoError(
                f"the run directory cannot be written: {error.strerror}",
                str(error.filename or folder),
                "a folder with room that you may write to",
                "give another one with --run-dir DIR",
            ) from None
        return folder

    def finish(self, name: str, outputs: list[Path], facts: dict[str, Any]) -> None:
        """Writes a stage's manifest, its last act: from now on it is complete."""
        folder = self.stage(name)
        write_json(
            folder / "manifest.json",
            {
                "stage": name,
                "inputs": self.started_from(name),
                "outputs": {str(path.relative_to(folder)): sha256(path) for path in sorted(outputs)},
                "versions": {"python": platform.python_version(), **{lib: version(lib) for lib in LIBRARIES}},
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **facts,
            },
        )

    def set_aside(self, name: str) -> Path | None:
        """Moves a stage's folder to NAME.old-1 (or the next free number); returns where it is now."""
        folder = self.stage(name)
        if not folder.exists():
            return None
        number = 1
        while (old := self.path / f"{name}.old-{number}").exists():
            number += 1
        return folder.rename(old)

    def _outputs_hash(self, name: str) -> str:
        manifest = self.manifest(name)
        return "" if manifest is None else hashlib.sha256(json.dumps(manifest["outputs"]).encode()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TbpoError(
            f"a file of the run cannot be read: {error}",
            str(path),
            "the JSON that tbpo wrote",
            "redo the stage with --restart, or give another --run-dir",
        ) from None


def _files_of(key: str, source: str, patterns: tuple[str, ...]) -> list[Path]:
    """The local files behind a source; none for a Hub repository, whose name and revision are settings."""
    path = Path(source)
    if path.is_dir():
        return sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    if path.is_file():
        return [path]
    if is_local(source):
        raise TbpoError(
            f"{key} names a file that is not there",
            source,
            "an existing file or folder",
            f"change {key} in the recipe, or give --set {key}=PATH",
        )
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
