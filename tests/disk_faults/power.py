"""The states that a disk may be in after a power cut, from the journal of the shim."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

State = dict[str, bytes | None]  # by path: the content of a file; None for a folder


@dataclass
class Disk:
    """Names and contents under a folder: as the process sees them, and what is surely on the disk.

    Args:
        names: path → inode, or None for a folder.
        safe_names: the same, when something was last put on the disk: that commits all names
            that were changed before.
        safe: the content of an inode when that was last put on the disk.
        sizes: of inodes, as the process sees them.
    """

    names: dict[str, int | None] = field(default_factory=dict)
    safe_names: dict[str, int | None] = field(default_factory=dict)
    safe: dict[int, bytes] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """A folder of which everything is on the disk."""
        disk = cls()
        for path in sorted(folder.rglob("*")) if folder.exists() else ():
            inode = None if path.is_dir() else path.stat().st_ino
            disk.names[str(path)] = inode
            if inode is not None:
                disk.safe[inode] = path.read_bytes()
                disk.sizes[inode] = len(disk.safe[inode])
        disk.safe_names = dict(disk.names)
        return disk

    def apply(self, line: str, journal: Path) -> None:
        """One operation, as the shim noted it."""
        number, operation, inode, size, path, other = line.split("\t")
        if operation == "rename":
            self._move(path, other)
        elif operation == "remove":
            self.names.pop(path, None)
        elif operation == "mkdir":
            self.names[path] = None
        else:
            self._see(int(inode), int(size), path, journal / number, operation)

    def _move(self, path: str, other: str) -> None:
        for name in [one for one in self.names if one == path or one.startswith(f"{path}/")]:
            self.names[other + name[len(path) :]] = self.names.pop(name)

    def _see(self, inode: int, size: int, path: str, content: Path, operation: str) -> None:
        is_folder = Path(path).is_dir() or self.names.get(path, 0) is None
        if not is_folder:
            # Renamed by a system call that no library function stands for.
            for name in [n for n, i in self.names.items() if i == inode and n != path]:
                del self.names[name]
            self.names[path] = inode
            self.sizes[inode] = size
            if operation == "open" and not size:
                self.safe.pop(inode, None)
        if operation == "sync":
            if not is_folder and content.exists():
                self.safe[inode] = content.read_bytes()
            self.safe_names = dict(self.names)

    def states(self) -> Iterator[State]:
        """After a power cut now: lost content is zeros, or cut off; or names are lost as well."""
        zeros: State = {}
        cut: State = {}
        for path, inode in self.names.items():
            safe = None if inode is None else self.safe.get(inode, b"")
            size = 0 if inode is None else self.sizes.get(inode, 0)
            zeros[path] = None if safe is None else safe[:size].ljust(size, b"\0")
            cut[path] = None if safe is None else safe[:size]
        old: State = {
            path: None if inode is None else self.safe.get(inode, b"")
            for path, inode in self.safe_names.items()
        }
        yield from (zeros, cut, old)


def after_power_cuts(before: Disk, journal: Path) -> Iterator[tuple[int, State]]:
    """(number of the next operation, state) for a cut before every operation; each state once."""
    disk = deepcopy(before)
    seen = set()
    lines = (journal / "journal").read_text().splitlines()
    for number in range(len(lines) + 1):
        for state in disk.states():
            key = hash(frozenset(state.items()))
            if key not in seen:
                seen.add(key)
                yield number, state
        if number < len(lines):
            disk.apply(lines[number], journal)


def write_state(state: State, folder: Path, other: Path) -> None:
    """Makes the state of `folder` in another one."""
    other.mkdir()
    for path, content in sorted(state.items(), key=lambda item: item[0]):
        place = other / Path(path).relative_to(folder)
        if content is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
