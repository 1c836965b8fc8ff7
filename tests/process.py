"""The command as a process of its own, forked from one that has imported the libraries.

It has its own environment, streams, signals and exit code, like any other; only the imports are
behind it.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tbpo_cli.cli.main", "tbpo_cli.stages.evaluate", "tbpo_cli.stages.align", "datasets"]
)


def _main(arguments, folder, environment, paths):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.argv = ["tbpo", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    from tbpo_cli.cli.main import main

    main()


class Process:
    """`tbpo ARGUMENTS`, started in the folder `cwd`; to be used much like a subprocess.Popen."""

    def __init__(self, *arguments, cwd, **environment):
        self.arguments = [*map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        self._paths = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._paths:
            path.touch()
        given = (self.arguments, cwd, {**os.environ, **environment}, self._paths)
        self._process = FORKS.Process(
            target=_main, args=given, daemon=True
        )  # it ends with the tests
        self._process.start()
        self.pid = self._process.pid

    @property
    def err(self):
        """What it has written to stderr so far."""
        return self._paths[1].read_text(encoding="utf-8")

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=300):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout, self.err)
        return self.poll()

    def finish(self, timeout=300):
        """Waits for its end; returns it as a finished process."""
        code = self.wait(timeout)
        done = subprocess.CompletedProcess(
            self.arguments, code, *(path.read_text("utf-8") for path in self._paths)
        )
        self.close()
        return done

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait_until(self, done, seconds=300):
        """Waits until `done()` is true; raises TimeoutError, or AssertionError if it ends first."""
        deadline = time.monotonic() + seconds
        while not done():
            assert self.poll() is None, self.err
            if time.monotonic() > deadline:
                raise TimeoutError(self.err)
            time.sleep(0.02)

    def close(self):
        """Kills it if it still runs, and removes its output."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.wait()
        self._folder.cleanup()
