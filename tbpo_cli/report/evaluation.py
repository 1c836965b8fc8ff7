"""What a person sees of `tbpo eval`: tables in the terminal; report.html with charts and the
samples side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from operator import itemgetter
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.evaluation.measures import DIVERSITY, MEASURES, PREFERENCE, SCORE, setting_of
from tbpo_cli.report import rounds
from tbpo_cli.report.charts import curves
from tbpo_cli.report.evaluation_charts import panels_of
from tbpo_cli.report.pages import write_page

MAX_ROWS = 300
MAX_COLUMNS = 10  # of a table, with its first one, on a page 1,200 pixels wide
# Of a win rate's entry: who won, and how the judge answered.
WON = ("raw", "length_controlled", "wins", "ties", "losses")
JUDGED = (
    "unreadable",
    "unread",
    "asked",
    "inconsistent",
    "unlike_repeats",
    "prompt_tokens",
    "completion_tokens",
    "cost",
)
TESTS = "Paired tests"
JUDGES = "Verdicts of the judges"  # a table of the page alone
LABELS = MEASURES | {
    "raw": ("win rate", "{:.1%}"),
    "cost": ("cost", "{:.2f}"),
    "unread": ("questions without a readable answer", "{}"),
    "asked": ("questions asked", "{}"),
    "inconsistent": ("other verdict in the other order", "{:.1%}"),
    "unlike_repeats": ("repeats unlike the others", "{:.1%}"),
    "loss": ("loss", "{}"),
    "difference": ("difference", "{:+.1%}"),
    "p": ("p", "{:.4f}"),
    "p_holm": ("p, after Holm", "{:.4f}"),
}
METHODS = (
    "loss",
    "raw",
    "length_controlled",
    "score",
    "accuracy",
    "margin",
    "kl",
    "entropy",
    "length",
)
TESTED = ("difference", "p", "p_holm")

Json = dict[str, Any]
_kind = itemgetter(
    "model", "against", "judge"
)  # of a win rate or a verdict: who is compared with whom by which judge


def write_report(
    path: Path, results: Json, samples: list[Json], verdicts: list[Json], metrics: list[Json]
) -> None:
    """Writes the page of results.json, the samples of all models, verdicts.jsonl, and
    align/metrics.jsonl.
    """
    results, samples, verdicts = _with_names(results, samples, verdicts)
    main = next(
        map(_kind, results["win_rates"]), None
    )  # the comparison that the samples are ordered by
    own = next(iter(results["models"]))  # the policy
    rows = _rows(samples, verdicts, main, own)
    write_page(
        path,
        "eval.html",
        title=f"Evaluation of {results['run']}",
        results=results,
        about={"loss": results["loss"], **results["training"], "evaluated on": results["date"]},
        colours={name: number for number, name in enumerate(results["models"])},
        tables=[_upright(*table) for table in tables(results)],
        bars=_bars(results["win_rates"]),
        panels=panels_of(
            results, samples, [line for line in verdicts if _kind(line) == main], metrics
        ),
        training=curves(metrics),
        rounds=_rounds(results.get("rounds", [])),
        rows=[row | {"pieces": _pieces(row["samples"], own)} for row in _kept(rows)],
        num_rows=len(rows),
    )


def _rounds(entries: list[Json]) -> Json:
    """What the page shows of rounds; empty without them."""
    if not entries:
        return {}
    warnings = rounds.warnings_of(entries)
    headings, rows = rounds.table_of(entries)
    panels = rounds.panels_of(entries)
    reference = rounds.reference_of(entries)
    return {
        "headings": headings,
        "rows": rows,
        "warnings": warnings,
        "panels": panels,
        "reference": reference,
    }


def _with_names(
    results: Json, samples: list[Json], verdicts: list[Json]
) -> tuple[Json, list[Json], list[Json]]:
    """The same, with the names of models that a person reads."""
    names = results.get("names", {})

    def renamed(entry: Json) -> Json:
        return entry | {
            key: names.get(entry[key], entry[key]) for key in ("model", "against") if key in entry
        }

    models = {names.get(name, name): model for name, model in results["models"].items()}
    results = results | {"models": models}
    for key in ("win_rates", "tests"):
        results[key] = [renamed(entry) for entry in results.get(key, [])]
    return results, [renamed(one) for one in samples], [renamed(one) for one in verdicts]


def show(results: Json) -> None:
    """Prints the verdict and the tables of models and win rates, in 80 characters, with intervals
    where they fit.
    """
    results, _, _ = _with_names(results, [], [])
    without_lengths = tables(results)[: -len(results["models"])]
    (title, headings, rows), *of_models = without_lengths
    for name, heads, lines in (table for table in of_models if table[2] and table[0] != JUDGES):
        if name == TESTS:  # of which there are more than columns that fit
            console.show_table(name, heads, [[_text(cell) for cell in line] for line in lines])
            continue
        cells = [[_text(cell, len(lines) < 3) for cell in line] for line in [heads, *lines]]
        first, *others = (list(column) for column in zip(*cells, strict=True))
        console.show_table(name, first, others)
    if rows:
        console.show_table(title, headings, [[_text(cell) for cell in row] for row in rows])
    console.show(f"\n{results['verdict']}.")


def _text(cell: Json | str, with_interval: bool = True) -> str:
    if isinstance(cell, str):
        return cell
    is_shown = with_interval and cell["interval"]
    return str(cell["value"]) + (f" ({cell['interval'].replace(' to ', '–')})" if is_shown else "")


def tables(results: Json) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Title, headings and rows of each table, last the pairs by length; figures are {"value",
    "interval", "n"}.
    """
    models = results["models"]
    rates = results["win_rates"]
    known = {
        name: {
            **model["preference"]["all"],
            **model["diversity"],
            "score": model["score"],
            "loss": model["loss"],
        }
        for name, model in models.items()
    }
    for rate in (rate for rate in rates if _kind(rate)[1:] == _kind(rates[0])[1:]):
        known[rate["model"]] |= rate
    by_kind = {"{} – {}, by {}".format(*_kind(rate)): rate for rate in rates}
    tests = {
        "{} – {}, {}".format(*itemgetter("model", "against", "measure")(test)): test
        for test in results.get("tests", [])
    }
    found = [
        ("Win rates", *_table(WON, by_kind)),
        ("Methods", *_table(METHODS, known if len(models) > 2 else {})),
        (TESTS, *_table(TESTED, tests if len(tests) > 1 else {})),
        (JUDGES, *_table(JUDGED, by_kind if _says_more(rates) else {})),
        ("Held-out pairs", *_table(PREFERENCE, known)),
        ("Diversity", *_table(SCORE | DIVERSITY, known)),
    ]
    for suite in dict.fromkeys(suite for model in models.values() for suite in model["suites"]):
        of_suite = {name: model["suites"].get(suite, {}) for name, model in models.items()}
        tasks = dict.fromkeys(task for figures in of_suite.values() for task in figures)
        found.append((f"{suite}, {setting_of(suite)}", *_table(tasks, of_suite)))
    for name, model in models.items():
        buckets = {
            f"{b['shortest']} to {b['longest']}": b["metrics"]
            for b in model["preference"]["buckets"]
        }
        found.append(
            (
                f"Held-out pairs by tokens of the longer response: {name}",
                *_table(PREFERENCE, buckets),
            )
        )
    return found


