"""Small faults in the package, one at a time: which does no test notice?

    python tests/benchmarks/mutation.py tbpo_cli/batch/layouts.py   # a changed file: minutes
    python tests/benchmarks/mutation.py tbpo_cli/batch --share 0.2  # a fifth, drawn at random
    python tests/benchmarks/mutation.py --report                    # only the table

1. Coverage: every test file is run once by itself, and the lines that each test reaches are kept
   in .benchmarks/mutation/ (15 minutes on two CPU cores the first time). It is run again when the
   file, or a file of the package that it reaches and that is given, has changed.
2. Mutants (see mutants.py) of the given files. With --share, a random sample, the same each time.
3. For each, in a copy of the repository and a forked process that has the libraries already: the
   tests that reach its lines, the fastest first, as many as take --seconds together. A failed test,
   or four times the time that the tests took before, is a mutant noticed.

Writes results/mutation.{json,md}: the given files anew, the others as they stand there. A "reason"
written beside a survivor in the JSON stays there. Only what the process of a test runs counts as
reached: lines that only commands started by tests run are listed as such.

Why not mutmut or cosmic-ray: mutmut leaves out decorated functions and what is in no function, and
cannot sample; cosmic-ray starts Python, and so torch, for every mutant and runs all tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
KEPT = ROOT / ".benchmarks" / "mutation"
RESULT = Path(__file__).parent / "results" / "mutation.json"
# Rules about the text of the package, and a wheel of it, say nothing about what it does.
LEFT_OUT = {"test_house.py", "test_package.py", "test_readme.py"}
LEAST_SECONDS, PATIENCE = 30, 4
NOT_REACHED, SURVIVED, NOTICED, TIMED_OUT = "not reached", "survived", "noticed", "timed out"


@dataclass(frozen=True)
class Job:
    """What a forked process does in a copy of the repository; `done` gets its exit code or None."""

    work: Callable[[Path], int]
    done: Callable[[int | None, float], None]
    limit: float  # seconds
    files: dict[str, str]  # path from the root: text, in place of what stands there


def main() -> None:
    arguments = parsed()
    rows = json.loads(RESULT.read_text("utf-8"))["rows"] if RESULT.exists() else []
    if not arguments.report:
        files = [file for path in arguments.paths for file in python_files(path)]
        if not files:
            sys.exit(f"no Python file of the package in {' '.join(arguments.paths) or 'nothing'}")
        preload()
        copies = [copy_of_the_repository(number) for number in range(arguments.workers)]
        tests = reached(files, copies)
        new = run_mutants(files, tests, copies, arguments)
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
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for a mutant")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--again", action="store_true", help="also those noticed before")
    parser.add_argument("--report", action="store_true", help="write the table, run nothing")
    return parser.parse_args()


def python_files(path: str) -> list[str]:
    where = Path(path).resolve()
    found = sorted(where.rglob("*.py")) if where.is_dir() else [where]
    return [str(file.relative_to(ROOT)) for file in found if file.read_text("utf-8").strip()]


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["file"], row["function"], row["change"]


# ------------------------------------------------------------------------------- forked processes


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


def copy_of_the_repository(number: int) -> Path:
    copy = KEPT / f"copy-{number}"
    shutil.rmtree(copy, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in files.splitlines():
        if (ROOT / file).is_file():
            (copy / "repository" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / "repository" / file)
    return copy


def run_jobs(jobs: Iterator[Job], copies: list[Path]) -> None:
    """Runs the jobs, one a copy at a time."""
    free, running = list(copies), {}
    while True:
        while free and (job := next(jobs, None)):
            copy = free.pop()
            running[start(job, copy)] = (job, copy, time.monotonic())
        if not running:
            return
        time.sleep(0.02)
        for process, (job, copy, since) in [*running.items()]:
            ended, status = os.waitpid(process, os.WNOHANG)
            seconds = time.monotonic() - since
            if ended or seconds > job.limit:
                end_group(process)
                if not ended:
                    os.waitpid(process, 0)
                for file in job.files:
                    shutil.copy(ROOT / file, copy / "repository" / file)
                job.done(os.waitstatus_to_exitcode(status) if ended else None, seconds)
                del running[process]
                free.append(copy)


def start(job: Job, copy: Path) -> int:
    for file, text in job.files.items():
        (copy / "repository" / file).write_text(text, encoding="utf-8")
    sys.stdout.flush()
    if process := os.fork():
        return process
    os.setsid()
    output = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(copy / "repository")
    sys.path.insert(0, str(copy / "repository"))
    os.environ.update(PYTHONPATH=str(copy / "repository"), PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    code = 1
    try:
        code = job.work(copy)
    finally:
        os._exit(code)


def end_group(process: int) -> None:
    """Ends the process and what it started, by their group."""
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def run_pytest(copy: Path, names: list[str], plugins: tuple[object, ...] = ()) -> int:
    import pytest

    options = ["-n0", "-p", "no:cacheprovider", "--basetemp", str(copy / "tmp")]
    return pytest.main([*options, *names], plugins=plugins)


# ----------------------------------------------------------------------- which test reaches a line


class Contexts:
    """A pytest plugin that names the test, or the fixture of several tests, that runs a line."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.names: list[str] = []
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.names = [nodeid]
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests.setdefault(report.nodeid, {"seconds": 0.0, "passed": True})
        test["seconds"] += report.duration
        test["passed"] &= report.outcome == "passed"

    def pytest_runtest_setup(self, item: Any) -> None:
        self.tests[item.nodeid] = {
            "seconds": 0.0,
            "passed": True,
            "fixtures": [f"fixture {name}" for name in item.fixturenames],
        }

    def shared_fixture(self, name: str) -> Iterator[Any]:
        self.names.append(f"fixture {name}")
        self.coverage.switch_context(self.names[-1])
        try:
            return (yield)
        finally:
            self.names.pop()
            self.coverage.switch_context(self.names[-1] if self.names else "")


