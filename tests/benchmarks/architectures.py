"""Every causal architecture of the installed transformers through the product, beside transformers.

    python tests/benchmarks/architectures.py [KIND …]    half an hour on two cores

A small random checkpoint of each is trained, sampled, merged and shown by the product's commands;
the figures are compared with those of tests/plain.py, a pass a sequence. The table says which
ones agree, which ones are refused and how, and which ones have no small checkpoint here.
"""

import os
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import transformers  # noqa: E402
from conftest import train_tokenizer  # noqa: E402
from zoo import compare, families  # noqa: E402

SECONDS = 120  # for one architecture
PROCESSES = 2
RESULTS = TESTS / "benchmarks/results/architectures.md"


def examine(kind):
    """(the architecture, what becomes of it, details)."""
    try:
        with tempfile.TemporaryDirectory() as folder, families.time_limit(SECONDS):
            found = compare.examine(kind, Path(folder), train_tokenizer())
    except families.NotBuiltError as reason:
        return kind, "left out", str(reason)
    except (Exception, TimeoutError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return kind, "FAULT", f"{type(error).__name__} at {where}: {error}"
    if found.faults:
        return kind, "FAULT", f"{len(found.faults)} figures: {found.faults[0]}"
    if found.refused:
        return kind, "refused", found.refused
    return kind, "agrees", found.layout


def main(kinds):
    rows = []
    with ProcessPoolExecutor(PROCESSES, max_tasks_per_child=20) as pool:
        for kind, outcome, details in pool.map(examine, kinds):
            details = " ".join(details.split())[:160].replace("|", "/")
            rows.append((kind, outcome, details))
            print(kind, outcome, details, sep=" | ", flush=True)
    counts = {name: sum(row[1] == name for row in rows) for name in sorted({r[1] for r in rows})}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(summary)
    if kinds == families.KINDS:
        lines = [f"| {kind} | {outcome} | {details} |" for kind, outcome, details in rows]
        version = transformers.__version__
        head = f"{len(rows)} causal architectures of transformers {version}: {summary}."
        table = ["| architecture | outcome | layout, or why |", "| --- | --- | --- |", *lines]
        RESULTS.write_text("\n".join([head, "", *table, ""]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or families.KINDS)
