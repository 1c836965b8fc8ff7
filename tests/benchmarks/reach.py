"""Which test reaches which line of the package: collected once by coverage, and kept."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from forks import KEPT, SNAPSHOT, Job, run_jobs, run_pytest

LEFT_OUT = {
    # Rules about the text of the package, and a wheel of it, say nothing about what it does.
    "test_house.py",
    "test_package.py",
    # These start commands in processes of their own, whose lines are not seen here.
    "test_processes.py",
    "test_push.py",
    "test_readme.py",
    "test_terminal.py",
}
LONGEST_FILE = 1800  # seconds


@dataclass(frozen=True)
class Reach:
    """What the tests reach.

    Args:
        lines: by file of the package: by line: the tests that run it.
        imported: by file: the lines that run when it is imported.
        seconds: by test: what it takes.
    """

    lines: dict[str, dict[int, set[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )
    imported: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    seconds: dict[str, float] = field(default_factory=dict)

    def tests_of(self, file: str, lines: tuple[int, int]) -> list[str]:
        """The tests that run a statement; if an import does, those of the file.

        The fastest of each test file come first, then the second fastest of each, and so on: what
        one file does not look at, another may.
        """
        numbers = range(lines[0], lines[1] + 1)
        by_line = self.lines[file]
        found = set().union(*(by_line[number] for number in numbers if number in by_line))
        if self.imported[file] & {*numbers}:
            found = found.union(*by_line.values())
        fastest = sorted(found, key=lambda test: (self.seconds[test], test))
        of_file: Counter[str] = Counter()
        turn = {}
        for test in fastest:
            name = test.partition("::")[0]
            turn[test] = of_file[name]
            of_file[name] += 1
        return sorted(fastest, key=turn.__getitem__)


def reach(files: list[str], copies: list[Path]) -> Reach:
    """Runs each test file that has changed, or that reaches one of `files` which has changed."""
    names = [path.name for path in sorted((SNAPSHOT / "tests").glob("test_*.py"))]
    names = [name for name in names if name not in LEFT_OUT]
    stale = [name for name in names if not _is_fresh(name, files)]
    run_jobs(_jobs(stale), copies)
    known = Reach()
    for name in names:
        found = json.loads((KEPT / f"{name}.json").read_text("utf-8"))
        for file, lines in found["lines"].get("", {}).items():
            known.imported[file].update(lines)
        for test, about in found["tests"].items():
            known.seconds[test] = about["seconds"]
            for context in about["contexts"]:
                for file, lines in found["lines"].get(context, {}).items():
                    for line in lines:
                        known.lines[file][line].add(test)
    return known


def _jobs(names: list[str]) -> Iterator[Job]:
    for number, name in enumerate(names, 1):

        def work(copy: Path, name: str = name) -> int:
            return _collect(copy, name)

        def done(code: int | None, seconds: float, name: str = name, number: int = number) -> None:
            print(f"[{number}/{len(names)}] tests/{name}: {seconds:.0f} s", flush=True)
            if code != 0:
                sys.exit(f"tests/{name} could not be run: see {KEPT}/copy-*/output.txt")

        yield Job(work, done, LONGEST_FILE, {})


def _collect(copy: Path, test_file: str) -> int:
    """Runs a test file under coverage, and keeps which of its tests run which lines."""
    import coverage

    repository = copy / "repository"
    measured = coverage.Coverage(
        data_file=None, source=[str(repository / "tbpo_cli")], config_file=False, messages=False
    )
    contexts = Contexts(measured)
    measured.start()
    code = run_pytest(copy, [f"tests/{test_file}"], (contexts,))
    measured.stop()
    if code not in (0, 1):  # 1: some tests fail, and are left out
        return code
    data = measured.get_data()
    lines: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path in data.measured_files():
        file = str(Path(path).relative_to(repository))
        for line, names in data.contexts_by_lineno(path).items():
            for name in names:
                lines[name][file].append(line)
    files = {file for by_file in lines.values() for file in by_file} | {f"tests/{test_file}"}
    tests = {name: test for name, test in contexts.tests.items() if test["passed"]}
    found = {"tests": tests, "lines": lines, "digests": {file: _digest(file) for file in files}}
    (KEPT / f"{test_file}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


class Contexts:
    """A pytest plugin that tells coverage which test runs, or which fixture of several tests."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.names: list[str] = []
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._enter(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self._leave()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        fixtures = [f"fixture {name}" for name in getattr(item, "fixturenames", ())]
        self.tests[item.nodeid] = {
            "seconds": 0.0,
            "passed": True,
            "contexts": [item.nodeid, *fixtures],
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.tests:  # not one that a mark skips
            self.tests[report.nodeid]["seconds"] += report.duration
            self.tests[report.nodeid]["passed"] &= report.passed

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        self._enter(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self._leave()

    def _enter(self, name: str) -> None:
        self.names.append(name)
        self.coverage.switch_context(name)

    def _leave(self) -> None:
        self.names.pop()
        self.coverage.switch_context(self.names[-1] if self.names else "")


def _digest(file: str) -> str:
    path = SNAPSHOT / file
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def _is_fresh(test_file: str, files: list[str]) -> bool:
    path = KEPT / f"{test_file}.json"
    if not path.exists():
        return False
    digests = json.loads(path.read_text("utf-8"))["digests"]
    now = {file: _digest(file) for file in (f"tests/{test_file}", *files) if file in digests}
    return all(digests[file] == digest for file, digest in now.items())
