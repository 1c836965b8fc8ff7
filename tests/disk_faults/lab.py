"""A tiny run, and its commands, forked from one process with the shim below them."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ("prepare", "align", "sample", "eval", "push")
TIMINGS = {"seconds", "pairs_per_s", "tokens_per_s", "peak_memory_gb"}
SECONDS = 120  # that a command may take
TOKEN = "hf_" + "w" * 30
SERVER = """
import sys, time
sys.path.insert(0, {tests!r})
from hub_server import serve
with serve({root!r}) as hub:
    hub.tokens[{token!r}] = "write"
    print(hub.address, flush=True)
    sys.stdin.read()
"""


def build_shim(folder: Path) -> Path:
    """Compiles the shim. Raises FileNotFoundError or CalledProcessError without a compiler."""
    library = folder / "shim.so"
    source = Path(__file__).parent / "shim.c"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        code: its exit code; negative, if a signal ended it.
        err: what it said.
        counts: of the operations that changed a file: of the main thread, and of all others.
    """

    code: int
    err: str
    counts: tuple[int, int]


class Lab:
    """The folder with base, rows and recipe, and a Hub on loopback.

    Make it before huggingface_hub is imported, which reads the Hub's address then.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        hub = folder / "hub"
        (hub / "models/org").mkdir(parents=True)
        code = SERVER.format(tests=str(ROOT / "tests"), root=str(hub), token=TOKEN)
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._server.stdout is not None
        os.environ |= {
            "HF_ENDPOINT": self._server.stdout.readline().strip(),
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "NO_PROXY": "127.0.0.1",
        }
        self._numbers = iter(range(10**9))
        self._lock = threading.Lock()
        self._make_inputs()
        self._preload()

    def close(self) -> None:
        self._server.kill()
        self._server.wait()

    def _make_inputs(self) -> None:
        """In a process of its own, so that no library has started threads before the forks."""
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
            "from disk_faults.inputs import make; make(Path(sys.argv[2]))"
        )
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        command = [sys.executable, "-c", code, str(ROOT / "tests"), str(self.folder)]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        shutil.copytree(self.folder / "base", self.folder / "hub/models/org/base")

    def _preload(self) -> None:
        import tbpo_cli.cli.main
        import tbpo_cli.stages
        import tbpo_cli.stages.push
        import tbpo_cli.train.loop  # noqa: F401

    def new_folder(self) -> Path:
        """A run with none beside it, whose prepared pairs it would copy."""
        with self._lock:
            number = next(self._numbers)
        (self.folder / f"alone-{number}").mkdir()
        return self.folder / f"alone-{number}/case-{number}"

    def run(
        self,
        command: str,
        run: Path,
        *,
        in_thread: bool = False,
        kill: int = -1,
        fail: int = -1,
        error: int = 0,
        journal: Path | str = "",
    ) -> Outcome:
        """`tbpo COMMAND` in a forked process, with a kill or an error at an operation.

        Args:
            in_thread: the operation is one of those that are not of the main thread.
        """
        said = run.with_name(f"{run.name}-said")
        counted = run.with_name(f"{run.name}-count")
        arguments = [
            command,
            "recipe.toml",
            "--run-dir",
            str(run),
            "--set",
            f"push.repo=me/{run.name}",
        ]
        process = os.fork()
        if process == 0:
            code = 1
            try:
                file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, 1)
                os.dup2(file, 2)
                os.chdir(self.folder)
                faults = (int(in_thread), kill, fail, error, str(journal).encode())
                code = _main(arguments, run, faults, counted)
            finally:
                os._exit(code)
        alarm = threading.Timer(SECONDS, _kill, [process])
        alarm.start()
        _, status = os.waitpid(process, 0)
        alarm.cancel()
        counts = json.loads(counted.read_text()) if counted.exists() else (0, 0)
        outcome = Outcome(
            os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), tuple(counts)
        )
        said.unlink()
        counted.unlink(missing_ok=True)
        return outcome

    def results(self, run: Path) -> dict[str, str]:
        """Hashes of the files of a run and of what it published, without what measures time."""
        hashes = {}
        for path in sorted(run.rglob("*")):
            if path.is_file():
                hashes[str(path.relative_to(run))] = _hash_of(path)
        for path in (self.folder / "hub/models/me").glob(f"{run.name}/*"):
            hashes[f"hub/{path.name}"] = _hash_of(path)
        return hashes

    def remove(self, run: Path) -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(self.folder / "hub/models/me" / run.name, ignore_errors=True)


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _main(
    arguments: list[str], run: Path, faults: tuple[int, int, int, int, bytes], counted: Path
) -> int:
    shim = ctypes.CDLL(None)
    shim.shim_arm(str(run).encode(), *faults)
    sys.argv = ["tbpo", *arguments]
    from tbpo_cli.cli.main import main

    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    counted.write_text(json.dumps([shim.shim_count(0), shim.shim_count(1)]))
    return code


def _hash_of(path: Path) -> str:
    """Of what two runs of the same recipe must have in common."""
    content = path.read_bytes()
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        content = json.dumps(
            [{k: v for k, v in x.items() if k not in TIMINGS} for x in lines]
        ).encode()
    elif path.name == "results.json":
        content = json.dumps(json.loads(content) | {"date": ""}).encode()
    elif path.suffix not in {".arrow", ".safetensors", ".jsonl"} and path.name not in {
        "adapter_config.json",
        "tokenizer.json",
    }:
        content = b""  # reports with times, manifests: their names count
    content = re.sub(rb"(finished|alone-\d+/case-\d+)/", b"", content)
    return hashlib.sha256(content).hexdigest()[:16]