def contexts_plugin(coverage: Any) -> Contexts:
    import pytest

    class Plugin(Contexts):
        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
            if fixturedef.scope == "function":
                return (yield)
            return (yield from self.shared_fixture(fixturedef.argname))

    return Plugin(coverage)


def collect(copy: Path, test_file: str, target: Path) -> int:
    """Runs a test file under coverage, and writes which of its tests reach which lines."""
    import coverage

    package = copy / "repository" / "tbpo_cli"
    measured = coverage.Coverage(
        data_file=None, source=[str(package)], config_file=False, messages=False
    )
    measured.start()
    plugin = contexts_plugin(measured)
    code = run_pytest(copy, [test_file], (plugin,))
    measured.stop()
    data = measured.get_data()
    lines: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for file in data.measured_files():
        for line, names in data.contexts_by_lineno(file).items():
            for name in names:
                lines[name][str(Path(file).relative_to(copy / "repository"))].append(line)
    tests = {
        name: {"seconds": round(test["seconds"], 3), "reached": [name, *test.get("fixtures", ())]}
        for name, test in plugin.tests.items()
        if test["passed"]
    }
    failed = [name for name in plugin.tests if name not in tests]
    found = {"tests": tests, "failed": failed, "lines": lines}
    target.write_text(json.dumps(found), encoding="utf-8")
    return 0 if code < 2 else code  # 2 and more: pytest itself came to no end


def reached(files: list[str], copies: list[Path]) -> dict[str, Any]:
    """Which tests reach the lines of the package.

    Returns:
        {"lines": {file: {line: tests}}, "imports": {file: lines that run when it is imported},
        "seconds": {test: what it takes}}.
    """
    names = [path.name for path in sorted((ROOT / "tests").glob("test_*.py"))]
    names = [name for name in names if name not in LEFT_OUT]
    kept = {name: KEPT / f"{name}.json" for name in names}
    stale = [name for name in names if not is_fresh(kept[name], name, files)]

    def jobs() -> Iterator[Job]:
        for number, name in enumerate(stale, 1):
            print(f"[{number}/{len(stale)}] which lines {name} reaches", flush=True)
            target = kept[name]

            def work(copy: Path, name: str = name, target: Path = target) -> int:
                return collect(copy, f"tests/{name}", target)

            def done(code: int | None, seconds: float, name: str = name) -> None:
                print(f"    {name}: {seconds:.0f} s", flush=True)
                if code != 0:
                    sys.exit(f"pytest tests/{name} could not be run: see {KEPT}/copy-*/output.txt")
                if failed := stamp(kept[name], name):
                    print(f"    left out, since they fail as it is: {failed}", flush=True)

            yield Job(work, done, 1800, {})

    run_jobs(jobs(), copies)
    by_line: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    imports: dict[str, set[int]] = defaultdict(set)
    seconds = {}
    for path in kept.values():
        if not path.exists():
            continue
        found = json.loads(path.read_text("utf-8"))
        for file, lines in found["lines"].get("", {}).items():
            imports[file].update(lines)
        for test, about in found["tests"].items():
            seconds[test] = about["seconds"]
            for context in about["reached"]:
                for file, lines in found["lines"].get(context, {}).items():
                    for line in lines:
                        by_line[file][line].add(test)
    return {"lines": by_line, "imports": imports, "seconds": seconds}


def digest(file: str) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16]


def stamp(path: Path, test_file: str) -> list[str]:
    """Notes of which files the lines are; returns the tests that failed."""
    found = json.loads(path.read_text("utf-8"))
    touched = {file for files in found["lines"].values() for file in files}
    found["digests"] = {file: digest(file) for file in {*touched, f"tests/{test_file}"}}
    path.write_text(json.dumps(found), encoding="utf-8")
    return found["failed"]


def is_fresh(path: Path, test_file: str, files: list[str]) -> bool:
    if not path.exists():
        return False
    digests = json.loads(path.read_text("utf-8")).get("digests", {})
    return all(
        digests[file] == digest(file)
        for file in {f"tests/{test_file}", *(file for file in files if file in digests)}
        if file in digests
    ) and bool(digests)


# ------------------------------------------------------------------------------------ the mutants


