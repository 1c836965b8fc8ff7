"""curves.svg: the metrics of a training over its steps, small panels side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

PANELS = (  # title, unit, the metrics in it
    ("loss", "nats", ("loss",)),
    ("reward accuracy", "share of pairs", ("accuracy", "token_accuracy")),
    ("reward", "nats", ("reward_chosen", "reward_rejected")),
    ("KL from the reference", "nats a token", ("kl",)),
    ("log-probability", "nats a token", ("logps_chosen", "logps_rejected")),
    ("entropy", "nats a token", ("entropy",)),
    ("gradient norm", "", ("grad_norm",)),
    ("learning rate", "", ("learning_rate",)),
)
COLOURS = ("#1f6fb4", "#d1602b")
WIDTH, HEIGHT, COLUMNS = 340, 220, 2  # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 34, 38  # margins around its axes


def curves_svg(lines: Sequence[dict[str, Any]]) -> str:
    """The lines of metrics.jsonl as an SVG: training as thin lines, evaluations as thick ones with dots."""
    steps = [line["step"] for line in lines]
    first, last = min(steps, default=0), max([*steps, 1])
    panels = [panel for panel in PANELS if any(name in line for line in lines for name in panel[2])]
    drawn = [
        f'<g transform="translate({number % COLUMNS * WIDTH},{number // COLUMNS * HEIGHT})">'
        f"{_panel(lines, panel, first, last)}</g>"
        for number, panel in enumerate(panels)
    ]
    height = -(-len(panels) // COLUMNS) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * COLUMNS}" height="{height}" font-size="11" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>{"".join(drawn)}</svg>\n'
    )


def _panel(lines: Sequence[dict[str, Any]], panel: tuple[str, str, tuple[str, ...]], first: int, last: int) -> str:
    title, unit, names = panel
    values = [line[name] for line in lines for name in names if math.isfinite(line.get(name, math.nan))]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-12:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(step: float) -> float:
        return LEFT + (step - first) / max(1, last - first) * (right - LEFT)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - TOP)

    parts = [_text(LEFT, 15, f"{title}{f' ({unit})' if unit else ''}", "start", "bold")]
    for tick in (low, (low + high) / 2, high):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{right}" stroke="#e0e0e0"/>')
        parts.append(_text(LEFT - 5, y(tick) + 4, f"{tick:.3g}", "end"))
    parts += [_text(x(tick), bottom + 15, f"{tick:.0f}", "middle") for tick in (first, (first + last) // 2, last)]
    parts.append(_text((LEFT + right) / 2, bottom + 29, "optimizer step", "middle"))
    for number, name in enumerate(names):
        colour = COLOURS[number]
        if len(names) > 1:
            parts.append(_text(right - 110 * (len(names) - 1 - number), 28, name, "end", colour=colour))
        for split, width in (("train", 1), ("eval", 2.5)):
            points = [
                (x(line["step"]), y(line[name]))
                for line in lines
                if line["split"] == split and math.isfinite(line.get(name, math.nan))
            ]
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
            if split == "eval":
                parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points]
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal", colour: str = "#333333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{colour}">'
        f"{escape(text)}</text>"
    )
