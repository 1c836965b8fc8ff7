"""Jobs in forked processes that have the libraries already, each in a copy of the repository."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KEPT = ROOT / ".benchmarks" / "mutation"
SNAPSHOT = KEPT / "snapshot"  # the repository as it was at the start: work on it may go on


@dataclass(frozen=True)
class Job:
    """What a forked process does.

    Args:
        work: runs in the copy of the repository, and is given the folder that holds the copy.
        done: called here with the exit code, or None if the limit was passed, and the seconds.
        limit: seconds.
        files: path from the root: its text in this job, in place of what stands there.
    """

    work: Callable[[Path], int]
    done: Callable[[int | None, float], None]
    limit: float
    files: dict[str, str]


def preload() -> None:
    """The libraries, but nothing of ours: a forked process imports the package as its copy has it.

    `conftest` sets the environment that libraries read when they are imported.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest  # noqa: F401

    sys.path.pop(0)
    del sys.modules["conftest"]
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import transformers

    for name in ("LlamaForCausalLM", "PreTrainedTokenizerFast"):  # they are loaded when asked for
        getattr(transformers, name)
    assert not any(name.startswith("tbpo_cli") for name in sys.modules)


def make_copies(number: int) -> list[Path]:
    """The snapshot, and folders that hold a copy of it each, for as many jobs at a time."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shutil.rmtree(SNAPSHOT, ignore_errors=True)
    for file in files.splitlines():
        if (ROOT / file).is_file():
            (SNAPSHOT / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, SNAPSHOT / file)
    copies = [KEPT / f"copy-{place}" for place in range(number)]
    for copy in copies:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(SNAPSHOT, copy / "repository")
    return copies


def run_jobs(jobs: Iterator[Job], copies: list[Path]) -> None:
    """Runs the jobs, one a copy at a time."""
    free = list(copies)
    running: dict[int, tuple[Job, Path, float]] = {}
    while True:
        while free and (job := next(jobs, None)):
            copy = free.pop()
            running[_start(job, copy)] = (job, copy, time.monotonic())
        if not running:
            return
        time.sleep(0.02)
        for process, (job, copy, since) in [*running.items()]:
            ended, status = os.waitpid(process, os.WNOHANG)
            seconds = time.monotonic() - since
            if not ended and seconds <= job.limit:
                continue
            _end_group(process)
            if not ended:
                os.waitpid(process, 0)
            for file in job.files:
                shutil.copy(SNAPSHOT / file, copy / "repository" / file)
            del running[process]
            free.append(copy)
            job.done(os.waitstatus_to_exitcode(status) if ended else None, seconds)


def _start(job: Job, copy: Path) -> int:
    repository = copy / "repository"
    for file, text in job.files.items():
        (repository / file).write_text(text, encoding="utf-8")
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        os.setsid()
        output = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(repository)
        sys.path.insert(0, str(repository))
        os.environ.update(PYTHONPATH=str(repository), PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True  # bytecode of a mutant must not outlive it
        code = job.work(copy)
    finally:
        os._exit(code)


def _end_group(process: int) -> None:
    """Ends the process and what it started, by their group."""
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def run_pytest(copy: Path, names: list[str], plugins: tuple[object, ...] = ()) -> int:
    """pytest in this process, on some files or tests; returns its exit code."""
    import pytest

    options = ["-n0", "-p", "no:cacheprovider", "--basetemp", str(copy / "tmp")]
    return int(pytest.main([*options, *names], plugins=list(plugins)))
