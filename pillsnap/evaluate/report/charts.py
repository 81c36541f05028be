"""Charts as inline SVG, coloured by the page's CSS variables, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pillsnap.evaluate.report.markup import Content, Markup, tag

# Drawn at about the width of a phone, so that text keeps its size there and in the columns of a desktop.
WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 18, 10, 36
MAX_POINTS = 90


@dataclass(frozen=True)
class Series:
    """A line: points in data units and a CSS colour class (`c1`, `c2`, …). `low` and `high` draw a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "c1"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A point that is called out with a text."""

    x: float
    y: float
    text: str
    color: str = "c1"


class Axes:
    """A plot area with linear axes from data units to pixels."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], height: int = HEIGHT) -> None:
        self.x_range, self.y_range, self.height = _widened(x_range), _widened(y_range), height

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))

    def frame(self, x_label: str, x_text: Callable[[float], str], y_text: Callable[[float], str]) -> list[Markup]:
        """Grid, tick labels and the name of the x axis."""
        base = self.height - _BOTTOM
        parts = []
        for value in ticks(*self.y_range, count=4):
            y = self.y(value)
            parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", y_text(value), x=_LEFT - 6, y=y + 3.5, class_="tick end"))
        for value in ticks(*self.x_range, count=5, factors=(1, 2, 5, 10)):
            parts.append(tag("text", x_text(value), x=self.x(value), y=base + 14, class_="tick mid"))
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=base, y2=base, class_="axis"))
        parts.append(tag("text", x_label, x=(_LEFT + WIDTH - _RIGHT) / 2, y=self.height - 4, class_="tick mid"))
        return parts


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_text: Callable[[float], str] | None = None,
    y_text: Callable[[float], str] | None = None,
    marks: Sequence[Mark] = (),
    fill: bool = False,
) -> Markup:
    """Lines over one pair of axes, with a legend when there is more than one."""
    xs = [x for line in series for x in line.x]
    ys = [y for line in series for y in (*line.y, *(line.low or ()), *(line.high or ()))]
    axes = Axes(x_range or (min(xs), max(xs)), y_range or _with_zero(min(ys), max(ys)))
    parts: list[Content] = [*axes.frame(x_label, x_text or plain, y_text or plain)]
    for line in series:
        if line.low is not None and line.high is not None:
            outline = axes.path([*line.x, *reversed(line.x)], [*line.high, *reversed(line.low)])
            parts.append(tag("path", d=f"{outline}Z", class_=f"band {line.color}"))
        if fill:
            outline = axes.path([line.x[0], *line.x, line.x[-1]], [axes.y_range[0], *line.y, axes.y_range[0]])
            parts.append(tag("path", d=f"{outline}Z", class_=f"band {line.color}"))
        parts.append(tag("path", d=axes.path(line.x, line.y), class_=f"line {line.color}"))
        if line.dots and len(line.x) <= 60:
            parts.extend(
                tag(
                    "circle",
                    tag("title", f"{line.name}: {(y_text or plain)(y)} at {(x_text or plain)(x)}"),
                    cx=axes.x(x),
                    cy=axes.y(y),
                    r=2.4,
                    class_=f"dot {line.color}",
                )
                for x, y in zip(line.x, line.y, strict=True)
            )
    parts.extend(_mark(axes, mark) for mark in marks)
    legend = [(line.name, line.color) for line in series] if len(series) > 1 else []
    return chart(title, parts, legend=legend)


def chart(title: str, parts: Content, *, height: int = HEIGHT, legend: Sequence[tuple[str, str]] = ()) -> Markup:
    """A titled figure around SVG parts, with a legend of (name, colour class)."""
    keys = [tag("span", tag("i", class_=f"key {color}"), name) for name, color in legend]
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("span", keys, class_="legend") if keys else None),
        tag("svg", parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title),
        class_="chart",
    )


def reliability_diagram(
    confidence: Sequence[float | None], accuracy: Sequence[float | None], count: Sequence[int]
) -> Markup:
    """Accuracy of each confidence bin as a bar against the diagonal, and how many crops each bin holds beneath."""
    strip_px, gap_px = 34, 6
    axes = Axes((0.0, 1.0), (0.0, 1.0), HEIGHT + strip_px)
    bins = len(count)
    base, left = axes.height - _BOTTOM, axes.x(0)
    axes_top = Axes((0.0, 1.0), (0.0, 1.0), HEIGHT + strip_px - strip_px - gap_px)
    width = (axes.x(1) - left) / bins
    parts: list[Content] = []
    for value in (0.0, 0.5, 1.0):
        y = axes_top.y(value)
        parts.append(tag("line", x1=left, x2=axes.x(1), y1=y, y2=y, class_="grid"))
        parts.append(tag("text", percent_tick(value), x=left - 6, y=y + 3.5, class_="tick end"))
    most = max(count) or 1
    for i, (mean, right, n) in enumerate(zip(confidence, accuracy, count, strict=True)):
        if mean is None or right is None:
            continue
        x = left + i * width + 1
        text = tag("title", f"confidence {percent_tick(mean)}, right {percent_tick(right)}, {n:,} crops")
        top = axes_top.y(right)
        parts.append(
            tag(
                "rect",
                text,
                x=x,
                y=top,
                width=width - 2,
                height=axes_top.y(0) - top,
                class_="bar c2",
                rx=1.5,
                opacity=0.35 + 0.65 * math.sqrt(n / most),
            )
        )
        tall = max((strip_px - 4) * n / most, 1.0)
        parts.append(tag("rect", text, x=x, y=base - tall, width=width - 2, height=tall, class_="bar c0", rx=1))
    ends = {"x1": left, "y1": axes_top.y(0), "x2": axes.x(1), "y2": axes_top.y(1)}
    parts.append(tag("line", **ends, class_="diagonal"))
    parts.append(tag("line", x1=left, x2=axes.x(1), y1=base, y2=base, class_="axis"))
    parts.append(tag("text", "crops", x=left - 6, y=base - 2, class_="tick end"))
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(tag("text", percent_tick(value), x=axes.x(value), y=base + 14, class_="tick mid"))
    parts.append(tag("text", "confidence", x=(left + axes.x(1)) / 2, y=axes.height - 4, class_="tick mid"))
    return chart(
        "Share right by confidence", parts, height=axes.height, legend=[("right", "c2"), ("if calibrated", "cd")]
    )


