"""A function of the user's in a process of its own: whatever it does, the caller lives to say so.

The process is asked over a socket, one JSON value a line. It ends with the socket, or the caller.
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
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tbpo_cli.runs.children import die_with_parent

# The caller's search path first, so that no file of the current folder is taken for a module.
START = """import sys
sys.path[:] = sys.argv[1].split("\\n")
from tbpo_cli.evaluation.user_function import serve
serve(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
"""
PATIENCE = 10.0  # seconds in which a process that has closed its socket ends


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
        command = [sys.executable, "-c", START, search]
        command += [str(theirs.fileno()), str(os.getpid()), file, name]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        with ours:
            self._file = ours.makefile("rw", encoding="utf-8")
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
        how = f"exit code {code}" if code >= 0 else f"signal {-code}, {_signal_name(-code)}"
        return Failure(f"it ended its process ({how})", is_end=True)


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return "unknown"


def serve(descriptor: int, parent: int, file: str, name: str) -> None:
    """Imports the file, and answers what is asked, until nobody asks."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's business
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
    for line in asked:
        arguments = json.loads(line)
        result = _attempt(partial(_called, function, arguments), file)
        say(*((0.0, result) if isinstance(result, Failure) else (result, None)))


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
