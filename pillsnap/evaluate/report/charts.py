"""Charts as inline SVG by matplotlib, in the colours of the page's CSS variables (light, dark, print)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

# About the width of a phone, so that text keeps its size on phones and in the columns of a desktop.
WIDTH, HEIGHT = 360, 220
MAX_POINTS = 90
_MAX_DOTS = 60
# The page's CSS variables, by their values in light mode.
COLORS = {
    "blue": "#2c5cd4", "orange": "#b8560f", "grey": "#8a93a1", "ink": "#15181e", "soft": "#5a6270", "line": "#e2e5ea",
}  # fmt: skip
# Repeated identifiers and page-wide styles are invalid in a page of several drawings, namespaces needless in HTML.
_NOT_INLINE = re.compile(
    r'<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>| xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', re.DOTALL
)


@dataclass(frozen=True)
class Line:
    """Points in data units and the name of a colour. `low` and `high` draw a band around the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "blue"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A highlighted point with a text."""

    x: float
    y: float
    text: str
    color: str = "blue"


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, unique within a page, and the (name, colour) pairs of its legend."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float] | None = None,
    x_percent: bool = False,
    y_percent: bool = False,
    mark: Mark | None = None,
    fill: bool = False,
) -> Chart:
    """Lines over one pair of axes. The y axis starts at 0 unless all values are far from it."""
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    axes = figure.add_axes((0.13, 0.19, 0.82, 0.73))
    for line in lines:
        marker = "o" if line.dots and len(line.x) <= _MAX_DOTS else None
        color = COLORS[line.color]
        axes.plot(line.x, line.y, color=color, linewidth=1.8, marker=marker, markersize=4.5)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.14, linewidth=0)
        if fill:
            axes.fill_between(line.x, line.y, color=color, alpha=0.14, linewidth=0)
    low, high = axes.get_ylim()
    values = np.concatenate([line.y for line in lines])
    starts_at_zero = 0 <= values.min() < 0.6 * values.max()
    axes.set_xlim(*(x_range if x_range[0] < x_range[1] else (x_range[0] - 0.5, x_range[1] + 0.5)))
    axes.set_ylim(*(y_range or (0.0 if starts_at_zero else low, high)))
    _style(axes, x_label, x_percent, y_percent)
    if mark is not None:
        axes.plot([mark.x], [mark.y], "o", color=COLORS[mark.color], markersize=8)
        on_right = mark.x > x_range[0] + 0.6 * (x_range[1] - x_range[0])
        axes.annotate(
            mark.text, (mark.x, mark.y), (-8 if on_right else 8, 7), textcoords="offset points",
            ha="right" if on_right else "left", fontsize=11, fontweight="bold", color=COLORS["ink"],
        )  # fmt: skip
    return Chart(title, _svg(figure, title), [(line.name, line.color) for line in lines] if len(lines) > 1 else ())


def reliability_diagram(
    confidence: Sequence[float | None], accuracy: Sequence[float | None], count: Sequence[int]
) -> Chart:
    """Accuracy of each confidence bin as a bar against the diagonal, above the number of crops in each bin."""
    title = "Share of correct crops by confidence"
    figure = Figure(figsize=(WIDTH / 72, 1.15 * HEIGHT / 72))
    top = figure.add_axes((0.13, 0.3, 0.82, 0.65))
    bottom = figure.add_axes((0.13, 0.15, 0.82, 0.11))
    bins = np.array([i for i, mean in enumerate(confidence) if mean is not None])
    numbers = np.array(count)[bins]
    middles, width = (bins + 0.5) / len(count), 0.9 / len(count)
    # Bins of few crops are pale.
    colors = [to_rgba(COLORS["orange"], float(0.35 + 0.65 * share)) for share in np.sqrt(numbers / numbers.max())]
    top.bar(middles, [accuracy[i] for i in bins], width, color=colors)
    top.plot([0, 1], [0, 1], "--", color=COLORS["ink"], linewidth=1.2)
    bottom.bar(middles, numbers, width, color=COLORS["grey"])
    for axes, label in ((top, ""), (bottom, "confidence")):
        axes.set_xlim(0, 1)
        _style(axes, label, x_percent=True, y_percent=True)
    top.set_ylim(0, 1)
    top.set_xticks([])
    bottom.set_yticks([numbers.max() / 2], ["crops"])
    return Chart(title, _svg(figure, title), [("correct", "orange"), ("if calibrated", "dashed")])


def binned(x: Sequence[float], y: Sequence[float], color: str, name: str) -> Line:
    """A long noisy line as the mean of at most 90 bins, with the lowest and highest value of each as its band."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(xs) <= MAX_POINTS:
        return Line(name, xs.tolist(), ys.tolist(), color)
    parts = np.array_split(np.arange(len(xs)), MAX_POINTS)
    means, lows, highs = ([float(function(ys[part])) for part in parts] for function in (np.mean, np.min, np.max))
    return Line(name, [float(xs[part].mean()) for part in parts], means, color, low=lows, high=highs)


def _style(axes: Any, x_label: str, x_percent: bool, y_percent: bool) -> None:
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["grey"])
    axes.set_xlabel(x_label, color=COLORS["soft"], fontsize=10.5, labelpad=1)
    axes.tick_params(length=0, pad=6, labelsize=10.5, labelcolor=COLORS["soft"])
    axes.grid(axis="y", color=COLORS["line"], linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    for axis, is_percent in ((axes.xaxis, x_percent), (axes.yaxis, y_percent)):
        axis.set_major_formatter(
            PercentFormatter(1, decimals=0, symbol=" %")
            if is_percent
            else FuncFormatter(lambda value, _: f"{value:.3g}")
        )


def _svg(figure: Figure, title: str) -> Markup:
    """The drawing as an `<svg>` element: text as text, and the same bytes each time."""
    figure.draw_without_rendering()  # creates the ticks and grid lines
    for artist in figure.findobj():
        artist.set_clip_on(False)  # nothing is outside the axes; clip paths would be referred to by URL
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = _NOT_INLINE.sub("", svg[svg.index("<svg") :])
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return Markup(svg)