def heat_map(matrix: np.ndarray, totals: np.ndarray, names: Sequence[str], title: str) -> Markup:
    """Counts (n, n), true rows and predicted columns, each cell shaded by its share of the row's total (n,)."""
    size = len(names)
    cell = 26.0 if size <= 20 else 14.0 if size <= 40 else 11.0
    font = min(10.5, cell * 0.8)
    style = f"font-size:{font:.1f}px"
    short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
    margin = 14 + 0.62 * font * max(len(name) for name in short)
    side = size * cell
    parts: list[Content] = [tag("rect", x=margin, y=margin, width=side, height=side, class_="plate")]
    for row, column in zip(*np.nonzero(matrix), strict=True):
        share = matrix[row, column] / totals[row]
        parts.append(
            tag(
                "rect",
                tag("title", f"{names[row]} named {names[column]}: {matrix[row, column]} of {totals[row]}"),
                x=margin + column * cell + 0.5,
                y=margin + row * cell + 0.5,
                width=cell - 1,
                height=cell - 1,
                class_="hit" if row == column else "miss",
                opacity=0.12 + 0.88 * math.sqrt(share),
            )
        )
    for i, name in enumerate(short):
        middle = margin + (i + 0.5) * cell
        parts.append(tag("text", name, x=margin - 5, y=middle + font * 0.35, class_="end", style=style))
        turned = f"translate({middle + font * 0.35:.1f} {margin - 5:.1f}) rotate(-90)"
        parts.append(tag("text", name, transform=turned, class_="start", style=style))
    whole = margin + side + 4
    drawing = tag(
        "svg",
        parts,
        viewBox=f"0 0 {whole:.0f} {whole:.0f}",
        role="img",
        aria_label=title,
        style=f"width:{whole:.0f}px",
    )
    legend = [
        tag("span", tag("i", class_=f"key {color}"), name) for name, color in (("right", "hit"), ("wrong", "miss"))
    ]
    caption = tag("figcaption", tag("b", title), tag("span", legend, class_="legend"))
    return tag("figure", caption, tag("div", drawing, class_="scroll"), class_="chart heat")


def binned(x: Sequence[float], y: Sequence[float], color: str, name: str) -> Series:
    """A long noisy line as the mean of at most 90 bins, with the lowest and highest value of each as its band."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(xs) <= MAX_POINTS:
        return Series(name, xs.tolist(), ys.tolist(), color)
    parts = np.array_split(np.arange(len(xs)), MAX_POINTS)
    means, lows, highs = ([float(function(ys[part])) for part in parts] for function in (np.mean, np.min, np.max))
    return Series(name, [float(xs[part].mean()) for part in parts], means, color, low=lows, high=highs)


def ticks(low: float, high: float, count: int, factors: Sequence[float] = (1, 2, 2.5, 5, 10)) -> list[float]:
    """About `count` round values from low to high: steps of a factor times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in factors if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def plain(value: float) -> str:
    """A tick label: 0.001, 1.5, 20, 3e-05."""
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def percent_tick(value: float) -> str:
    """0.5 -> 50 %."""
    return f"{100 * value:.3g} %"


def _mark(axes: Axes, mark: Mark) -> Markup:
    x, y = axes.x(mark.x), axes.y(mark.y)
    on_right = x > WIDTH * 0.6
    below = y < _TOP + 22
    return tag(
        "g",
        tag("circle", cx=x, cy=y, r=4, class_=f"spot {mark.color}"),
        tag(
            "text",
            mark.text,
            x=x - 7 if on_right else x + 7,
            y=y + 19 if below else y - 7,
            class_="note end" if on_right else "note start",
        ),
    )


def _with_zero(low: float, high: float) -> tuple[float, float]:
    """Limits that begin at zero, unless all values lie far from it."""
    return (0.0, high * 1.03) if 0 <= low < 0.6 * high else (low, high)


def _widened(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    if high > low:
        return low, high
    reach = abs(low) * 0.5 or 0.5
    return low - reach, high + reach
