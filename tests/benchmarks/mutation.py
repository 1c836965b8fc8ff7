"""Small faults in the package, one at a time: which does no test notice?

    python tests/benchmarks/mutation.py tbpo_cli/batch/layouts.py   # a changed file: minutes
    python tests/benchmarks/mutation.py tbpo_cli/batch --share 0.2  # a fifth, drawn at random
    python tests/benchmarks/mutation.py tbpo_cli --minutes 60       # as many as an hour allows
    python tests/benchmarks/mutation.py --survivors --seconds 60    # those of the table once more
    python tests/benchmarks/mutation.py --report                    # only the table

1. Each test file is run by itself under coverage; which test reaches which lines is kept in
   .benchmarks/mutation/. This takes 10 minutes on two CPU cores, once: later only the test files
   are run again that have changed, or that reach one of the given files which has changed.
2. Mutants of the given files are made: see mutants.py. With --share, a random sample of those of
   each file; with --minutes, those that come first in a random order, the same every time.
3. Each is put into a copy of the repository, where a forked process, which has the libraries
   already, runs the tests that reach its lines, the fastest of each test file first, as many as
   take --seconds together. A mutant is noticed if one fails, or if they take more than four times
   as long. With --survivors, only those of the table that nothing noticed and nobody explained.

Writes results/mutation.{json,md}: the given files anew, the others as they stand there. A "reason"
written beside a survivor in the JSON stays there. What only commands run that tests start in
processes of their own counts as not reached.

Why not mutmut or cosmic-ray: mutmut leaves out decorated functions and what is in no function, and
cannot sample; cosmic-ray starts Python, and so torch, for every mutant and runs all tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forks import KEPT, ROOT, SNAPSHOT, Job, make_copies, preload, run_jobs, run_pytest
from mutants import Mutant, mutants_of

RESULT = Path(__file__).parent / "results" / "mutation.json"
NOTICED_BEFORE = KEPT / "noticed.json"
LEAST_SECONDS, PATIENCE = 90, 4
NOT_REACHED, SURVIVED, NOTICED, TIMED_OUT = "not reached", "survived", "noticed", "timed out"
Row = dict[str, Any]


def main() -> None:
    arguments = parsed()
    rows = json.loads(RESULT.read_text("utf-8"))["rows"] if RESULT.exists() else []
    survivors = {key_of(row) for row in rows if is_open(row)}
    if arguments.survivors:
        files = sorted({file for file, _, _ in survivors})
        again: dict[tuple[str, str, str], Row] = {}
        for row in measured(files, arguments, survivors):
            if again.get(key_of(row), {}).get("outcome") != SURVIVED:  # two mutants may read alike
                again[key_of(row)] = row
        left = {key for file in files for key in keys_in(file)}
        rows = [row for row in rows if key_of(row) not in survivors - left]
        rows = [again.get(key_of(row), row) for row in rows]
    elif not arguments.report:
        files = [file for path in arguments.paths for file in python_files(path)]
        if not files:
            sys.exit("no Python file of the package is named: tbpo_cli/batch, for example")
        new = measured(files, arguments)
        reasons = {key_of(row): row["reason"] for row in rows if "reason" in row}
        for row in new:
            if row["outcome"] == SURVIVED and key_of(row) in reasons:
                row["reason"] = reasons[key_of(row)]
        rows = [row for row in rows if row["file"] not in files] + new
    write(sorted(rows, key=lambda row: (row["file"], row["line"])))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="files or folders of tbpo_cli")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants of each file")
    parser.add_argument("--minutes", type=float, help="of mutants; what is then left is not tried")
    parser.add_argument("--seconds", type=float, default=20.0, help="of tests for a mutant")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--again", action="store_true", help="also those noticed before")
    parser.add_argument("--survivors", action="store_true", help="of the table, with more tests")
    parser.add_argument("--report", action="store_true", help="write the table, run nothing")
    return parser.parse_args()


def python_files(path: str) -> list[str]:
    where = Path(path).resolve()
    found = sorted(where.rglob("*.py")) if where.is_dir() else [where]
    return [str(file.relative_to(ROOT)) for file in found if file.read_text("utf-8").strip()]


def key_of(row: Row) -> tuple[str, str, str]:
    return row["file"], row["function"], row["change"]


def keys_in(file: str) -> set[tuple[str, str, str]]:
    """Of the mutants that a file has now: what no longer stands there is no survivor."""
    made = mutants_of(file, (SNAPSHOT / file).read_text("utf-8"))
    return {(file, mutant.function, mutant.change) for mutant in made}


def is_open(row: Row) -> bool:
    return row["outcome"] == SURVIVED and "reason" not in row


def commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "tbpo_cli")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


# ------------------------------------------------------------------------------------ the mutants


def measured(
    files: list[str], arguments: argparse.Namespace, only: Collection[tuple[str, str, str]] = ()
) -> list[Row]:
    """A row for each mutant of the sample; with `only`, for those with these keys."""
    preload()
    from reach import reach

    copies = make_copies(arguments.workers)
    known = reach(files, copies)
    minutes = arguments.minutes or math.inf
    run = Run(known, arguments.seconds, commit(), time.monotonic() + 60 * minutes)
    if NOTICED_BEFORE.exists() and not arguments.again:
        run.noticed = json.loads(NOTICED_BEFORE.read_text("utf-8"))
    for file in files:
        made = mutants_of(file, (SNAPSHOT / file).read_text("utf-8"))
        count = round(len(made) * arguments.share)
        sample = sorted(random.Random(file).sample(range(len(made)), count))
        if only:
            keys = [(file, mutant.function, mutant.change) for mutant in made]
            sample = [number for number, key in enumerate(keys) if key in only]
        run.chosen += [(made[number], len(made)) for number in sample]
    if arguments.minutes:
        random.Random(0).shuffle(run.chosen)
    print(f"{len(run.chosen)} mutants", flush=True)
    run_jobs(run.jobs(), copies)
    return run.rows


@dataclass
class Run:
    """Tries the chosen mutants, and makes a row of each."""

    reach: Any
    seconds: float  # of tests for a mutant
    commit: str  # of the code, with a + if it has changes that are not committed
    end: float  # on the monotonic clock: no mutant is begun later
    chosen: list[tuple[Mutant, int]] = field(default_factory=list)  # each with how many were made
    noticed: dict[str, str] = field(default_factory=dict)  # digest of file and mutant: outcome
    rows: list[Row] = field(default_factory=list)

    def jobs(self) -> Iterator[Job]:
        for mutant, num_made in self.chosen:
            if time.monotonic() > self.end:
                break
            tests = self.reach.tests_of(mutant.file, mutant.lines)
            some = self.within(tests)
            row = {
                "file": mutant.file,
                "line": mutant.lines[0],
                "function": mutant.function,
                "change": mutant.change,
                "num_made": num_made,
                "commit": self.commit,
                "num_tests": len(some),
                "num_reaching": len(tests),
            }
            key = hashlib.sha256((mutant.file + mutant.source).encode()).hexdigest()
            if not tests:
                self.finish(row, NOT_REACHED)
            elif key in self.noticed:
                self.finish(row, self.noticed[key])
            else:
                yield self.job(mutant, some, row, key)

    def within(self, tests: list[str]) -> list[str]:
        """The first of the tests, as many as take no longer together; at least one."""
        total = 0.0
        some: list[str] = []
        for name in tests:
            total += self.reach.seconds[name]
            if some and total > self.seconds:
                break
            some.append(name)
        return some

    def job(self, mutant: Mutant, tests: list[str], row: Row, key: str) -> Job:
        def work(copy: Path) -> int:
            return run_pytest(copy, ["-x", "-q", *tests])

        def done(code: int | None, seconds: float) -> None:
            outcome = {None: TIMED_OUT, 0: SURVIVED}.get(code, NOTICED)
            if outcome != SURVIVED:
                self.noticed[key] = outcome
                NOTICED_BEFORE.write_text(json.dumps(self.noticed), encoding="utf-8")
            self.finish(row, outcome, seconds)

        expected = sum(self.reach.seconds[name] for name in tests)
        limit = LEAST_SECONDS + PATIENCE * expected
        return Job(work, done, limit, {mutant.file: mutant.source})

    def finish(self, row: Row, outcome: str, seconds: float = 0.0) -> None:
        self.rows.append({**row, "outcome": outcome, "seconds": round(seconds, 1)})
        if outcome == SURVIVED:
            print(f"{row['file']}:{row['line']}: {row['change']}", flush=True)
        if len(self.rows) % 25 == 0 or len(self.rows) == len(self.chosen):
            counts = Counter(row["outcome"] for row in self.rows)
            print(f"[{len(self.rows)}/{len(self.chosen)}] {dict(counts)}", flush=True)


# -------------------------------------------------------------------------------------- the table

ABOUT = """Small faults, one at a time, each tried against the tests that reach its lines: see the
first lines of tests/benchmarks/mutation.py. *Made*: all mutants of the file; *tried*: the random
sample of them. *By time*: the tests did not end in four times their time and 90 seconds.
*Unreached*: no test runs these lines in its own process; commands that tests start may.
*Explained*: of the survivors.
"""
HEADING = """| file | commit | made | tried | noticed | by time | survived | explained | unreached |
|---|---|---|---|---|---|---|---|---|"""
SURVIVORS = """
## Survivors

