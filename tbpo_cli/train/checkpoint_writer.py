"""Checkpoints are written in a thread, while the training goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple, cast

import psutil
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from tbpo_cli import console
from tbpo_cli.model.out_of_memory import result_or_failure
from tbpo_cli.runs.files import sha256, sync, write_sealed
from tbpo_cli.train.checkpoint import KEPT, TrainState, kept_checkpoints
from tbpo_cli.train.group import Group

Tensors = dict[str, Tensor]
# Under this key of a file's header torch's HuggingFaceStorageReader looks where the file's tensors
# begin in the whole ones.
SHARDING_INFO = "DCP_SHARDING_INFO"


class Part(NamedTuple):
    """What one process writes of a state: its file, the tensors in that and the file's header."""

    file: str
    tensors: Tensors
    header: dict[str, str]


class CheckpointWriter:
    """Writes checkpoints while the training goes on; all processes call its methods together.

    1. `begin` copies what this process keeps to the memory of the host (pinned, if it comes from a
       GPU). A thread writes the copy to a hidden folder, syncs it to the disk and hashes it.
    2. `advance`, after each step, asks whether all processes have written. Then the thread of the
       first one writes the hashes, renames the folder, and removes all but the newest KEPT.
    3. The next `advance` notes that this is done. An error of a disk, in either part, is raised in
       all processes; the checkpoints that were there stay.

    One checkpoint is written at a time. Only the main thread exchanges messages with other
    processes: those of a second thread could come between them in another order elsewhere.

    torch's own writer makes the whole file in memory and holds the interpreter's lock meanwhile,
    0.7 s for 500 MB; `save_file` does not.
    """

    def __init__(self, folder: Path, states: dict[str, TrainState], group: Group) -> None:
        """Removes what a process that was killed has left of a checkpoint.

        Args:
            folder: of the checkpoints, each of them a folder `step-N`.
            states: what a checkpoint holds, by name.
            group: the processes, which all have the same states, or parts of them.
        """
        self._folder = folder
        self._states = states
        self._group = group
        self._thread = ThreadPoolExecutor(1)
        on_gpu = group.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))
        self._items: dict[str, list[WriteItem]] = {}
        self._copies: bool | None = None
        self._step = 0
        self._work: Future[dict[str, str] | OSError] | None = None
        self._is_written = False
        if group.is_main:
            for left in folder.glob(".step-*.partial"):
                shutil.rmtree(left)

    def begin(self, step: int) -> None:
        """Has `step-N` written; waits until the one before is there.

        Where the copy would take more than half of the free memory, or does not fit in the end,
        the tensors are written as they are, and the training waits.
        """
        self.finish()
        self._step = step
        self._is_written = False
        every = [self._own_part(name, state) for name, state in self._states.items()]
        parts = [part for part in every if part.tensors]
        if self._copies is None:
            self._copies = self._fits(parts)
        if self._copies:
            parts = self._copied(parts)
        self._work = self._thread.submit(_write, self._partial, parts)
        if not self._copies:
            self.finish()

    def advance(self) -> None:
        """Goes on with the checkpoint that is being written, if all processes have done their part.

        Raises:
            OSError: in all processes, if the disk of one is full or broken.
        """
        if self._work is None:
            return
        own = self._work.result() if self._work.done() else None
        results = [result for result in self._group.gather(own) if result is not None]
        if len(results) < self._group.size:
            return
        self._work = None
        hashes: dict[str, str] = {}
        for result in results:
            if isinstance(result, OSError):
                self._remove_partial()
                raise result
            hashes |= result
        if not self._is_written:
            self._is_written = True
            self._work = self._thread.submit(self._seal, hashes)

    def finish(self) -> None:
        """Waits until the checkpoint is there. Raises OSError as `advance`."""
        while self._work is not None:
            wait([self._work])
            self.advance()

    def close(self) -> None:
        """Waits for the thread; a checkpoint that is not finished is given up."""
        self._thread.shutdown()
        self._stager.close()
        if self._work is not None:
            self._remove_partial()

    @property
    def _partial(self) -> Path:
        return self._folder / f".step-{self._step}.partial"

    def _remove_partial(self) -> None:
        if self._group.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _fits(self, parts: list[Part]) -> bool:
        """Whether the copies of all processes of this machine take half of its free memory at most.

        The same in all processes, of which some may be on other machines; it is said if not.
        """
        num_bytes = sum(each.nbytes for part in parts for each in part.tensors.values())
        needed = num_bytes * self._group.size_on_machine
        free = psutil.virtual_memory().available
        fits = all(self._group.gather(needed <= free / 2))
        if not fits:
            sizes = f"a copy of {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
            console.say(f"WARNING: the training waits while checkpoints are written: {sizes}")
        return fits

    def _copied(self, parts: list[Part]) -> list[Part]:
        """Copies in the host's memory; the parts themselves if one of the processes lacks that.

        None of them makes copies from then on.
        """
        tensors = {part.file: part.tensors for part in parts}
        copies, failure = result_or_failure(lambda: self._stager.stage(tensors))
        failures = [each for each in self._group.gather(failure) if each is not None]
        if not failures:
            staged = cast(dict[str, Tensors], copies)
            return [part._replace(tensors=staged[part.file]) for part in parts]
        self._copies = False
        why = f"out of memory for a copy: {failures[0]}"
        console.say(f"WARNING: the training waits while checkpoints are written: {why}")
        return parts

    def _own_part(self, name: str, state: TrainState) -> Part:
        """What this process writes of a state; without tensors if that is nothing."""
        if not state.is_sharded:
            own = state.tensors if self._group.is_main else {}
            whole = {key: each.contiguous() for key, each in own.items()}
            return Part(f"{name}.safetensors", whole, {})
        planner = DefaultSavePlanner()
        planner.set_up_planner(state.tensors, is_coordinator=self._group.is_main)
        if name not in self._items:
            plans = self._group.gather(planner.create_local_plan())
            plans, _ = planner.create_global_plan(plans)
            self._items[name] = plans[self._group.rank].items
        tensors: Tensors = {}
        begins = {}
        for item in self._items[name]:
            assert item.tensor_data is not None
            tensors[item.index.fqn] = cast(Tensor, planner.resolve_data(item)).contiguous()
            begins[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        file = f"{name}/shard-{self._group.rank + 1:05d}.safetensors"
        return Part(file, tensors, {SHARDING_INFO: json.dumps(begins)})

    def _seal(self, hashes: dict[str, str]) -> dict[str, str] | OSError:
        """Gives the folder its name, in the first process; the result is an error or empty."""
        if not self._group.is_main:
            return {}
        partial = self._partial
        final = self._folder / f"step-{self._step}"
        try:
            for parent in {(partial / file).parent for file in hashes} - {partial}:
                sync(parent)
            content = {"step": self._step, "files": hashes}
            write_sealed(partial / "checkpoint.json", content)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(self._folder)
            for old in list(kept_checkpoints(self._folder).values())[:-KEPT]:
                shutil.rmtree(old)
        except OSError as error:
            return error
        return {}


def _write(folder: Path, parts: list[Part]) -> dict[str, str] | OSError:
    """The hashes of the files that this process has written; or an error of its disk."""
    hashes = {}
    try:
        for part in parts:
            path = folder / part.file
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(part.tensors, path, part.header)
            sync(path)
            hashes[part.file] = sha256(path)
    except OSError as error:
        return error
    return hashes


def _save(tensors: Tensors, path: Path, header: dict[str, str]) -> None:
    try:
        save_file(tensors, path, header)
    except SafetensorError as error:
        raise _system_error(error, path) from None


def _system_error(error: SafetensorError, path: Path) -> Exception:
    """The system's error, which is in the text of safetensors' only; that one if there is none."""
    if (number := re.search(r"os error (\d+)", str(error))) is None:
        return error
    return OSError(int(number.group(1)), os.strerror(int(number.group(1))), str(path))
