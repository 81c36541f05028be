"""The synthetic drugs: appearance and label data, a function of seed and index."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from pillsnap.errors import UserError

LIKENESSES = ("easy", "shared", "back")
CLASSES_PER_GROUP = 6
MAX_CLASSES = 10_000

# Without characters that look alike (0/O, 1/I) or become others when rotated (9, W, Z).
LETTERS = "ABCDEFGHJKLMNPRSTUVXY"
DIGITS = "2345678"

# Most different colours first, so that few easy classes differ more by colour than by light.
COLOURS: dict[str, tuple[int, int, int]] = {
    "하양": (238, 237, 232),
    "주황": (232, 138, 62),
    "초록": (96, 158, 92),
    "분홍": (232, 158, 172),
    "파랑": (92, 138, 200),
    "노랑": (238, 208, 94),
    "갈색": (142, 92, 64),
    "보라": (150, 118, 178),
    "빨강": (194, 66, 62),
    "청록": (92, 176, 170),
    "회색": (146, 148, 150),
    "연두": (178, 208, 116),
}
# Repeated entries are more frequent: most tablets are white, and round or oblong.
_COMMON_COLOURS = ("하양",) * 6 + ("노랑",) * 3 + ("분홍",) * 3 + ("주황",) * 2 + ("파랑", "초록", "갈색", "빨강")
_COMMON_SHAPES = ("원형",) * 5 + ("장방형",) * 4 + ("타원형",) * 3 + ("캡슐",) * 2 + ("육각형", "사각형", "팔각형")

SHAPES = ("원형", "장방형", "캡슐", "삼각형", "타원형", "육각형", "사각형", "마름모형", "팔각형", "오각형")
# Long side in mm (min, max), short side as a fraction of it (min, max), maximum characters of the imprint.
_SIZES: dict[str, tuple[float, float, float, float, int]] = {
    "원형": (8.0, 11.0, 1.0, 1.0, 4),
    "장방형": (13.5, 17.5, 0.40, 0.48, 6),
    "캡슐": (14.0, 17.6, 0.36, 0.41, 6),
    "삼각형": (9.5, 11.5, 0.90, 0.90, 2),
    "타원형": (11.0, 14.5, 0.56, 0.68, 5),
    "육각형": (9.5, 11.5, 0.88, 0.88, 3),
    "사각형": (9.5, 12.5, 0.66, 0.90, 4),
    "마름모형": (11.0, 13.0, 0.74, 0.82, 3),
    "팔각형": (9.0, 11.0, 0.93, 0.93, 4),
    "오각형": (9.5, 11.0, 0.95, 0.95, 3),
}

_SYLLABLES = (
    ("가", "ga"), ("나", "na"), ("로", "ro"), ("메", "me"), ("비", "bi"), ("사", "sa"), ("토", "to"), ("파", "pa"),
    ("리", "ri"), ("디", "di"), ("세", "se"), ("코", "ko"), ("마", "ma"), ("네", "ne"), ("루", "ru"), ("티", "ti"),
)  # fmt: skip
_MAKERS = (
    ("가온시험제약", "Gaon Test Pharm"),
    ("(주)누리모의약품", "Nuri Mock Pharm"),
    ("다솜연습제약(주)", "Dasom Practice Pharm"),
    ("미르합성제약", "Mir Synthetic Pharm"),
)
_STRENGTHS_MG = (5, 10, 20, 25, 40, 50, 100, 150, 250, 500)


@dataclass(frozen=True)
class Look:
    """Appearance of a drug. Lengths in mm, colours as names of `COLOURS`."""

    shape: str
    colour: str
    second_colour: str
    long_mm: float
    short_mm: float
    thick_mm: float
    domed: bool
    glossy: bool


@dataclass(frozen=True)
class Pill:
    """One synthetic drug. `prints` and `scored` are (front, back); `|` in a print is the position of the score line."""

    code: str
    look: Look
    prints: tuple[str, str]
    scored: tuple[bool, bool]
    name: str
    name_en: str
    material: str
    material_en: str
    company: str
    company_en: str
    item_seq: int
    edi_code: str


def build_catalog(seed: int, num_classes: int, likeness: str) -> list[Pill]:
    """Draw the drugs, sorted by code.

    The drugs for n classes are among those for n + 1. With `likeness` "easy" most classes differ in shape or
    colour; with "shared" every `CLASSES_PER_GROUP` classes have shape, colours and size in common; with "back" these
    drugs have a blank front. Pills of one shape and colour never share an imprint, neither on the front nor on the
    back.

    Raises:
        UserError: `likeness` is unknown or `num_classes` is out of range.
    """
    if likeness not in LIKENESSES:
        raise UserError(f"likeness {likeness!r} is unknown: use one of {', '.join(LIKENESSES)}")
    if not 1 <= num_classes <= MAX_CLASSES:
        raise UserError(f"num_classes is {num_classes}: use 1 to {MAX_CLASSES}")
    rng = np.random.default_rng([seed, 0])
    shift = (int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS))))
    codes: set[str] = set()
    prints: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    pills = []
    for index in range(num_classes):
        code = _fresh(codes, lambda: f"K-{rng.integers(100, 45_000):06d}")
        look = _easy_look(seed, index, shift) if likeness == "easy" else _shared_look(seed, index)
        scored = look.shape in ("원형", "장방형", "타원형") and rng.random() < 0.4
        taken = prints[look.shape, look.colour, look.second_colour]
        front = _fresh(taken, partial(_imprint, rng, _SIZES[look.shape][4], scored))
        back = _fresh(taken, partial(_imprint, rng, _SIZES[look.shape][4], False))
        if likeness == "back":
            front, scored = "", False
        pills.append(_describe(rng, code, look, (front, back), (bool(scored), False)))
    return sorted(pills, key=lambda pill: pill.code)


def _fresh(taken: set[str], draw: Callable[[], str]) -> str:
    while (value := draw()) in taken:
        pass
    taken.add(value)
    return value


def _imprint(rng: np.random.Generator, max_characters: int, scored: bool) -> str:
    """Letters, then digits; equally many on both sides of a score line."""
    length = 2 * int(rng.integers(1, max_characters // 2 + 1)) if scored else int(rng.integers(2, max_characters + 1))
    num_letters = int(rng.integers(0, length + 1))
    letters = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=num_letters))
    text = letters + "".join(DIGITS[i] for i in rng.integers(len(DIGITS), size=length - num_letters))
    return f"{text[: length // 2]}|{text[length // 2 :]}" if scored else text


def _easy_look(seed: int, index: int, shift: tuple[int, int]) -> Look:
    rng = np.random.default_rng([seed, 1, index])
    names = tuple(COLOURS)
    lap = index // math.lcm(len(SHAPES), len(names))
    shape = SHAPES[(index + shift[0]) % len(SHAPES)]
    colour = names[(index + lap + shift[1]) % len(names)]
    second = names[(index * 5 + 3 + shift[1]) % len(names)] if shape == "캡슐" or lap % 2 else ""
    return _sized(rng, shape, colour, "" if second == colour else second)


def _shared_look(seed: int, index: int) -> Look:
    rng = np.random.default_rng([seed, 2, index // CLASSES_PER_GROUP])
    shape = str(rng.choice(_COMMON_SHAPES))
    colour = str(rng.choice(_COMMON_COLOURS))
    second = str(rng.choice(_COMMON_COLOURS)) if shape == "캡슐" or rng.random() < 0.1 else ""
    return _sized(rng, shape, colour, "" if second == colour else second)


def _sized(rng: np.random.Generator, shape: str, colour: str, second: str) -> Look:
    least_mm, most_mm, least_share, most_share, _ = _SIZES[shape]
    long_mm = round(float(rng.uniform(least_mm, most_mm)), 2)
    short_mm = round(long_mm * float(rng.uniform(least_share, most_share)), 2)
    thick_mm = short_mm if shape == "캡슐" else round(min(float(rng.uniform(3.4, 5.2)), 0.8 * short_mm), 2)
    domed = shape in ("원형", "장방형", "타원형") and rng.random() < 0.6
    return Look(shape, colour, second, long_mm, short_mm, thick_mm, bool(domed), bool(rng.random() < 0.6))


def _describe(
    rng: np.random.Generator, code: str, look: Look, prints: tuple[str, str], scored: tuple[bool, bool]
) -> Pill:
    picks = [_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=3)]
    strength_mg = int(rng.choice(_STRENGTHS_MG))
    korean, english = "".join(k for k, _ in picks), "".join(e for _, e in picks).capitalize()
    form, form_en = ("캡슐", "Cap.") if look.shape == "캡슐" else ("정", "Tab.")
    company, company_en = _MAKERS[int(rng.integers(len(_MAKERS)))]
    numbers = rng.integers(10_000_000, 99_999_999, size=3)
    edi_codes = [f"6{numbers[0]}", f"A{numbers[1]}", f"6{numbers[2]}"][: int(rng.choice([0, 1, 2, 2, 2, 2, 3]))]
    return Pill(
        code=code,
        look=look,
        prints=prints,
        scored=scored,
        name=f"{korean}{form} {strength_mg}mg",
        name_en=f"{english} {form_en} {strength_mg}mg",
        material=f"{korean}염산염",
        material_en=f"{english} Hydrochloride",
        company=company,
        company_en=company_en,
        item_seq=int(rng.integers(1960, 2021)) * 100_000 + int(rng.integers(1, 10_000)),
        edi_code=",".join(edi_codes),
    )