def run_mutants(
    files: list[str], tests: dict[str, Any], copies: list[Path], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each mutant of the sample."""
    from mutants import mutants_of

    noticed_path = KEPT / "noticed.json"
    noticed = json.loads(noticed_path.read_text("utf-8")) if noticed_path.exists() else {}
    chosen, rows = [], []
    for file in files:
        made = mutants_of(file, (ROOT / file).read_text("utf-8"))
        count = round(len(made) * arguments.share)
        sample = sorted(random.Random(file).sample(range(len(made)), count))
        chosen += [(made[number], len(made)) for number in sample]
    print(f"{len(chosen)} mutants", flush=True)

    def finish(row: dict[str, Any], outcome: str, seconds: float) -> None:
        rows.append({**row, "outcome": outcome, "seconds": round(seconds, 1)})
        counts = Counter(row["outcome"] for row in rows)
        if len(rows) % 20 == 0 or len(rows) == len(chosen):
            print(f"[{len(rows)}/{len(chosen)}] {dict(counts)}", flush=True)
        if outcome == SURVIVED:
            print(f"    {row['file']}:{row['line']}: {row['change']}", flush=True)

    def jobs() -> Iterator[Job]:
        for mutant, num_made in chosen:
            names = tests_of(mutant, tests)
            limited = within(names, tests["seconds"], arguments.seconds)
            row = {
                "file": mutant.file,
                "line": mutant.lines[0],
                "function": mutant.function,
                "change": mutant.change,
                "num_made": num_made,
                "num_tests": len(limited),
                "num_reaching": len(names),
            }
            key = hashlib.sha256((mutant.file + mutant.source).encode()).hexdigest()
            if not names:
                finish(row, NOT_REACHED, 0)
            elif key in noticed and not arguments.again:
                finish(row, noticed[key], 0)
            else:
                known = sum(tests["seconds"][name] for name in limited)

                def work(copy: Path, names: list[str] = limited) -> int:
                    return run_pytest(copy, ["-x", "-q", *names])

                def done(
                    code: int | None, seconds: float, row: dict[str, Any] = row, key: str = key
                ) -> None:
                    outcome = {None: TIMED_OUT, 0: SURVIVED}.get(code, NOTICED)
                    if outcome != SURVIVED:
                        noticed[key] = outcome
                        noticed_path.write_text(json.dumps(noticed), "utf-8")
                    finish(row, outcome, seconds)

                limit = LEAST_SECONDS + PATIENCE * known
                yield Job(work, done, limit, {mutant.file: mutant.source})

    run_jobs(jobs(), copies)
    return rows


def tests_of(mutant: Any, tests: dict[str, Any]) -> list[str]:
    """The tests that reach the lines; of lines that run at the import, all that reach the file."""
    first, last = mutant.lines
    lines = set(range(first, last + 1))
    by_line = tests["lines"][mutant.file]
    found = set().union(*(by_line[line] for line in lines if line in by_line))
    if lines & tests["imports"][mutant.file]:
        found = found.union(*by_line.values())
    return sorted(found, key=lambda name: (tests["seconds"][name], name))


def within(names: list[str], seconds: dict[str, float], most: float) -> list[str]:
    """The first tests, as many as take no longer than `most` seconds together; at least one."""
    total, some = 0.0, []
    for name in names:
        total += seconds[name]
        if some and total > most:
            break
        some.append(name)
    return some


# -------------------------------------------------------------------------------------- the table


def write(rows: list[dict[str, Any]]) -> None:
    from common import write_results

    by_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_file[row["file"]].append(row)
    parts = [
        "Small faults, one at a time, run against the tests that reach their lines (see the first "
        "lines of tests/benchmarks/mutation.py). *made*: all mutants of the file; *run*: those of "
        "the random sample that tests reach. *Not reached*: only commands that tests start in "
        "processes of their own, or no test, run these lines.\n",
        "| file | made | run | noticed | by time | survived | explained | not reached |\n"
        "|---|---|---|---|---|---|---|---|",
    ]
    parts += [line_of(file.removeprefix("tbpo_cli/"), some) for file, some in by_file.items()]
    parts += [line_of("all", rows)]
    parts += ["\n## Survivors\n", "| where | change | tests | why |\n|---|---|---|---|"]
    for row in rows:
        if row["outcome"] == SURVIVED:
            where = f"{row['file'].removeprefix('tbpo_cli/')}:{row['line']} `{row['function']}`"
            change = row["change"].replace("|", "\\|")
            tests = f"{row['num_tests']} of {row['num_reaching']}"
            parts.append(f"| {where} | `{change}` | {tests} | {row.get('reason', '')} |")
    write_results("mutation", "Mutants", rows, "\n".join(parts))


def line_of(name: str, rows: list[dict[str, Any]]) -> str:
    counts = Counter(row["outcome"] for row in rows)
    made = sum({row["file"]: row["num_made"] for row in rows}.values())
    explained = sum("reason" in row for row in rows if row["outcome"] == SURVIVED)
    cells = (
        made,
        len(rows) - counts[NOT_REACHED],
        counts[NOTICED],
        counts[TIMED_OUT],
        counts[SURVIVED],
        explained,
        counts[NOT_REACHED],
    )
    return f"| {name} | {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
