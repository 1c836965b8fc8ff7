"""The base of a run as others find it on the Hub: its commit, and its licence."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub as hf

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.hub.client import look_up

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Base:
    """The base on the Hub.

    Args:
        id: of its repository.
        revision: the commit that was trained on, or the branch if the Hub was not asked.
        licence_files: local copies, to be published beside merged weights.
        licence: metadata of the model card.
    """

    id: str
    revision: str
    licence_files: tuple[Path, ...]
    licence: dict[str, Any]


def published_base(recipe: Recipe, trained: dict[str, Any], online: bool) -> Base:
    """The base on the Hub, pinned to the commit that was trained on where `online`.

    Args:
        trained: the manifest of align.

    Raises:
        TbpoError: if the base is a folder and push.base_model names no repository with the same
            weights.
    """
    name, revision = _repository(recipe, trained)
    if online:
        revision = _pinned(name, revision, trained)
    folder = recipe.model.base
    with suppress(OSError, ValueError):  # offline, and not in the cache
        folder = hf.snapshot_download(
            name,
            revision=revision,
            allow_patterns=["README.md", *LICENCES],
            local_files_only=not online,
        )
    files = tuple(path for pattern in LICENCES for path in Path(folder).glob(pattern))
    return Base(name, revision, files, _licence(recipe, Path(folder)))


def local_base(recipe: Recipe, trained: dict[str, Any]) -> Base:
    """The base as this machine has it: where it is published, if the recipe says so, or its folder.

    Args:
        trained: the manifest of align.
    """
    folder = Path(recipe.model.base)
    if not folder.is_absolute() or recipe.push.base_model is not None:
        return published_base(recipe, trained, online=False)
    files = tuple(path for pattern in LICENCES for path in folder.glob(pattern))
    return Base(str(folder), "main", files, _licence(recipe, folder))


def _repository(recipe: Recipe, trained: dict[str, Any]) -> tuple[str, str]:
    """Name and revision of the base's repository."""
    base = recipe.model.base
    wanted = recipe.push.base_model
    if not Path(base).is_absolute():
        return base, trained.get("base_commit") or recipe.model.revision or "main"
    if wanted is None:
        raise TbpoError(
            "the base is a folder of this machine, which nobody else can load",
            f"model.base = {base!r}",
            "a repository on the Hub, which the adapter and its card can name",
            f'publish it once (hf upload USER/NAME {base}), and add push.base_model = "USER/NAME"',
        )
    name, _, revision = wanted.partition("@")
    return name, revision or "main"


def _pinned(name: str, revision: str, trained: dict[str, Any]) -> str:
    """The commit of the revision. Raises TbpoError if it lacks weights that were trained on."""
    commit, files = look_up(name, revision)
    published = {file.lfs.sha256 for file in files.values() if file.lfs is not None}
    weights = trained["inputs"]["files"].get("model.base", {}).items()
    other = [
        Path(path).name
        for path, file in weights
        if path.endswith("safetensors") and file["sha256"] not in published
    ]
    if other:
        raise TbpoError(
            "push.base_model is another base than was trained on",
            f"{name}@{commit}: {', '.join(other)}",
            "the same weights",
            "name the repository[@revision] that holds them",
        )
    return commit


def _licence(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The metadata of the licence: what the recipe says, or else the base's card."""
    metadata: dict[str, Any] = {"license": recipe.push.license}
    if recipe.push.license is None:
        with suppress(Exception):  # a card that is not there, or broken, says nothing
            metadata = hf.metadata_load(folder / "README.md") or {}
    keys = ("license", "license_name", "license_link")
    return {key: metadata[key] for key in keys if metadata.get(key)}
