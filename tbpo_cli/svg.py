"""Small charts as SVG: a titled panel with ticks and units, in it lines, areas, points with error bars, a legend.

All is drawn in `currentColor`: the root's for text and axes, a class `series-N` for each series. Its values here are
for a white ground; the style sheet of a page sets others, for light and for dark, which a plotting library's file does
not allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

INK = "#333333"
COLOURS = (  # of series: on light, on dark
    ("#1f6fb4", "#68abe8"), ("#d1602b", "#eb8f63"), ("#2f8f5b", "#5cbd88"),
    ("#8a5fb8", "#b597dd"), ("#a8820f", "#d2b04c"), ("#c0477d", "#e480aa"),
)  # fmt: skip
WIDTH, HEIGHT, COLUMNS = 340, 220, 2  # of a panel, pixels; of panels on a sheet
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 34, 38  # margins around its axes


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour; points that are not finite are left out.

    Args:
        points: (x, y), or (x, y, lowest x, highest x, lowest y, highest y) with error bars.
        colour: a number of COLOURS, which are used in turn; None for that of the axes.
        name: in the legend, if given.
        line: width of the line through the points, pixels; 0 for none. So is `dots`, the radius of the points.
        area: fills what is under the line, down to zero.
    """

    points: Sequence[tuple[float, ...]]
    colour: int | None = 0
    name: str = ""
    line: float = 0
    dots: float = 0
    area: bool = False

    @property
    def finite(self) -> list[tuple[float, ...]]:
        return [point for point in self.points if all(map(math.isfinite, point))]


@dataclass(frozen=True)
class Panel:
    """A chart of some series on the same axes; `unit` is that of y."""

    title: str
    unit: str
    x_title: str
    series: Sequence[Series]


def svg(panel: Panel) -> str:
    """A panel as an element of a page, which scales with its width."""
    label = quoteattr(f"{panel.title} by {panel.x_title}")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label={label} color="{INK}" font-size="11">'
    return f"{head}{_draw(panel)}</svg>"


def sheet(panels: Sequence[Panel]) -> str:
    """Panels side by side as a file on a white ground."""
    drawn = [
        f'<g transform="translate({number % COLUMNS * WIDTH},{number // COLUMNS * HEIGHT})">{_draw(panel)}</g>'
        for number, panel in enumerate(panels)
    ]
    height = -(-len(panels) // COLUMNS) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * COLUMNS}" height="{height}" font-size="11" '
        f'font-family="sans-serif" color="{INK}">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(drawn)}</svg>\n'
    )


def _ticks(panel: Panel, axis: int) -> list[float]:
    """The round numbers at which an axis (0: x, 1: y) has ticks; it reaches from the first to the last."""
    places = (axis, 2 + 2 * axis, 3 + 2 * axis)  # of the value and of the ends of its error bar
    values = [p[place] for series in panel.series for p in series.finite for place in places if place < len(p)]
    values += [0.0] * any(series.area and axis for series in panel.series)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-12:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    unit = 10.0 ** math.floor(math.log10(high - low)) / 10
    for step in (unit * factor for factor in (1, 2, 5, 10, 20, 50)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= 5:
            break
    return [number * step for number in range(first, last + 1)]


def _draw(panel: Panel) -> str:
    x_ticks, y_ticks = _ticks(panel, 0), _ticks(panel, 1)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - LEFT)

    def y(value: float) -> float:
        return bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - TOP)

    parts = [_text(LEFT, 15, f"{panel.title}{f' ({panel.unit})' if panel.unit else ''}", "start", "bold")]
    for tick in y_ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{right}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(_text(LEFT - 5, y(tick) + 4, _number(tick), "end"))
    parts += [_text(x(tick), bottom + 15, _number(tick), "middle") for tick in x_ticks]
    parts.append(_text((LEFT + right) / 2, bottom + 29, panel.x_title, "middle"))
    named = [series for series in panel.series if series.name]
    for number, series in enumerate(named if len(named) > 1 else ()):
        parts.append(_coloured(series, _text(right - 110 * (len(named) - 1 - number), 28, series.name, "end")))
    for series in panel.series:
        parts.append(_coloured(series, "".join(_marks(series, x, y))))
    return "".join(parts)


def _marks(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[str]:
    """The area, the line, the error bars and the dots of a series."""
    points = series.finite
    path = " ".join(f"{x(point[0]):.1f},{y(point[1]):.1f}" for point in points)
    if series.area and points:
        ends = [f"{x(point[0]):.1f},{y(0):.1f}" for point in (points[0], points[-1])]
        yield f'<polygon points="{ends[0]} {path} {ends[1]}" fill="currentColor" fill-opacity=".25"/>'
    if series.line:
        yield f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="{series.line:g}"/>'
    for px, py, left, right, low, high in (point for point in points if len(point) > 2):
        bars = f"M{x(px):.1f} {y(low):.1f}V{y(high):.1f}M{x(left):.1f} {y(py):.1f}H{x(right):.1f}"
        yield f'<path d="{bars}" stroke="currentColor" stroke-width="1.5" stroke-opacity=".6"/>'
    for point in points if series.dots else ():
        yield f'<circle cx="{x(point[0]):.1f}" cy="{y(point[1]):.1f}" r="{series.dots:g}" fill="currentColor"/>'


def _coloured(series: Series, drawn: str) -> str:
    if series.colour is None:
        return f"<g>{drawn}</g>"
    number = series.colour % len(COLOURS)
    return f'<g class="series-{number}" color="{COLOURS[number][0]}">{drawn}</g>'


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} fill="currentColor">{escape(text)}</text>'
