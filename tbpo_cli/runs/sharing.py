"""A complete stage of another run with the same inputs, copied in place of being made again."""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import Any

from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import damage
from tbpo_cli.runs.run_dir import RunDir, versions

Json = dict[str, Any]


def complete_beside(run_dir: RunDir, name: str) -> RunDir | None:
    """A run in the same folder that has a stage from the inputs with which this run began it.

    It must be complete and as it was written, by the same versions of the libraries, from settings
    and files of the same content, in the same places, and belong to the same user.
    """
    wanted = _contents(run_dir.started_from(name))
    here = run_dir.path.parent
    for path in sorted(here.iterdir()) if here.is_dir() else ():
        other = RunDir(path)
        with suppress(TbpoError, OSError):
            if path == run_dir.path or path.stat().st_uid != run_dir.path.stat().st_uid:
                continue
            manifest = other.manifest(name)
            is_same = manifest and _contents(manifest["inputs"]) == wanted
            if is_same and manifest["versions"] == versions() and not other.damage(name):
                return other
    return None


def copy_stage(source: RunDir, target: RunDir, name: str) -> bool:
    """Copies the sealed files of a complete stage; returns whether they are what was sealed."""
    manifest = source.manifest(name)
    hashes: dict[str, str] = manifest.get("outputs", {}) | manifest.get("others", {})
    try:
        for file in hashes:
            path = target.stage(name) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.stage(name) / file, path)
    except OSError:  # the other run may be moved or restarted meanwhile
        return False
    return bool(hashes) and not damage(target.stage(name), hashes)


def _contents(inputs: Json) -> Json:
    """Inputs without what tells only that a file was not touched."""
    files = {
        key: {path: file["sha256"] for path, file in of_key.items()}
        for key, of_key in inputs.get("files", {}).items()
    }
    return inputs | {"files": files}
