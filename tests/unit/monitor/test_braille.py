"""Braille curves set the expected dots."""

from __future__ import annotations

from pillsnap.monitor.braille import draw_curve


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """Set dots as (column, row from the top)."""
    bits = {
        0x01: (0, 0),
        0x02: (0, 1),
        0x04: (0, 2),
        0x40: (0, 3),
        0x08: (1, 0),
        0x10: (1, 1),
        0x20: (1, 2),
        0x80: (1, 3),
    }
    return {
        (2 * x + dx, 4 * y + dy)
        for y, line in enumerate(lines)
        for x, char in enumerate(line)
        for bit, (dx, dy) in bits.items()
        if (ord(char) - 0x2800) & bit
    }


def test_diagonal_from_lower_left_to_upper_right() -> None:
    assert dots(draw_curve([(0, 0.0), (7, 7.0)], width=4, height=2)) == {(column, 7 - column) for column in range(8)}


def test_step_has_no_gap() -> None:
    got = dots(draw_curve([(0, 0.0), (3, 0.0), (4, 7.0), (7, 7.0)], width=4, height=2))
    assert {row for _, row in got} == set(range(8)) and {column for column, _ in got} == set(range(8))


def test_flat_single_and_no_points() -> None:
    assert {row for _, row in dots(draw_curve([(1, 5.0), (9, 5.0)], width=3, height=1))} == {2}
    assert dots(draw_curve([(1, 5.0)], width=1, height=1)) != set()
    assert draw_curve([], width=3, height=2) == ["\u2800" * 3] * 2
