"""Every causal architecture of the installed transformers through the product, beside transformers.

    python tests/benchmarks/architectures.py [KIND …]    a quarter of an hour on two cores

Each architecture has a process of its own, which may end in any way. A small random checkpoint of
it is trained, sampled, merged and shown by the product's commands; the figures are compared with
those of tests/plain.py, a pass a sequence. The table says which ones agree, which ones are refused
and how, and which ones have no small checkpoint here.
"""

import multiprocessing
import os
import sys
import tempfile
import textwrap
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import transformers  # noqa: E402
from conftest import train_tokenizer  # noqa: E402
from zoo import compare, families  # noqa: E402

SECONDS = 900  # for one architecture
PROCESSES = 2
BESIDE = multiprocessing.get_context("forkserver")
BESIDE.set_forkserver_preload(["transformers", "peft", "zoo.compare", "tbpo_cli.train.loop"])
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
    without = "; losses with a state baseline are refused: its head is not linear"
    return kind, "agree", found.layout + without * found.no_baseline


def send(kind, pipe):
    pipe.send(examine(kind))


def in_a_process(kind):
    """What `examine` gives, by a process of its own."""
    ours, theirs = BESIDE.Pipe(duplex=False)
    process = BESIDE.Process(target=send, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS + 60):
            return ours.recv()
        return kind, "FAULT", f"it takes more than {SECONDS} s, and cannot be stopped from within"
    except EOFError:
        process.join()
        return kind, "FAULT", f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def main(kinds):
    rows = []
    with ThreadPoolExecutor(PROCESSES) as pool:
        for kind, outcome, details in pool.map(in_a_process, kinds):
            details = textwrap.shorten(details, 160, placeholder=" …").replace("|", "/")
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
