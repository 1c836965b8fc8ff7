"""A function of the user's in a process of its own: whatever it does, the caller lives to say so.

The process is asked over a socket, one JSON value a line. It ends with the socket, or the caller,
and the processes that the function has started end with it. What they print goes to stderr.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from tbpo_cli import console
from tbpo_cli.runs.children import die_with_parent

# The caller's search path first, so that no file of the current folder is taken for a module.
START = """import sys
sys.path[:] = sys.argv[1].split("\\n")
from tbpo_cli.evaluation.user_function import serve
serve(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
"""
PATIENCE = 10.0  # seconds in which a process that has closed its socket ends
ENDING = 1.0  # seconds in which it ends once nobody asks any more
MAX_LINE = 1000  # bytes of a line that it prints; the rest of the line is left out


@dataclass(frozen=True)
class Failure:
    """Why there is no number.

    Args:
        what: the exception, or how the process ended.
        line: of the function's file; None if it is not known.
        is_end: whether the process is gone.
        names: that the file has, where it lacks the function.
    """

    what: str
    line: int | None = None
    is_end: bool = False
    names: tuple[str, ...] | None = None


class UserFunction:
    """The function NAME of a file: its two arguments are texts, its result a finite number."""

    def __init__(self, file: str, name: str) -> None:
        """Starts the process, which imports the file; `failure` says what went wrong."""
        ours, theirs = socket.socketpair()
        search = "\n".join(path or str(Path.cwd()) for path in sys.path)
        command = [sys.executable, "-u", "-c", START, search]
        command += [str(theirs.fileno()), str(os.getpid()), file, name]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a process group of its own, and Ctrl-C is the caller's
            )
        with ours:
            self._file = ours.makefile("rw", encoding="utf-8")
        printing = (self._process.stdout, Path(file).name)
        self._printer = threading.Thread(target=_print_lines, args=printing, daemon=True)
        self._printer.start()
        weakref.finalize(self, _end, self._file, self._process, self._printer)
        answer = self._answer()
        self.failure = answer if isinstance(answer, Failure) else None

    def __call__(self, *arguments: str) -> float | Failure:
        with suppress(OSError):  # what follows says how the process ended
            print(json.dumps(arguments), file=self._file, flush=True)
        return self._answer()

    def _answer(self) -> float | Failure:
        with suppress(OSError, ValueError):
            value, failure = json.loads(self._file.readline())
            return Failure(**failure) if failure else float(value)
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._printer.join(ENDING)
        how = f"exit code {code}" if code >= 0 else f"signal {-code}, {_signal_name(-code)}"
        return Failure(f"it ended its process ({how})", is_end=True)


def _end(asking: IO[str], process: subprocess.Popen[bytes], printer: threading.Thread) -> None:
    """Ends the process, and waits until what it has printed is shown."""
    with suppress(OSError):
        asking.close()
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    printer.join(ENDING)


def _print_lines(printed: IO[bytes], name: str) -> None:
    """Says what a process prints, each line after the name of its file, until it is closed."""
    is_begun = False
    while piece := printed.readline(MAX_LINE):
        if not is_begun:
            console.say(f"{name}: {piece.decode(errors='replace').rstrip()}")
        is_begun = not piece.endswith(b"\n")


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return "unknown"


def serve(descriptor: int, parent: int, file: str, name: str) -> None:
    """Imports the file, and answers what is asked, until nobody asks."""
    die_with_parent(parent)
    _end_group_with_this_process(descriptor)
    with socket.socket(fileno=descriptor) as opened:
        asked = opened.makefile("rw", encoding="utf-8")

    def say(value: float, failure: Failure | None) -> None:
        print(json.dumps([value, vars(failure) if failure else None]), file=asked, flush=True)

    module = _attempt(lambda: _imported(file), file)
    if isinstance(module, Failure):
        say(0.0, module)
        return
    function = getattr(module, name, None)
    if not callable(function):
        names = tuple(key for key, value in vars(module).items() if callable(value))
        say(0.0, Failure(f"it has no function {name}", names=names))
        return
    say(0.0, None)
    with suppress(BrokenPipeError):  # who asked was interrupted
        for line in asked:
            arguments = json.loads(line)
            result = _attempt(partial(_called, function, arguments), file)
            say(*((0.0, result) if isinstance(result, Failure) else (result, None)))


def _end_group_with_this_process(descriptor: int) -> None:
    """Starts a process that kills all processes of this group when this one has ended.

    Args:
        descriptor: of the socket, which it closes: the caller must see when this process does.
    """
    served = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if os.fork() == 0:
        os.close(descriptor)
        die_with_parent(served, signal.SIGTERM)
        signal.sigwait({signal.SIGTERM})
        os.killpg(0, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _imported(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tbpo_scorer_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _called(function: Callable[..., Any], arguments: list[str]) -> float:
    value = function(*arguments)
    if isinstance(value, str | bytes) or not math.isfinite(value):
        raise ValueError(f"it returned {value!r:.100}")
    return float(value)


def _attempt(act: Callable[[], Any], file: str) -> Any:
    """What the act gives, or how it failed: by any exception, or by the wish to end the process."""
    try:
        return act()
    except BaseException as error:  # SystemExit and the like as well
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        said = f"{type(error).__name__}: {error}"
        return Failure(said[:2000], lines[-1] if lines else None)
