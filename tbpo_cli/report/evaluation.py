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

import numpy as np

from tbpo_cli import console
from tbpo_cli.evaluation.measures import DIVERSITY, MEASURES, PREFERENCE, SCORE
from tbpo_cli.report.charts import Panel, Series, curves, histogram
from tbpo_cli.report.pages import write_page

MAX_ROWS = 300
NUM_SHOWN = 6  # columns of the win rates in the terminal: up to the losses
WON = (
    "raw",
    "length_controlled",
    "wins",
    "ties",
    "losses",
    "unreadable",
    "inconsistent",
)  # of a win rate's entry
COST = ("prompt_tokens", "completion_tokens", "cost")
LABELS = MEASURES | {
    "raw": ("win rate", "{:.1%}"),
    "cost": ("cost", "{:.2f}"),
    "loss": ("loss", "{}"),
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
BY_LENGTH = (("accuracy", "share of pairs"), ("entropy", "nats a token"))
IDEAL = Series([(0.5, 0.5), (1, 1)], None, line=1)
ORIGIN = {"value": 0.0, "low": 0.0, "high": 0.0}  # the reference's distance from itself

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
    main = next(
        map(_kind, results["win_rates"]), None
    )  # the comparison that the samples are ordered by
    rows = _rows(samples, verdicts, main)
    ranked = sorted(
        range(len(rows)), key=lambda n: 0.5 if rows[n]["verdict"] is None else rows[n]["verdict"]
    )
    kept = sorted(ranked[: MAX_ROWS // 2] + ranked[MAX_ROWS // 2 :][-MAX_ROWS // 2 :])
    write_page(
        path,
        "eval.html",
        title=f"Evaluation of {results['run']}",
        results=results,
        colours={name: number for number, name in enumerate(results["models"])},
        tables=tables(results),
        panels=_charts(
            results["models"], samples, [v for v in verdicts if _kind(v) == main], metrics
        ),
        training=curves(metrics),
        rows=[rows[n] | {"pieces": _pieces(rows[n]["samples"])} for n in kept],
        num_rows=len(rows),
    )


def show(results: Json) -> None:
    """Prints the verdict and the tables of models and win rates, in 80 characters: intervals where
    there is room.
    """
    (title, headings, rows), _, *of_models = tables(results)[
        : -len(results["models"])
    ]  # without those by length
    for name, heads, lines in (table for table in of_models if table[2]):
        cells = [[_text(cell, len(lines) < 3) for cell in line] for line in [heads, *lines]]
        first, *others = (list(column) for column in zip(*cells, strict=True))
        console.show_table(name, first, others)
    if rows:
        console.show_table(
            title, headings[:NUM_SHOWN], [[_text(cell) for cell in row[:NUM_SHOWN]] for row in rows]
        )
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
    models, rates = results["models"], results["win_rates"]
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
    found = [
        ("Win rates", *_table(WON + COST, by_kind)),
        ("Methods", *_table(METHODS, known if len(models) > 2 else {})),
        ("Held-out pairs", *_table(PREFERENCE, known)),
        ("Diversity", *_table(SCORE | DIVERSITY, known)),
    ]
    for suite in dict.fromkeys(suite for model in models.values() for suite in model["suites"]):
        of_suite = {name: model["suites"].get(suite, {}) for name, model in models.items()}
        tasks = dict.fromkeys(task for figures in of_suite.values() for task in figures)
        found.append((suite, *_table(tasks, of_suite)))
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


def _charts(
    models: Json, samples: list[Json], verdicts: list[Json], metrics: list[Json]
) -> list[Panel]:
    pairs = [model["preference"] for model in models.values()]  # their places are the colours
    way = [
        (line["kl"], line["margin"])
        for line in metrics
        if line["split"] == "eval" and "margin" in line
    ]
    ends = [_crossing(*(of["all"].get(name, ORIGIN) for name in ("kl", "margin"))) for of in pairs]
    bins = [[(bin["predicted"], bin["observed"]) for bin in of["reliability"]] for of in pairs]
    frontier = [
        Series(way, line=1, dots=1.5),
        *(Series([end], colour, dots=4) for colour, end in enumerate(ends)),
    ]
    reliability = [Series(points, colour, line=1.5, dots=3) for colour, points in enumerate(bins)]
    panels = [
        Panel("reward margin", "nats", "KL from the reference, nats a token", frontier),
        Panel("reliability", "share of pairs", "predicted by σ(|margin|)", [IDEAL, *reliability]),
    ]
    for metric, unit in BY_LENGTH:
        buckets = [
            [_of_bucket(b, metric) for b in of["buckets"] if metric in b["metrics"]] for of in pairs
        ]
        series = [Series(points, colour, line=1, dots=3) for colour, points in enumerate(buckets)]
        panels.append(Panel(metric, unit, "tokens of the pair's longer response", series))
    lengths = [(sample["model"], len(sample["token_ids"])) for sample in samples]
    scores = [
        pair
        for v in verdicts
        for pair in zip((v["model"], v["against"]), v["scores"] or (), strict=False)
    ]
    for title, values in (("length, tokens", lengths), ("score", scores)):
        of_models = [
            np.array([value for name, value in values if name == model]) for model in models
        ]
        if any(map(len, of_models)):
            panels.append(
                histogram(
                    title,
                    "completions",
                    title,
                    {c: of for c, of in enumerate(of_models) if len(of)},
                )
            )
    return panels


def _crossing(x: Json, y: Json) -> tuple[float, ...]:
    return x["value"], y["value"], x["low"], x["high"], y["low"], y["high"]


def _of_bucket(bucket: Json, metric: str) -> tuple[float, ...]:
    low, high = bucket["shortest"], bucket["longest"]
    return _crossing(
        {"value": (low + high) / 2, "low": low, "high": high}, bucket["metrics"][metric]
    )


def _rows(samples: list[Json], verdicts: list[Json], main: tuple[str, ...] | None) -> list[Json]:
    """The samples of one prompt and number side by side, with what was judged of them."""
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
    return list(rows.values())


def _pieces(samples: dict[str, Json]) -> dict[str, list[tuple[bool, str]]]:
    """Completions in pieces, those marked that differ: the reference's from the policy's, all
    others from its.
    """
    texts = {name: sample["completion"] for name, sample in samples.items()}
    pieces = {name: [(False, text)] for name, text in texts.items()}
    others = [name for name in texts if "reference" in texts and name != "reference"]
    for name in sorted(others, key=lambda name: name == "policy"):
        pieces["reference"], pieces[name] = _compared(texts["reference"], texts[name])
    return pieces


def _compared(before: str, after: str) -> tuple[list[tuple[bool, str]], ...]:
    """Both texts in pieces of words, those marked that the other does not have there."""
    old, new = (re.findall(r"\w+\s*|[^\w\s]\s*|\s+", text) for text in (before, after))
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new])
    pieces = [
        (tag != "equal", ("".join(old[a:b]), "".join(new[c:d])))
        for tag, a, b, c, d in matcher.get_opcodes()
    ]
    return tuple(
        [(differs, texts[side]) for differs, texts in pieces if texts[side]] for side in (0, 1)
    )
