"""tests/benchmarks/gpu.sh where there is no GPU: what it refuses, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks.common import why_failed

SCRIPT = Path(__file__).parent / "benchmarks/gpu.sh"


def script(*parts, **settings):
    return {
        "args": [SCRIPT, *parts],
        "env": os.environ | {"PYTHON": sys.executable, "WHEELS": ""} | settings,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        # A suite in the background ignores it, and bash cannot trap what it begins with ignored.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }


def test_without_a_gpu_it_says_so_before_anything_begins():
    """A model of eight billion parameters on the CPU takes all memory of the machine."""
    done = subprocess.run(**script("step-4", DEVICE="cuda", CUDA_VISIBLE_DEVICES=""), timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("no CUDA device can be used: ")
    assert "DEVICE=cpu" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stdout == ""


def interpreter(tmp_path, what):
    """A program in Python's place, for parts that are to take a certain course."""
    path = tmp_path / "python"
    path.write_text(f"#!/usr/bin/env bash\n{what}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_part_that_runs_and_none_begins_after_it(tmp_path, number):
    program = interpreter(tmp_path, f"echo $$ >> {tmp_path}/pids; exec sleep 100")
    running = subprocess.Popen(**script("step-1", "step-2", DEVICE="cpu", PYTHON=program))
    until = time.monotonic() + 30
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text().strip():
        assert time.monotonic() < until
        time.sleep(0.05)
    running.send_signal(number)
    _, said = running.communicate(timeout=15)  # all who hold its output have ended
    assert running.returncode == 128 + number
    assert "step-1 was interrupted" in said
    assert len((tmp_path / "pids").read_text().split()) == 1


@pytest.mark.parametrize(("outcome", "code"), [("148 skipped in 1s", 1), ("2 passed in 1s", 0)])
def test_checks_that_are_all_skipped_are_no_success(tmp_path, outcome, code):
    """In a copy of the script, since it writes what the checks say beside itself."""
    copy = tmp_path / "tests/benchmarks/gpu.sh"
    (copy.parent / "results").mkdir(parents=True)
    copy.write_bytes(SCRIPT.read_bytes())
    copy.chmod(0o755)
    program = interpreter(tmp_path, f"echo '{outcome}'")
    settings = script("checks-1", DEVICE="cpu", PYTHON=program) | {"args": [copy, "checks-1"]}
    done = subprocess.run(**settings, timeout=60)
    assert done.returncode == code, done.stderr
    assert ("no check of part checks-1 has run" in done.stderr) == bool(code)
    assert (copy.parent / "results/gpu-checks-1.txt").read_text().strip() == outcome


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("raise ValueError('too long')", "ValueError: too long"),
    ],
)
def test_a_measurement_that_fails_has_a_reason_in_a_line(code, why):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert why_failed(done) == why
