"""Files that appear whole or not at all, also after a power cut, and that are checked when read."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tbpo_cli.errors import TbpoError

# In a stage's folder, while its workers run: what was halved, after memory ran out.
HALVED = ".halved"
SEAL = "sealed.json"  # in a sealed folder: the hashes of its other files
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


def sync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` of all files and folders in a folder, and of the folder itself."""
    for path in [*sorted(folder.rglob("*")), folder]:
        if not path.is_symlink():
            sync(path)


def write_whole(path: Path, text: str) -> None:
    """Writes a file: a reader, or a crash, leaves the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync(path.parent)


def halved(folder: Path) -> dict[str, int]:
    """The keys of the recipe that workers begin again with in halves, after memory ran out."""
    path = folder / HALVED
    sizes: dict[str, int] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return sizes


def note_halved(folder: Path, key: str, size: int) -> None:
    """Leaves a smaller number for a key of the recipe, which all workers then begin again with.

    Several workers may do so at once: each writes a file of its own, and gives it the one name.
    """
    known = halved(folder)
    own = folder / f"{HALVED}-{os.environ.get('RANK', '0')}"
    write_whole(own, json.dumps(known | {key: min(size, known.get(key, size))}))
    own.replace(folder / HALVED)


def json_lines(path: Path, may_be_cut: bool = False) -> list[Any]:
    """The values of JSON lines; with `may_be_cut`, without lines that a crash cut short."""
    values = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError) if may_be_cut else nullcontext():
            values.append(json.loads(line))
    return values


def sha256(path: Path) -> str:
    """The hash of a file's content; within a process, read again only if the file was touched."""
    status = path.stat()
    identity = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _sha256(path.absolute(), identity)


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, _identity: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, hashes: dict[str, str]) -> list[str]:
    """What is wrong with the files of a folder, "PATH is missing" each, by their hashes."""
    faults = []
    for name, digest in hashes.items():
        try:
            if sha256(folder / name) != digest:
                faults.append(f"{folder / name} has other content than was written")
        except FileNotFoundError:
            faults.append(f"{folder / name} is missing")
        except OSError as error:
            faults.append(f"{folder / name} cannot be read: {error.strerror}")
    return faults


def seal_folder(partial: Path, final: Path) -> None:
    """Gives a folder its name, once its files and their hashes, in `sealed.json`, are on disk."""
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(partial)): sha256(path) for path in paths}
    write_sealed(partial / SEAL, {"files": hashes})
    sync_tree(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(final.parent)


def is_sealed(folder: Path) -> bool:
    """Whether a folder is as `seal_folder` left it."""
    try:
        hashes = read_sealed(folder / SEAL).get("files", {})
    except TbpoError:
        return False
    return bool(hashes) and not damage(folder, hashes)


@contextmanager
def explaining_disk_errors(folder: Path) -> Iterator[None]:
    """Turns the errors of a disk that is full, read-only or gone into messages."""
    try:
        yield
    except OSError as error:
        is_ours = error.filename is not None and Path(error.filename).is_relative_to(folder)
        if not is_ours and error.errno not in DISK_ERRORS:
            raise
        raise unwritable(error, folder) from None


def unwritable(error: OSError, folder: Path) -> TbpoError:
    """The message for a disk that is full, read-only or gone."""
    return TbpoError(
        f"the run directory cannot be written: {error.strerror or error}",
        str(error.filename or folder),
        "a folder with space that you may write to",
        "free some space and give the same command again, which goes on from the last checkpoint; "
        "or give another folder with --run-dir DIR",
    )


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: float, free: float) -> None:
    """Raises TbpoError if the disk of a folder has fewer free bytes than are needed."""
    if free < needed:
        raise TbpoError(
            f"the disk is too full: {free / 1e9:.2f} GB are free",
            str(folder),
            f"{needed / 1e9:.2f} GB for checkpoints and the result",
            "make space, or --run-dir DIR on another disk",
        )


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object that carries the hash of itself."""
    write_whole(
        path, json.dumps(content | {"seal": _seal(content)}, indent=1, ensure_ascii=False) + "\n"
    )


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote; empty if there is no such file.

    Raises:
        TbpoError: if it is not what was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("seal", None) != _seal(content):
            raise ValueError("it is not as it was written")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TbpoError(
            f"a file of the run is damaged: {error}",
            str(path),
            "the JSON that tbpo wrote",
            f"move {path.parent} away and give the same command again, or give another --run-dir",
        ) from None


def sealed_line(content: dict[str, Any]) -> bytes:
    """A JSON line, to be added to a file, that carries the hash of itself.

    A line break first: the line before it may have been cut short.
    """
    return b"\n" + json.dumps(content | {"seal": _seal(content)}).encode()


def sealed_lines(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(what `sealed_line` wrote, what is in other lines); without lines that a crash cut short."""
    read = [line for line in json_lines(path, may_be_cut=True) if isinstance(line, dict)]
    whole: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for line in read:
        (whole if line.pop("seal", None) == _seal(line) else others).append(line)
    return whole, others


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
