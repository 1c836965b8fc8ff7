"""Starts the processes of a stage, by `accelerate launch`."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tbpo_cli import console
from tbpo_cli.errors import Interrupted, ReportedError, TbpoError
from tbpo_cli.runs import interrupts, machines
from tbpo_cli.runs.children import PARENT, die_with_parent
from tbpo_cli.runs.files import HALVED, halved
from tbpo_cli.runs.lock import held_lock

if TYPE_CHECKING:
    import psutil

    from tbpo_cli.config.recipe import Recipe
    from tbpo_cli.runs.run_dir import RunDir
    from tbpo_cli.runs.stage import Stage


# In a stage's folder, while its workers run: the first machine has launched it; a worker has said
# why it failed.
LAUNCHED, REPORTED = ".launched", ".reported"
# torch's settings of its allocator; the second is its old name.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ABSENT = 600.0  # seconds that machines wait for each other
NOT_ALL_CAME = 75  # exit code of the launcher


@dataclass(frozen=True)
class Processes:
    """How many processes a stage runs in, and where."""

    per_machine: int = 1
    cpu: bool = False  # also where there is a GPU
    machines: int = 1  # that run the same command
    machine_rank: int = 0  # of this one
    main_address: str = ""  # HOST:PORT of machine 0, if there are several
    flags: tuple[str, ...] = ()  # for `accelerate launch`, as they are

    @property
    def total(self) -> int:
        return self.per_machine * self.machines

    def command(self, target: str) -> list[str]:
        """The command line of the launcher, whose workers get `target` as their one argument."""
        host, _, port = self.main_address.rpartition(":")
        # "multi_gpu" means several processes; ACCELERATE_USE_CPU says that they compute on the CPU.
        options = ["--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no"]
        options += [f"--num_processes={self.total}", f"--num_machines={self.machines}"]
        options += [f"--machine_rank={self.machine_rank}", f"--main_process_port={port or 0}"]
        if host:
            options += [f"--main_process_ip={host}", f"--rdzv_conf=timeout={ABSENT:.0f}"]
        return [
            sys.executable,
            "-m",
            "tbpo_cli.runs.launch",
            *options,
            *self.flags,
            "-m",
            "tbpo_cli.cli.worker",
            target,
        ]


ALONE = Processes()


def processes_of(
    gpus: int | None,
    cpu: bool,
    nodes: int | None,
    node_rank: int | None,
    main_address: str | None,
    flags: list[str],
) -> Processes:
    """The processes that the command line asks for, with what SLURM knows of the machines.

    Raises:
        TbpoError: if it asks for several machines and does not say where the first one is.
    """
    job = os.environ
    if nodes is None and int(job.get("SLURM_NNODES", 1)) > 1 and "SLURM_NODEID" in job:
        nodes = int(job["SLURM_NNODES"])
        node_rank = int(job["SLURM_NODEID"])
        if not main_address:  # the first host of the job, and a port that the job's number decides
            command = ["scontrol", "show", "hostnames", job.get("SLURM_JOB_NODELIST", "")]
            with suppress(OSError, subprocess.CalledProcessError):  # as in a container
                hosts = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True
                ).stdout.split()
                main_address = f"{hosts[0]}:{29500 + int(job.get('SLURM_JOB_ID', 0)) % 1000}"
    is_half_said = nodes is None and (node_rank is not None or main_address is not None)
    nodes = nodes or 1
    address = main_address or ""
    is_lost = nodes > 1 and (node_rank is None or ":" not in address)
    if is_half_said or is_lost or (node_rank or 0) >= nodes:
        where = f"--nodes {nodes} --node-rank {node_rank} --main-address {main_address}"
        expected = "the number of this machine, from 0, and HOST:PORT of machine 0"
        fix = f"on machine K: --nodes {max(nodes, 2)} --node-rank K --main-address HOST:29500"
        raise TbpoError("the machines do not find each other", where, expected, fix)
    return Processes(gpus or 1, cpu, nodes, node_rank or 0, address, tuple(flags))


def check_gpus(processes: Processes) -> None:
    """Raises TbpoError if this machine has fewer GPUs than its processes need."""
    import torch

    available = torch.cuda.device_count()
    if not processes.cpu and processes.per_machine > available:
        what = f"{processes.per_machine} GPUs are asked for, and {available} are here"
        fix = f"--gpus {available}" if available else "--cpu for processes on the CPU"
        raise TbpoError(what, "--gpus", "as many processes as GPUs", fix)


def let_segments_grow() -> None:
    """Lets torch's CUDA allocator extend its segments, unless the user has set it up.

    The lengths differ from step to step: blocks of fixed size would leave memory that fits nothing.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def run_or_launch(stage: Stage, recipe: Recipe, run_dir: RunDir, processes: Processes) -> None:
    """Does the work of a stage in this process, or starts workers that do it."""
    let_segments_grow()
    if processes.total > 1:
        _run_workers(run_dir.begin(stage, recipe), processes)
        return
    if processes.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    assert stage.work is not None
    stage.work(recipe, run_dir)


def join_workers(stage: Stage, run_dir: RunDir, processes: Processes) -> None:
    """Waits, on a machine other than the first, until that has launched the stage; adds workers.

    Raises:
        TbpoError: if nobody holds the run for ABSENT seconds. (The first machine may be between two
            commands.)
    """
    let_segments_grow()
    name = stage.name
    console.say(f"waiting for {processes.main_address} to begin {name} …")
    until = time.monotonic() + ABSENT
    while not (run_dir.stage(name) / LAUNCHED).exists():
        until = time.monotonic() + ABSENT if run_dir.owner() else until
        if time.monotonic() > until:
            what = f"the first machine does not begin {name}"
            where = f"--main-address {processes.main_address}"
            expected = f"the same command there, with {run_dir.path}"
            fix = "look at what it says, and start all again"
            raise TbpoError(what, where, expected, fix)
        time.sleep(0.5)
    _run_workers(run_dir.stage(name), processes)


