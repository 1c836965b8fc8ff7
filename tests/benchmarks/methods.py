"""Which loss, at what cost, and how easily found? A search for each on the quickstart's world.

    export OMP_NUM_THREADS=1
    python tests/benchmarks/methods.py --part 0/2 &
    python tests/benchmarks/methods.py --part 1/2 & wait
    python tests/benchmarks/methods.py --report    # results/methods.*; also while parts still run

Each loss's learning rate, β and, where it matches ratios, `min_ratio` are searched by search.py on
validation prompts: successive halving over seeds, with a wider grid where the best stands at an
edge. The best setting is then run with TEST_SEEDS and measured on new prompts. Last, the settings
that decide the score at KL_TARGETS get the seeds that they lack.

The order is such that a part of the runs is a part of the answer: the losses of METHODS side by
side, level by level, then the variants of variants.py, which ask what makes TDPO 2 win. A run is a
line of runs.jsonl, in the folder or, committed, of results/methods.jsonl, and is not made again: a
part may be stopped at any time, and another machine goes on from what is committed (`--report`
copies the folder's lines there). Parts wait for each other's runs where a next level needs them.
About 10 hours of a core in all (20 seconds a run), of which the eight losses take 5.3.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import search
import variants
from common import RESULTS
from quickstart_run import ROOT, measured, share_reference, tbpo, true_scores, write_prompts
from search import Axis, Grid, Point

COMMITTED = RESULTS / "methods.jsonl"
KEY = ("method", "min_ratio", "rate", "multiple", "seed", "split")
BASE = "the base"
TEST_SEEDS = tuple(range(1, 9))
KL_TARGETS = (0.1, 0.2, 0.4)
RATES = (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
MULTIPLES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
FLOORS = (0.0, 0.6, 0.8, 0.9)
WAIT_SECONDS = 5
Key = tuple[str, float, float, float, int, str]


@dataclass(frozen=True)
class Method:
    """A loss with the settings that are not searched.

    Args:
        fields: those of [align.loss] as an inline table's inside, without β and min_ratio.
        beta: the default β, of which multiples are searched.
        lowest: the smallest multiple of the first grid.
        has_floor: whether `min_ratio` is searched: the loss matches ratios and does not saturate.
        is_variant: whether it is of variants.py's question, which is asked second.
    """

    fields: str
    beta: float = 0.1
    lowest: float = 1.0
    has_floor: bool = False
    is_variant: bool = False

    @property
    def grid(self) -> Grid:
        """5 learning rates × 4 β, first without and then, where it is searched, with a floor."""
        place = MULTIPLES.index(self.lowest)
        floors = Axis("min_ratio", FLOORS, 0, 1 if self.has_floor else 0, open_below=False)
        return (floors, Axis("rate", RATES, 2, 6), Axis("β", MULTIPLES, place, place + 3))


def variant(fields: str, has_floor: bool = True) -> Method:
    return Method(f"name = '{variants.NAME}', {fields}", has_floor=has_floor, is_variant=True)


LOGISTIC = "generator = {name = 'logistic'}"
METHODS = {
    "tbpo_a": Method("name = 'tbpo_a'", has_floor=True),
    "tbpo_q": Method("name = 'tbpo_q'", has_floor=True),
    "dpo": Method("name = 'dpo'"),
    "tdpo 2": Method("name = 'tdpo', version = 2"),
    "ipo": Method("name = 'ipo'"),
    "simpo": Method("name = 'simpo'", beta=2.0, lowest=0.3),
    "dpo_norm": Method("name = 'dpo_norm'", beta=5.0, lowest=0.3),
    "apo_zero": Method("name = 'apo_zero'"),
    "A, stop-gradient": variant("stop_chosen = true"),
    "A, α 0.5": variant("alpha = 0.5"),
    "A, whole responses": variant("whole = true"),
    "A, logistic": variant(LOGISTIC, has_floor=False),
    "A, stop-gradient, α 0.5": variant("stop_chosen = true, alpha = 0.5"),
    "A, stop-gradient, α 0.5, logistic": variant(
        f"stop_chosen = true, alpha = 0.5, {LOGISTIC}", has_floor=False
    ),
    "tdpo 2, no stop-gradient": variant(f"whole = true, alpha = 0.5, {LOGISTIC}", has_floor=False),
    "tdpo 2, α 1": Method("name = 'tdpo', version = 2, alpha = 1.0", is_variant=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".benchmarks/methods", help="where the runs are kept"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="K/N", help="the K-th of N processes, from 0"
    )
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        from methods_report import report

        report(commit_runs(folder))
        return
    write_prompts(folder)
    share_reference()
    part, parts = map(int, arguments.part.split("/"))
    while due := due_runs(read_runs(folder)):
        mine = [key for key in due if zlib.crc32(repr(key).encode()) % parts == part]
        if mine:
            make_run(folder, mine[0])
        else:
            time.sleep(WAIT_SECONDS)


def read_runs(folder: Path) -> dict[Key, dict]:
    """All measured runs, committed or in the folder; a line that was cut short is left out."""
    runs = {}
    for path in (COMMITTED, folder / "runs.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            runs[tuple(row[name] for name in KEY)] = row
    return runs


def commit_runs(folder: Path) -> dict[Key, dict]:
    """Copies what the folder has to results/methods.jsonl, in an order that does not change."""
    runs = read_runs(folder)
    lines = [json.dumps(runs[key], ensure_ascii=False) + "\n" for key in sorted(runs)]
    COMMITTED.write_text("".join(lines), encoding="utf-8")
    return runs


def scores_of(runs: dict[Key, dict], method: str) -> dict[tuple[Point, int], float]:
    """The validation scores of a loss, by point and seed."""
    return {
        (key[1:4], key[4]): row["true_score"]
        for key, row in runs.items()
        if key[0] == method and key[5] == "validation"
    }


def places_of(runs: dict[Key, dict], method: str) -> dict[Point, tuple[float, float]]:
    """(KL, true score) of the points at which no run diverged: means over their seeds."""
    rows: dict[Point, list[dict]] = {}
    for key, row in runs.items():
        if key[0] == method and key[5] == "validation":
            rows.setdefault(key[1:4], []).append(row)
    return {
        point: (fmean(row["kl"] for row in found), fmean(row["true_score"] for row in found))
        for point, found in rows.items()
        if not any(row["diverged"] for row in found)
    }


def base_score(runs: dict[Key, dict], split: str) -> float:
    return runs[(BASE, 0.0, 0.0, 0.0, 0, split)]["true_score"]


def due_runs(runs: dict[Key, dict]) -> list[Key]:
    """The runs that can be made now, the most useful first: see the top of this file."""
    base = [(BASE, 0.0, 0.0, 0.0, 0, split) for split in ("validation", "new")]
    if missing := [key for key in base if key not in runs]:
        return missing
    due = [
        ((method.is_variant, level, place), key)
        for name, method in METHODS.items()
        for level, place, key in _due_of(name, method, runs)
    ]
    return [key for _, key in sorted(due, key=lambda item: item[0])]


def _due_of(name: str, method: Method, runs: dict[Key, dict]) -> Iterator[tuple[int, int, Key]]:
    """(level, runs made before it, run) of one loss; test runs after all levels."""
    scores = scores_of(runs, name)
    step = search.next_step(method.grid, scores)
    for place, (point, seed) in enumerate(step.due, len(scores)):
        yield step.level, place, (name, *point, seed, "validation")
    if step.due:
        return
    tests = [(name, *step.best, seed, "new") for seed in TEST_SEEDS]
    for place, key in enumerate(tests):
        if key not in runs:
            yield len(search.LEVELS), place, key
    if method.is_variant:
        return
    lacking = search.due_of_envelope(
        places_of(runs, name), base_score(runs, "validation"), KL_TARGETS, scores
    )
    for place, (point, seed) in enumerate(lacking):
        yield len(search.LEVELS) + 1, place, (name, *point, seed, "validation")


def make_run(folder: Path, key: Key) -> None:
    """One training and its measurement: a line of the folder's runs.jsonl."""
    method, min_ratio, rate, multiple, seed, split = key
    started = time.monotonic()
    directory = folder / f"run-{zlib.crc32(repr(key).encode()):08x}"
    shutil.rmtree(directory, ignore_errors=True)  # of a part that was stopped
    sets = [f"data.eval={folder}/held-out.jsonl", f"sample.prompts={folder / split}.jsonl"]
    sets += ["eval.opponents=['reference']"]
    row = dict(zip(KEY, key, strict=True)) | {"diverged": False}
    if method == BASE:
        tbpo("sample", directory, seed, *sets, "sample.models=['reference']")
        row |= {"kl": 0.0} | true_scores(directory / "sample/samples.jsonl", "reference")
    else:
        sets += [f"align.loss={loss_of(method, multiple, min_ratio)}"]
        sets += [f"align.learning_rate={rate}"]
        row |= measured(folder, directory, seed, sets, split)
    shutil.rmtree(directory)
    row["seconds"] = round(time.monotonic() - started, 1)
    with (folder / "runs.jsonl").open("a", encoding="utf-8") as runs:
        runs.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(*key, f"true score {row['true_score']:.3f}, {row['seconds']:.0f} s", flush=True)


def loss_of(method: str, multiple: float, min_ratio: float) -> str:
    """[align.loss] as an inline table."""
    about = METHODS[method]
    floor = f", min_ratio = {min_ratio}" if about.has_floor else ""
    return f"{{{about.fields}, beta = {about.beta * multiple:.6g}{floor}}}"


if __name__ == "__main__":
    main()