| where | change | tests run, of those that reach it | why |
|---|---|---|---|"""


def write(rows: list[Row]) -> None:
    from common import write_results

    by_file: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_file[row["file"].removeprefix("tbpo_cli/")].append(row)
    lines = [ABOUT, HEADING]
    lines += [line_of(file, some) for file, some in by_file.items()]
    lines += [line_of("all", rows), SURVIVORS]
    for file, some in by_file.items():
        for row in some:
            if row["outcome"] == SURVIVED:
                change = row["change"].replace("|", "\\|")
                lines.append(
                    f"| {file}:{row['line']} `{row['function']}` | `{change}` "
                    f"| {row['num_tests']} of {row['num_reaching']} | {row.get('reason', '')} |"
                )
    write_results("mutation", "Mutants", rows, "\n".join(lines))


def line_of(name: str, rows: list[Row]) -> str:
    counts = Counter(row["outcome"] for row in rows)
    made = sum({row["file"]: row["num_made"] for row in rows}.values())
    explained = sum("reason" in row for row in rows if row["outcome"] == SURVIVED)
    commits = " ".join(sorted({row["commit"] for row in rows}))
    cells = [
        commits,
        made,
        len(rows),
        counts[NOTICED],
        counts[TIMED_OUT],
        counts[SURVIVED],
        explained,
    ]
    return f"| {name} | {' | '.join(map(str, [*cells, counts[NOT_REACHED]]))} |"


if __name__ == "__main__":
    main()
