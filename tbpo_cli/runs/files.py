"""Files that appear whole or not at all, and say so when they are not as they were written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tbpo_cli.errors import TbpoError

HALVED = ".halved"  # in a stage's folder, while its workers run: tokens of a micro-batch, after memory ran out
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def halved_tokens(folder: Path) -> int | None:
    """The tokens of a micro-batch that a stage's workers are to begin again with; None: memory has not run out."""
    path = folder / HALVED
    return int(path.read_text(encoding="utf-8")) if path.exists() else None


def json_lines(path: Path, may_be_cut: bool = False) -> list[Any]:
    """What the lines of a file hold, JSON each; with `may_be_cut`, what a crash cut short is left out."""
    values = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError) if may_be_cut else nullcontext():
            values.append(json.loads(line))
    return values


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def told_as_unwritable(folder: Path) -> Iterator[None]:
    """Turns the errors of a disk that is full, read-only or gone into one that a user understands."""
    try:
        yield
    except OSError as error:
        is_ours = error.filename is not None and Path(error.filename).is_relative_to(folder)
        if not is_ours and error.errno not in DISK_ERRORS:
            raise
        what, where = (
            f"the run directory cannot be written: {error.strerror}",
            str(error.filename or folder),
        )
        again = "make room and give the same command again, which goes on from the last checkpoint"
        fix = f"{again}; or give another one with --run-dir DIR"
        raise TbpoError(what, where, "a folder with room that you may write to", fix) from None


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object that carries the hash of itself."""
    write_whole(
        path, json.dumps(content | {"seal": _seal(content)}, indent=1, ensure_ascii=False) + "\n"
    )


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote; empty if there is no such file. Raises TbpoError if it is not what was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("seal", None) != _seal(content):
            raise ValueError("it is not as it was written")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        fix = f"move {path.parent} away and give the same command again, or give another --run-dir"
        raise TbpoError(
            f"a file of the run is damaged: {error}", str(path), "the JSON that tbpo wrote", fix
        ) from None


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
