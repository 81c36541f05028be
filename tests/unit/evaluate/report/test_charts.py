from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from pillsnap.evaluate.report.charts import MAX_POINTS, Chart, Line, Mark, binned, line_chart, reliability_diagram


def elements(chart: Chart, name: str) -> list[ElementTree.Element]:
    svg = str(chart.svg).replace("<svg", '<svg xmlns:xlink="x"', 1)
    return list(ElementTree.fromstring(svg).iter(name))


def paths(chart: Chart, color: str) -> list[str]:
    return [path.get("d") for path in elements(chart, "path") if f"var(--{color})" in path.get("style", "")]


def two_lines(title: str = "Loss") -> Chart:
    lines = [Line("a<b", [0, 1, 2], [4, 2, 1]), Line("c", [0, 2], [3, 3], "orange")]
    return line_chart(title, lines, x_label="epoch", x_range=(0, 2), mark=Mark(2, 1, "best <1>"))


def test_line_chart_draws_its_points_in_the_colours_of_the_page() -> None:
    chart = two_lines()
    assert sorted(path.count("L") for path in paths(chart, "blue") if "C" not in path) == [2]
    assert [path.count("L") for path in paths(chart, "orange")] == [1]
    assert chart.legend == [("a<b", "blue"), ("c", "orange")]
    points = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", paths(chart, "orange")[0])]
    assert points == pytest.approx([0.13 * 360, 0.95 * 360], abs=0.1)
    assert not re.search("#(?!m[0-9a-f]{10})", chart.svg), "a colour that dark mode keeps"


def test_texts_are_text_and_escaped() -> None:
    texts = [text.text for text in elements(two_lines(), "text")]
    assert "epoch" in texts and "best <1>" in texts
    assert "best <" not in two_lines().svg


def test_charts_are_reproducible_and_have_no_identifier_in_common() -> None:
    assert two_lines().svg == two_lines().svg
    first, second = ({e.get("id") for e in elements(two_lines(t), "*")} - {None} for t in ("Loss", "Other"))
    assert not first & second
    assert not re.search(r"<metadata|<style|xmlns|\d{4}-\d\d-\d\d", two_lines().svg)


@pytest.mark.parametrize(("values", "lowest"), [([1.0, 2.0], "0"), ([1.9, 2.0], "1.9"), ([0.0, 0.0], "-0.05")])
def test_y_axis_starts_at_zero_unless_the_values_are_far_from_it(values: list[float], lowest: str) -> None:
    chart = line_chart("Loss", [Line("loss", [0, 1], values)], x_label="", x_range=(0, 1))
    ticks = [text.text for text in elements(chart, "text") if "end" in text.get("style", "")]
    assert ticks[0].replace("\N{MINUS SIGN}", "-") == lowest


def test_a_single_point_can_be_drawn() -> None:
    chart = line_chart("Loss", [Line("loss", [0.0], [1.0], dots=True)], x_label="step", x_range=(0.0, 0.0))
    assert len(elements(chart, "use")) == 1


def test_long_line_is_drawn_as_means_with_a_band() -> None:
    line = binned(range(10_000), [0.0, 2.0] * 5_000, "blue", "loss")
    assert len(line.x) == len(line.y) == MAX_POINTS
    assert line.y == pytest.approx([1.0] * MAX_POINTS, abs=0.01)
    assert line.low is not None and line.high is not None
    assert (set(line.low), set(line.high)) == ({0.0}, {2.0})
    assert binned([1, 2], [3, 4], "blue", "loss").low is None


def test_reliability_diagram_has_a_bar_for_each_bin_with_crops() -> None:
    chart = reliability_diagram([None, 0.3, 0.9], [None, 0.5, 1.0], [0, 2, 8])
    heights = []
    for path in paths(chart, "orange"):
        ys = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]
        heights.append(max(ys) - min(ys))
    assert len(heights) == 2
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.02)
