"""Starts the processes of a stage, by `accelerate launch`."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tbpo_cli import console
from tbpo_cli.errors import TbpoError, ToldError
from tbpo_cli.files import HALVED, halved_tokens

if TYPE_CHECKING:
    from tbpo_cli.recipe import Recipe
    from tbpo_cli.run import RunDir


# In a stage's folder, while its workers run: the first machine has launched it; a worker has said why it failed.
LAUNCHED, TOLD = ".launched", ".told"


@dataclass(frozen=True)
class Processes:
    """How many processes a stage runs in, and where.

    Args:
        per_machine: processes on this machine.
        cpu: on the CPU, also where there is a GPU.
        machines: how many machines run the same command.
        machine_rank: the number of this one, from 0.
        main_address: HOST:PORT of machine 0; "" for one machine.
        flags: for `accelerate launch`, as they are.
    """

    per_machine: int = 1
    cpu: bool = False
    machines: int = 1
    machine_rank: int = 0
    main_address: str = ""
    flags: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.per_machine * self.machines

    def command(self, target: str) -> list[str]:
        """The command line of the launcher, whose workers get `target` as their one argument."""
        host, _, port = self.main_address.rpartition(":")
        # "multi_gpu" means several processes; ACCELERATE_USE_CPU says that they compute on the CPU.
        kind = ["--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no"]
        counts = [f"--num_processes={self.total}", f"--num_machines={self.machines}"]
        where = [f"--machine_rank={self.machine_rank}", f"--main_process_port={port or 0}"]
        where += [f"--main_process_ip={host}"] if host else []
        options = [*kind, *counts, *where, *self.flags]
        return [sys.executable, "-m", "tbpo_cli.launch", *options, "-m", "tbpo_cli.worker", target]


ALONE = Processes()


def processes_of(
    gpus: int | None,
    cpu: bool,
    nodes: int | None,
    node_rank: int | None,
    main_address: str | None,
    flags: tuple[str, ...],
    environment: dict[str, str],
) -> Processes:
    """The processes that the command line asks for; of several machines, what it leaves out is read from SLURM.

    Raises:
        TbpoError: if it asks for several machines and does not say where the first one is.
    """
    if nodes is None and int(environment.get("SLURM_NNODES", 1)) > 1 and "SLURM_NODEID" in environment:
        nodes, node_rank = int(environment["SLURM_NNODES"]), int(environment["SLURM_NODEID"])
        main_address = main_address or _slurm_address(environment)
    nodes = nodes or 1
    if nodes > 1 and (node_rank is None or node_rank >= nodes or ":" not in (main_address or "")):
        raise TbpoError(
            f"{nodes} machines do not find each other",
            f"--nodes {nodes} --node-rank {node_rank} --main-address {main_address}",
            "the number of this machine, from 0, and HOST:PORT of machine 0",
            f"on machine K: --nodes {nodes} --node-rank K --main-address HOST:29500",
        )
    return Processes(gpus or 1, cpu, nodes, node_rank or 0, main_address or "", flags)


def _slurm_address(environment: dict[str, str]) -> str:
    """The first host of the job, and a port that the job's number decides."""
    nodes = ["scontrol", "show", "hostnames", environment.get("SLURM_JOB_NODELIST", "")]
    host = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()[0]
    return f"{host}:{29500 + int(environment.get('SLURM_JOB_ID', 0)) % 1000}"


def run_or_launch(
    work: Callable[[Recipe, RunDir], None], name: str, recipe: Recipe, run_dir: RunDir, processes: Processes
) -> None:
    """Calls `work` here, or lets the workers of the stage `name` call it."""
    if processes.total > 1:
        run_dir.begin(name, recipe)
        _run_workers(name, run_dir, processes)
        return
    if processes.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    work(recipe, run_dir)


def join_workers(name: str, run_dir: RunDir, processes: Processes) -> None:
    """On another machine than the first: waits until that has launched the stage, and adds the workers of this one."""
    launched = run_dir.stage(name) / LAUNCHED
    console.say(f"waiting for {processes.main_address} to begin {name} …")
    while not launched.exists():
        time.sleep(0.5)
    _run_workers(name, run_dir, processes)


def _run_workers(name: str, run_dir: RunDir, processes: Processes) -> None:
    """Runs a stage in several processes, and waits for them. They read run_dir/recipe.toml.

    Raises:
        TbpoError: if there are fewer GPUs than processes, or a worker was killed.
        ToldError: if a worker failed with a message of its own.
    """
    import torch

    available = torch.cuda.device_count()
    if not processes.cpu and processes.per_machine > available:
        raise TbpoError(
            f"{processes.per_machine} GPUs are asked for, and {available} are here",
            "--gpus",
            "as many processes as GPUs",
            f"--gpus {available}" if available else "--cpu for processes on the CPU",
        )
    folder = run_dir.stage(name)
    if processes.machine_rank == 0:
        (folder / LAUNCHED).touch()
    try:
        before = halved_tokens(folder)
        while (code := _launch(folder, processes)) and (tokens := halved_tokens(folder)) != before:
            console.say(
                "out of memory: all processes begin again, from the last checkpoint, with max_tokens_per_device = "
                f"{tokens:,}"
            )
            before = tokens
    finally:
        for note in (LAUNCHED, HALVED):
            (folder / note).unlink(missing_ok=True)
    if code < 0 or (code and not (folder / TOLD).exists()):
        number = -code if code < 0 else code - 128
        reason = f"was killed by signal {number}" if number > 0 else "failed"
        raise TbpoError(
            f"a worker process {reason}",
            str(folder),
            "processes that end by themselves",
            "look at the memory of the machine; the same command goes on from the last checkpoint",
        )
    if code:
        raise ToldError(code)


def _launch(folder: Path, processes: Processes) -> int:
    """Runs the workers of the stage's folder to their end; returns the launcher's exit code.

    A first SIGINT or SIGTERM goes to the workers; a second one ends them and the launcher.
    """
    import psutil

    environment = dict(os.environ)
    if processes.cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes.per_machine)))
    if processes.machine_rank == 0:
        (folder / TOLD).unlink(missing_ok=True)
    command = processes.command(str(folder))
    launcher = psutil.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        is_second = len(received) > 1
        for process in [*launcher.children(recursive=True), *([launcher] if is_second else [])]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if is_second else number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return int(launcher.wait())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """`accelerate launch`, which exits with the code of the worker that failed first.

    It ends, and its workers with it, when the process that started it is gone.
    """
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def end_with_parent() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.disable()  # what the launcher says of a failure, the worker has said better
    try:
        launch()
    except ChildFailedError as error:
        # One that was killed comes first, if not by the launcher: when its connections close, the others fail as well.
        codes = [failure.exitcode for failure in error.failures.values()]
        killed = [code for code in codes if code < 0 and code != -signal.SIGTERM]
        code = killed[0] if killed else error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
