"""The rounds of a run, for a person: a table, charts, and what goes wrong."""

from __future__ import annotations

from typing import Any

from tbpo_cli.report.charts import Panel, Series, ends_of
from tbpo_cli.report.diagnoses import ROUNDS, diagnose
from tbpo_cli.report.facts import Facts

Json = dict[str, Any]

COLUMNS = {  # of an entry: the heading, and how a value is written
    "mark": ("mark", "{:.3f}"),
    "win_rate": ("wins against the first", "{:.1%}"),
    "length": ("tokens", "{:.1f}"),
    "cut": ("cut", "{:.1%}"),
    "kl": ("KL from {reference}", "{:.3f}"),
    "pairs": ("pairs", "{:,}"),
    "no_pair": ("prompts without a pair", "{:.1%}"),
    "pair_margin": ("margin of pairs", "{:.3f}"),
}
CHARTS = {  # of an entry: title and unit
    "mark": ("mark of the answers", "judge's unit"),
    "win_rate": ("wins against the first policy", "share of answers"),
    "length": ("length of the answers", "tokens"),
    "kl": ("KL from {reference}", "nats a token"),
    "pair_margin": ("margin of the pairs", "judge's unit"),
    "no_pair": ("prompts without a pair", "share"),
}


REFERENCES = {"first": "the first", "previous": "the round before"}  # by `rounds.reference`


def reference_of(entries: list[Json]) -> str:
    """Which policy KL is measured from, in words."""
    return REFERENCES.get(entries[-1].get("reference", ""), "the round's reference")


def table_of(entries: list[Json]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows, for a page: figures are {"value", "interval", "n"}."""
    reference = reference_of(entries)
    headings = ["policy", *(each.format(reference=reference) for each, _ in COLUMNS.values())]
    return headings, [
        [_name(each), *(_cell(each.get(key), form) for key, (_, form) in COLUMNS.items())]
        for each in entries
    ]


def texts_of(entries: list[Json]) -> tuple[list[str], list[list[str]]]:
    """The same for a terminal, without the intervals."""
    headings, rows = table_of(entries)
    return headings, [
        [cell if isinstance(cell, str) else cell["value"] for cell in row] for row in rows
    ]


def panels_of(entries: list[Json]) -> list[Panel]:
    """A chart a figure, over the rounds."""
    panels = []
    reference = reference_of(entries)
    for key, (title, unit) in CHARTS.items():
        points = [_point(each["round"], each[key]) for each in entries if each.get(key) is not None]
        if points:
            series = [Series(points, line=1.5, dots=3)]
            panels.append(Panel(title.format(reference=reference), unit, "round", series))
    return panels


def warnings_of(entries: list[Json]) -> list[str]:
    """What goes wrong with the rounds, a sentence each with the key to change."""
    first, last = entries[0], entries[-1]
    if len(entries) < 2:
        return []
    known: dict[str, Any] = {
        "round_length": last["length"]["value"] / max(1e-9, first["length"]["value"]),
        "round_top": last["top"],
        "round_no_pair": last["no_pair"],
        "round_kl": last["kl"],
        "round_reference": last.get("reference"),
    }
    spread = entries[1]["spread"]
    now = last["spread"]
    if len(entries) > 2 and spread and now is not None:
        known["round_spread"] = now / spread
    if len(entries) > 2:
        known["round_kl_before"] = entries[-2]["kl"]
    return diagnose(Facts(**known), ROUNDS)


def _name(entry: Json) -> str:
    return f"round {entry['round']}" if entry["round"] else "first"


def _cell(value: Any, form: str) -> Json | str:
    if value is None:
        return "–"
    if not isinstance(value, dict):
        return form.format(value)
    interval = ""
    if value["low"] is not None:
        interval = f"{form.format(value['low']).rstrip('%')} to {form.format(value['high'])}"
    return {"value": form.format(value["value"]), "interval": interval, "n": value["n"]}


def _point(number: int, value: Any) -> tuple[float, ...]:
    """A number, or a figure with its interval as error bars."""
    if not isinstance(value, dict):
        return (number, value)
    low, high = ends_of(value)
    return (number, value["value"], number, number, low, high)