def _says_more(rates: list[Json]) -> bool:
    """Whether a win rate has a figure of JUDGED beside the number of questions."""
    return any(rate.get(name) for rate in rates for name in JUDGED if name != "asked")


def _table(names: Iterable[str], known: dict[str, Json]) -> tuple[list[str], list[list[Any]]]:
    """A row for each key of what is known, a column for each name of which something is."""
    names = [name for name in names if any(of_row.get(name) for of_row in known.values())]
    labels = [LABELS.get(name, (name.replace("_", " "), "{:.1%}")) for name in names]
    rows = [
        [row, *map(_cell, map(of_row.get, names), (form for _, form in labels))]
        for row, of_row in known.items()
    ]
    return ["", *(label for label, _ in labels)], rows


def _cell(value: Any, form: str) -> Json | str:
    if not isinstance(value, dict):
        return (
            "–" if value is None else f"{value:,}" if isinstance(value, int) else form.format(value)
        )
    ends = {
        end: "" if value[end] is None else form.format(value[end]).replace("-", "−")
        for end in ("value", "low", "high")
    }
    interval = f"{ends['low'].rstrip('%')} to {ends['high']}" if ends["low"] else ""
    return {"value": ends["value"], "interval": interval, "n": value["n"]}


def _upright(
    title: str, headings: list[str], rows: list[list[Any]]
) -> tuple[str, list[str], list[list[Any]]]:
    """A table; one that is too wide for a page has its columns as rows."""
    if len(headings) <= MAX_COLUMNS or len(rows) > MAX_COLUMNS:
        return title, headings, rows
    turned = [list(line) for line in zip(headings, *rows, strict=True)]
    return title, turned[0], turned[1:]


