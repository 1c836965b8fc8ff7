"""The lock of a run directory: one command writes a run at a time.

The kernel's lock (flock) on the file `lock` decides where it can. It belongs to the open file,
which the workers inherit, so it lasts as long as any process that writes. Where the file system has
no such locks, or does not share them between machines, a heartbeat decides: the owner touches the
file every few seconds, and a process that wants the run watches whether it goes on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tbpo_cli import console
from tbpo_cli.errors import TbpoError

BEAT = 4.0  # seconds between two touches of the lock's file
SILENCE = 15.0  # seconds without one after which its owner is gone
SETTLED = 1.0  # seconds after which, without flock, a claim that is still there has won
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_held: dict[Path, BinaryIO] = {}  # by the path of the lock: the open files of this process
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True)
class Owner:
    """Who has a run, or had it and ended without giving it back.

    Args:
        name: "process PID on HOST"; "" if nobody has it.
        boot: the id of the kernel that it runs on; "" if that is not known.
    """

    name: str
    boot: str


def read_owner(path: Path) -> Owner:
    """What a lock's file says; one that a crash left empty or zeroed names nobody."""
    with suppress(OSError):
        if not path.is_file():
            return Owner("", "")
        text = path.read_bytes().strip(b"\0 \n").decode("utf-8", "backslashreplace")
        name, _, boot = text.partition("\n")
        return Owner(name[:200], boot.strip())
    return Owner("", "")


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Makes this process the one owner of a run.

    1. Ask the kernel for the lock. If another process on a kernel that it knows of has it, stop.
    2. If the kernel gave it, and the file names no owner or one of this boot, that one has ended.
    3. Otherwise the owner may be on another machine, or the file system has no locks: watch whether
       the file is still touched.
    4. Write who has it now, and touch it from a thread until it is given back.

    Raises:
        TbpoError: if another process has the run, or the lock is no file.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        kind = "a symbolic link" if path.is_symlink() else "a folder or a device"
        raise TbpoError(
            f"the lock of the run is {kind}",
            str(path),
            "the file in which tbpo writes who has the run, or nothing",
            f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')}, and the same command again",
        )
    boot = _boot_id()
    mine = f"process {os.getpid()} on {platform.node()}\n{boot}"
    with path.open("a+b", buffering=0) as file:
        owner = read_owner(path)
        is_locked = _lock(file, path, owner)
        if owner.name and not (is_locked and boot and owner.boot == boot):
            _watch(path, owner)
        if owner.name:
            console.say(f"taking over the run from {owner.name}, which ended without a word")
        _write(path, mine)
        if not is_locked:
            time.sleep(SETTLED)
            if path.read_bytes() != mine.encode():
                raise _in_use(path, read_owner(path))
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
        beat.start()
        _held[path] = file
        try:
            yield
        finally:
            del _held[path]
            stop.set()
            beat.join()
            with suppress(OSError):  # on a full or failed disk the error that came first counts
                _write(path, "")


def held_lock(path: Path) -> BinaryIO | None:
    """The open file of a lock that this process holds: a process that inherits it holds it, too."""
    return _held.get(path)


def _lock(file: BinaryIO, path: Path, owner: Owner) -> bool:
    """Whether the kernel gave the lock; False if the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise _in_use(path, owner) from None
        return False
    return True


def _watch(path: Path, owner: Owner) -> None:
    """Returns when the file was not touched for SILENCE seconds. Raises TbpoError if it was."""
    console.say(f"waiting {SILENCE:.0f} s to see whether {owner.name} still has the run …")
    before = _touched(path)
    until = time.monotonic() + SILENCE
    while time.monotonic() < until:
        time.sleep(0.5)
        if _touched(path) != before:
            raise _in_use(path, read_owner(path))


def _touched(path: Path) -> tuple[int, str]:
    """Opened anew each time: a network file system asks its server only then."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns, file.read().decode("utf-8", "replace")


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _write(path: Path, text: str) -> None:
    """In place, since a renamed file would be another one, with another lock."""
    with path.open("r+b", buffering=0) as file:
        file.truncate()
        file.write(text.encode())


def _boot_id() -> str:
    with suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return ""


def _in_use(path: Path, owner: Owner) -> TbpoError:
    return TbpoError(
        f"the run is in use by {owner.name or 'a process that has just begun'}",
        str(path.parent),
        "one process a run directory",
        "wait for it, or give another --run-dir",
    )