def _run_workers(folder: Path, processes: Processes) -> None:
    """Runs the stage of a folder in several processes, which read recipe.toml beside the folder.

    Raises:
        TbpoError: if there are fewer GPUs than processes, or a worker was killed.
        Interrupted: after SIGINT, SIGTERM or SIGHUP.
        ReportedError: if a worker has said why it ended.
    """
    check_gpus(processes)
    if processes.machine_rank == 0:
        (folder / LAUNCHED).touch()
        if processes.machines > 1:
            address = processes.main_address
            console.say(f"waiting for {processes.machines} machines to meet at {address} …")
    try:
        before = halved(folder)
        while True:
            code, received = _launch(folder, processes)
            sizes = halved(folder)
            if not code or received or sizes == before:
                break
            how = ", ".join(f"{key} = {size:,}" for key, size in sizes.items())
            console.say(f"out of memory: all processes begin again, from what is kept, with {how}")
            before = sizes
    finally:
        for note in (LAUNCHED, HALVED):
            (folder / note).unlink(missing_ok=True)
    is_reported = (folder / REPORTED).exists()
    if received:
        if is_reported and code:
            raise ReportedError(128 + received)
        raise Interrupted(received, "nothing is lost", "the same command goes on from there")
    if code > 0 and is_reported:
        raise ReportedError(code)
    if code == NOT_ALL_CAME:
        raise TbpoError(
            f"not all of the {processes.machines} machines have come together in time",
            f"--main-address {processes.main_address}, on machine {processes.machine_rank}",
            "the same command on every machine, each with its own --node-rank",
            "start it where it does not run, and check that the address is reached from there",
        )
    if code:
        number = -code if code < 0 else code - 128
        what = f"a worker process {f'was killed by signal {number}' if number > 0 else 'failed'}"
        whose = "the machine" if processes.machines == 1 else "this machine, and at the other ones"
        fix = f"look at the memory of {whose}; the same command goes on from the last checkpoint"
        raise TbpoError(what, str(folder), "processes that end by themselves", fix)


def _launch(folder: Path, processes: Processes) -> tuple[int, int]:
    """Runs the workers of the stage's folder to their end.

    A first signal goes to the workers, SIGINT as SIGTERM, which also ends those that are still
    importing; without workers yet, the launcher ends. A second one kills them and the launcher.
    The lock of the run is the standard input of the launcher, and of the workers that it starts.

    Returns:
        The launcher's exit code, and the number of the signal that came first, or 0.
    """
    import psutil

    environment = dict(os.environ)
    environment[PARENT] = str(os.getpid())
    if processes.cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes.per_machine))
        )
    if processes.machine_rank == 0:
        (folder / REPORTED).unlink(missing_ok=True)
    received: list[int] = []
    launcher: list[psutil.Popen] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        passed = signal.SIGHUP if number == signal.SIGHUP else signal.SIGTERM
        for process in launcher:
            workers = process.children(recursive=True)
            is_over = len(received) > 1 or not workers
            for each in [*workers, *([process] if is_over else [])]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL if is_over else passed)

    interrupts.raise_if_received()
    with ExitStack() as after:
        after.callback(interrupts.handle(pass_on))
        launcher.append(
            psutil.Popen(
                processes.command(str(folder)),
                env=environment,
                stdin=_lock_above(folder) or subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        if received:  # while the launcher was being started
            launcher[0].kill()
        code = _wait(launcher[0], folder, processes)
    return code, received[0] if received else 0


def _wait(launcher: psutil.Popen, folder: Path, processes: Processes) -> int:
    """The launcher's exit code. With several machines, their signs of life are watched meanwhile.

    Raises:
        TbpoError: if a machine is lost, after the workers of this one were killed.
    """
    import psutil

    if processes.machines == 1:
        return int(launcher.wait())
    signs = machines.Signs(folder, processes.machine_rank, processes.machines)
    try:
        while True:
            lost = signs.beat()
            if lost is not None:
                for each in [*launcher.children(recursive=True), launcher]:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
                launcher.wait()
                raise TbpoError(
                    f"machine {lost} has given no sign of life for {machines.LOST:.0f} seconds",
                    f"{folder}, on machine {processes.machine_rank}",
                    "all machines of --nodes, and a run directory that all of them see",
                    "when it is back, the same commands go on from the last checkpoint",
                )
            with suppress(psutil.TimeoutExpired):
                return int(launcher.wait(timeout=machines.EVERY))
    finally:
        signs.end()


def _lock_above(folder: Path) -> BinaryIO | None:
    """The lock that this process holds of the run that a stage's folder is in."""
    locks = (held_lock(parent / "lock") for parent in folder.parents)
    return next((lock for lock in locks if lock is not None), None)


def main() -> None:
    """`accelerate launch`, which exits with the code of the worker that failed first.

    It ends, and its workers with it, when the process that started it is gone.
    """
    die_with_parent(int(os.environ[PARENT]), signal.SIGTERM)
    os.environ[PARENT] = str(os.getpid())  # of the workers
    from accelerate.commands.launch import main as launch
    from torch.distributed import DistStoreError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # what the launcher says of a failure, the worker has said better
    try:
        launch()
    except DistStoreError:
        sys.exit(NOT_ALL_CAME)
    except ChildFailedError as error:
        # One that was killed comes first, if not by the launcher: when its connections close, the
        # others fail as well.
        codes = [failure.exitcode for failure in error.failures.values()]
        killed = [code for code in codes if code < 0 and code != -signal.SIGTERM]
        code = killed[0] if killed else error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