def _bars(rates: list[Json]) -> list[Json | None]:
    """What is drawn of each win rate: its value and interval, in percent of the width."""
    ends = ("value", "low", "high")
    return [
        rate["raw"] and {end: round(min(max(100 * rate["raw"][end], 0), 100), 1) for end in ends}
        for rate in rates
    ]


def _kept(rows: list[Json]) -> list[Json]:
    """At most MAX_ROWS rows, those that changed most first.

    Of more, the worst and the best are kept; of the same verdict, those that changed most.
    """
    verdicts = [0.5 if row["verdict"] is None else row["verdict"] for row in rows]
    changes = [row["change"] for row in rows]
    worst = sorted(range(len(rows)), key=lambda n: (verdicts[n], -changes[n]))
    best = sorted(range(len(rows)), key=lambda n: (-verdicts[n], -changes[n]))
    in_turn = dict.fromkeys(place for pair in zip(worst, best, strict=True) for place in pair)
    kept = sorted([*in_turn][:MAX_ROWS], key=lambda n: (-changes[n], n))
    return [rows[n] for n in kept]


def _rows(
    samples: list[Json], verdicts: list[Json], main: tuple[str, ...] | None, own: str
) -> list[Json]:
    """The samples of one prompt and number side by side, with what was judged of them, and by how
    much the policy's completion differs from the reference's.
    """
    rows: dict[Any, Json] = {}
    for sample in samples:
        empty: Json = {
            "messages": (),
            "samples": {},
            "verdicts": [],
            "verdict": None,
            "score": None,
        }
        row = rows.setdefault((sample["prompt_id"], sample["sample"]), empty)
        row["messages"] = sample.get("messages") or row["messages"]
        row["samples"][sample["model"]] = sample
    for verdict in verdicts:
        row = rows[verdict["prompt_id"], verdict["sample"]]
        row["verdicts"].append(verdict)
        if _kind(verdict) == main:
            row |= {
                "verdict": verdict["verdict"],
                "score": verdict["scores"] and verdict["scores"][0],
            }
    for place, row in enumerate(rows.values()):
        row |= {"place": place, "change": _change(row["samples"], own)}
    return list(rows.values())


def _change(samples: dict[str, Json], own: str) -> float:
    """The share of the words of two completions that the other one does not have, 0 to 1."""
    if "reference" not in samples or own not in samples:
        return 0.0
    before, after = (samples[name]["completion"].split() for name in ("reference", own))
    return 1 - SequenceMatcher(None, before, after).quick_ratio()


def _pieces(samples: dict[str, Json], own: str) -> dict[str, list[tuple[bool, str]]]:
    """Completions in pieces, each with whether it differs.

    The reference is compared with the policy, and every other model with the reference.
    """
    texts = {name: sample["completion"] for name, sample in samples.items()}
    pieces = {name: [(False, text)] for name, text in texts.items()}
    others = [name for name in texts if "reference" in texts and name != "reference"]
    for name in sorted(others, key=lambda name: name == own):
        pieces["reference"], pieces[name] = _compared(texts["reference"], texts[name])
    return pieces


def _compared(before: str, after: str) -> tuple[list[tuple[bool, str]], ...]:
    """Both texts in pieces of words, each with whether the other text lacks it there."""
    old, new = (re.findall(r"\w+\s*|[^\w\s]\s*|\s+", text) for text in (before, after))
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new])
    pieces = [
        (tag != "equal", ("".join(old[a:b]), "".join(new[c:d])))
        for tag, a, b, c, d in matcher.get_opcodes()
    ]
    return tuple(
        [(differs, texts[side]) for differs, texts in pieces if texts[side]] for side in (0, 1)
    )
