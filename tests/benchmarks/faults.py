"""A kill, a full disk, an I/O error and a power cut at every operation on files, and damaged files.

    python tests/benchmarks/faults.py --keep         # all of it
    python tests/benchmarks/faults.py --every 60     # every 60th case, as the test suite does

1. The commands prepare, align, sample, eval and push of a tiny run are repeated with one fault at
   one operation that changes a file. Then the same command is given again: it must end well, and
   leave the same bytes and the same files as a run that was left alone. A fault must not show a
   traceback. Operations of the main thread and of others (checkpoints are written in one) are
   numbered apart, so that a number means the same operation in each run.
2. A power cut loses what no fsync has reached: contents (zeros, or cut off) or names as well.
3. Every file of the finished run is deleted, emptied, zeroed, or has a bit flipped. Then every
   command is given: it must notice (exit 2, no traceback), or its results be the same.

Writes results/faults.{json,md} with --keep. Needs a C compiler, for LD_PRELOAD.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

from disk_faults.lab import COMMANDS, Lab, Outcome, build_shim  # noqa: E402
from disk_faults.power import Disk, after_power_cuts, write_state  # noqa: E402

ERRORS = {"disk full": errno.ENOSPC, "I/O error": errno.EIO}
DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit flipped": lambda path: _flip(path),
}
# What no command reads any more when all stages are complete may stay as it is.
UNREAD = ("align/checkpoints/", "reference/", "sample/.placed.json", "eval/.placed.json")
Case = tuple[str, str, str, Callable[[], str]]  # command, fault, place, what is done → the verdict


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="do only every N-th case")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--keep", action="store_true", help="write results/faults.{json,md}")
    parser.add_argument("--only", help="one command, or `damage`")
    arguments = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = build_shim(Path(folder))
            environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
            sys.exit(
                os.spawnve(os.P_WAIT, sys.executable, [sys.executable, *sys.argv], environment)
            )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        try:
            rows = run_all(lab, arguments.every, arguments.jobs, arguments.only)
        finally:
            lab.close()
    bad = [row for row in rows if row["verdict"] not in ("same", "noticed")]
    report(rows, bad, time.monotonic() - started, arguments.keep)
    sys.exit(1 if bad else 0)


def run_all(lab: Lab, every: int, jobs: int, only: str | None) -> list[dict]:
    finished: dict[str, Path] = {}  # by command: the run in which that is the last one done
    expected: dict[str, dict] = {}
    run = lab.folder / "finished"
    for command in COMMANDS:
        outcome = lab.run(command, run)
        assert outcome.code == 0, outcome.err
        finished[command] = shutil.copytree(run, lab.folder / f"finished-{command}")
        expected[command] = lab.results(run)
    cases: list[Case] = []
    for number, command in enumerate(COMMANDS):
        if only in (None, command):
            before = finished[COMMANDS[number - 1]] if number else None
            cases += faults_of(lab, command, before, expected[command])
    if only in (None, "damage"):
        cases += damages_of(lab, run, expected["push"])
    random.Random(0).shuffle(cases)
    chosen = cases[::every]
    print(f"{len(chosen)} of {len(cases)} cases", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(_do, chosen))


def _do(case: Case) -> dict:
    command, fault, place, act = case
    row = {"command": command, "fault": fault, "place": place, "verdict": act()}
    if row["verdict"] not in ("same", "noticed"):
        print(row, flush=True)
    return row


def faults_of(lab: Lab, command: str, before: Path | None, expected: dict) -> Iterator[Case]:
    """Every fault at every operation of a command."""
    run = _copy(lab, before)
    disk = Disk.of(run)
    journal = lab.folder / f"journal-{command}"
    journal.mkdir()
    counts = lab.run(command, run, journal=journal).counts
    for in_thread, count in enumerate(counts):
        act = partial(fault, lab, command, before, expected, in_thread=bool(in_thread))
        for number in range(count):
            place = f"{number} of a thread" if in_thread else str(number)
            yield command, "kill", place, partial(act, kill=number)
            for name, error in ERRORS.items():
                yield command, name, place, partial(act, fail=number, error=error)
    for number, state in after_power_cuts(disk, journal):
        act = partial(power_cut, lab, command, state, run, expected)
        yield command, "power cut", str(number), act


def _copy(lab: Lab, before: Path | None) -> Path:
    run = lab.new_folder()
    if before is not None:
        shutil.copytree(before, run)
    return run


def fault(lab: Lab, command: str, before: Path | None, expected: dict, **what: int) -> str:
    run = _copy(lab, before)
    outcome = lab.run(command, run, **what)
    if "Traceback" in outcome.err or outcome.code not in (0, 2, -9):
        return f"exit {outcome.code}: {_last(outcome)}"
    return again(lab, command, run, expected)


def power_cut(lab: Lab, command: str, state: dict, folder: Path, expected: dict) -> str:
    run = lab.new_folder()
    write_state(state, folder, run)
    return again(lab, command, run, expected)


def again(lab: Lab, command: str, run: Path, expected: dict) -> str:
    """The same command without a fault: "same", or what is wrong."""
    outcome = lab.run(command, run)
    found = lab.results(run)
    lab.remove(run)
    if outcome.code:
        return f"given again: exit {outcome.code}: {_last(outcome)}"
    differ = {
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    }
    return f"given again: differs in {', '.join(sorted(differ))}" if differ else "same"


def damages_of(lab: Lab, finished: Path, expected: dict) -> Iterator[Case]:
    """Every damage to every file of the finished run."""
    for path in sorted(finished.rglob("*")):
        if path.is_file() and path.stat().st_size:
            name = str(path.relative_to(finished))
            for damage in DAMAGES:
                yield "all", damage, name, partial(damaged, lab, finished, name, damage, expected)


def damaged(lab: Lab, finished: Path, name: str, damage: str, expected: dict) -> str:
    """Whether a command notices, or all results are the same; "silent" is what must not be."""
    run = _copy(lab, finished)
    DAMAGES[damage](run / name)
    for command in COMMANDS:
        outcome = lab.run(command, run)
        if "Traceback" in outcome.err or outcome.code not in (0, 2):
            return f"{command}: exit {outcome.code}: {_last(outcome)}"
        if outcome.code == 2:
            lab.remove(run)
            return "noticed"
    found = lab.results(run)
    lab.remove(run)
    published = {key for key in expected if key.startswith("hub/")}
    differ = {key for key in published | {name} if expected.get(key) != found.get(key)}
    differ -= {name} if name.startswith(UNREAD) else set()
    return f"silent: differs in {', '.join(sorted(differ))}" if differ else "same"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _last(outcome: Outcome) -> str:
    return (outcome.err.strip().splitlines() or [""])[-1][:300]


def report(rows: list[dict], bad: list[dict], seconds: float, keep: bool) -> None:
    """Prints the table, and writes the results if they are to be kept."""
    counts = Counter((row["command"], row["fault"]) for row in rows)
    verdicts = Counter((row["command"], row["fault"], row["verdict"]) for row in rows)
    lines = [
        "| command | fault | cases | same bytes | noticed | wrong |",
        "|---|---|---|---|---|---|",
    ]
    for key, count in sorted(counts.items()):
        same, noticed = (verdicts[(*key, verdict)] for verdict in ("same", "noticed"))
        wrong = count - same - noticed
        lines.append(f"| {' | '.join(key)} | {count} | {same} | {noticed} | {wrong} |")
    table = "\n".join(lines)
    print(f"{table}\n{len(rows)} cases, {len(bad)} wrong, {seconds:.0f} s")
    if keep:
        from common import write_results

        done = [
            {"command": command, "fault": fault, "verdict": verdict, "cases": cases}
            for (command, fault, verdict), cases in verdicts.items()
        ]
        write_results(
            "faults", "Faults at every operation on files, and damaged files", done, table
        )


if __name__ == "__main__":
    main()
