"""Line charts for a terminal in braille characters, 2 x 4 dots per cell."""

from __future__ import annotations

from collections.abc import Sequence

_BLANK = 0x2800
# Bit of a dot, by column and row within a cell.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def draw_curve(points: Sequence[tuple[float, float]], width: int, height: int) -> list[str]:
    """`height` lines of `width` characters: the curve through `points` from the first to the last x."""
    cells = [[_BLANK] * width for _ in range(height)]
    if points:
        columns, rows = _scaled(points, 2 * width, 4 * height)
        previous = rows[0]
        for column, row in zip(columns, rows, strict=True):
            # Fill from the dot next to the previous one: steep curves have no gaps, flat ones one dot per column.
            step = 1 if row > previous else -1
            for dot in range(previous + step, row + step, step) if row != previous else (row,):
                cells[dot // 4][column // 2] |= _DOTS[column % 2][dot % 4]
            previous = row
        first = rows[0]
        cells[first // 4][columns[0] // 2] |= _DOTS[columns[0] % 2][first % 4]
    return ["".join(chr(cell) for cell in line) for line in cells]


def _scaled(points: Sequence[tuple[float, float]], num_columns: int, num_rows: int) -> tuple[list[int], list[int]]:
    """Column from the left and interpolated row from the top of each dot; a flat curve is centered."""
    x_low, x_high = points[0][0], points[-1][0]
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    columns, rows = [], []
    index = 0
    for column in range(num_columns):
        x = x_low + (x_high - x_low) * column / max(1, num_columns - 1)
        while index + 1 < len(points) and points[index + 1][0] <= x:
            index += 1
        (x0, y0), (x1, y1) = points[index], points[min(index + 1, len(points) - 1)]
        y = y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y0
        share = (y - y_low) / (y_high - y_low) if y_high > y_low else 0.5
        columns.append(column)
        rows.append(round((1 - share) * (num_rows - 1)))
    return columns, rows
