from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from pillsnap.evaluate.report.charts import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Axes,
    Mark,
    Series,
    binned,
    heat_map,
    line_chart,
    reliability_diagram,
    ticks,
)


def shapes(drawing: str, name: str) -> list[ElementTree.Element]:
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", drawing, re.DOTALL).group())
    return list(svg.iter(name))


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1, 4, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0.002, 4, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (3, 17, 4, [5, 10, 15]),
        (-1, 1, 2, [-1, 0, 1]),
    ],
)
def test_ticks_are_round_and_within_the_limits(low, high, count, expected):
    assert ticks(low, high, count) == pytest.approx(expected)


def test_axes_put_the_corners_where_the_frame_is():
    axes = Axes((0, 10), (0, 1))
    assert (axes.x(0), axes.x(10)) == (44, WIDTH - 18)
    assert (axes.y(0), axes.y(1)) == (HEIGHT - 36, 10)


def test_a_flat_line_has_room_above_and_below():
    assert Axes((0, 1), (2, 2)).y_range == (1.0, 3.0)
    assert Axes((0, 1), (0, 0)).y_range == (-0.5, 0.5)


def test_line_chart_draws_its_points_and_escapes_its_names():
    drawing = line_chart(
        "<loss>",
        [Series("a<b", [0, 1, 2], [4, 2, 1], dots=True), Series("c", [0, 2], [3, 3], "c2")],
        x_label="epoch",
        marks=[Mark(2, 1, "best <1>")],
    )
    assert "<loss>" not in drawing and "a<b" not in drawing and "best <1>" not in drawing
    lines = [path.get("d") for path in shapes(drawing, "path") if path.get("class", "").startswith("line")]
    assert [path.count("L") for path in lines] == [2, 1]
    assert len([dot for dot in shapes(drawing, "circle") if dot.get("class") == "dot c1"]) == 3


def test_a_long_line_is_drawn_as_means_with_a_band():
    line = binned(range(10_000), [0.0, 2.0] * 5_000, "c1", "loss")
    assert len(line.x) == len(line.y) == MAX_POINTS
    assert line.y == pytest.approx([1.0] * MAX_POINTS, abs=0.01)
    assert (set(line.low), set(line.high)) == ({0.0}, {2.0})
    assert binned([1, 2], [3, 4], "c1", "loss").low is None


def test_reliability_diagram_has_a_bar_for_each_bin_that_holds_crops():
    drawing = reliability_diagram([None, 0.3, 0.9], [None, 0.5, 1.0], [0, 2, 8])
    right = [bar for bar in shapes(drawing, "rect") if bar.get("class") == "bar c2"]
    assert len(right) == 2
    assert float(right[1].get("height")) == pytest.approx(2 * float(right[0].get("height")), abs=0.02)


def test_heat_map_shades_what_occurs_and_tells_right_from_wrong():
    drawing = heat_map(np.array([[3, 1], [0, 2]]), np.array([8, 2]), ["K-1", "<K-2>"], "Confusion")
    assert [rect.get("class") for rect in shapes(drawing, "rect")] == ["plate", "hit", "miss", "hit"]
    assert shapes(drawing, "title")[1].text == "K-1 named <K-2>: 1 of 8"
