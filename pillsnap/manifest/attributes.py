"""Attributes of a drug: shape, colours, imprints, size, permit number, maker. Worker processes import it."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypedDict

SEPARATOR = "|"
"""Separates colours in one text. AI Hub also writes commas and slashes."""


class Attributes(TypedDict, total=False):
    """Attributes of one class; what is not known is absent. Lengths in mm, texts as the source writes them."""

    name_en: str
    shape: str
    colours: list[str]
    imprint_front: str
    imprint_back: str
    long_mm: float
    short_mm: float
    thick_mm: float
    item_seq: str
    maker: str
    maker_en: str


LENGTHS = ("long_mm", "short_mm", "thick_mm")
_LABEL_FIELDS = {
    "name_en": ("dl_name_en",),
    "shape": ("drug_shape",),
    "colours": ("color_class1", "color_class2"),
    "imprint_front": ("print_front",),
    "imprint_back": ("print_back",),
    "long_mm": ("leng_long",),
    "short_mm": ("leng_short",),
    "thick_mm": ("thick",),
    "item_seq": ("item_seq",),
    "maker": ("dl_company",),
    "maker_en": ("dl_company_en",),
}
FIELDS = tuple(_LABEL_FIELDS)
Texts = tuple[tuple[str, str], ...]
"""(field, text) pairs of the attributes that are known, in the order of FIELDS."""


_KEYS = tuple(key for keys in _LABEL_FIELDS.values() for key in keys)


def label_attributes(image: Mapping[str, object]) -> Texts:
    """Attributes that `images[0]` of an AI Hub label states."""
    values = tuple(map(image.get, _KEYS))
    try:
        return _stated(values)
    except TypeError:  # a list or an object in place of a text: not hashable
        return _stated(tuple(value if isinstance(value, str | int | float) else None for value in values))


@lru_cache(maxsize=1024)  # the labels of a class state the same, and share one object
def _stated(values: tuple[object, ...]) -> Texts:
    given = dict(zip(_KEYS, values, strict=True))
    return known_texts((field, _joined(given[key] for key in keys)) for field, keys in _LABEL_FIELDS.items())


def known_texts(texts: Iterable[tuple[str, str]]) -> Texts:
    """Pairs in one spelling, without those that say nothing: empty, `-`, or a length that is no positive number."""
    spelled = ((field, _spelled(field, text)) for field, text in texts)
    return tuple((field, text) for field, text in spelled if text)


def to_attributes(texts: Iterable[tuple[str, str]]) -> Attributes:
    """Typed attributes of (field, text) pairs."""
    values: dict[str, object] = {}
    for field, text in texts:
        values[field] = text.split(SEPARATOR) if field == "colours" else float(text) if field in LENGTHS else text
    return values  # type: ignore[return-value]


def to_texts(attributes: Attributes) -> dict[str, str]:
    """The inverse of `to_attributes`, for comparing values."""
    return dict(known_texts((field, _joined([attributes.get(field)])) for field in FIELDS))


def clean(value: object) -> str:
    """Text of a JSON value, NFC, without outer spaces; empty unless it is a text or a whole number."""
    return unicodedata.normalize("NFC", str(value)).strip() if isinstance(value, str | int) else ""


def _joined(values: Iterable[object]) -> str:
    texts: list[str] = []
    for value in values:
        parts = value if isinstance(value, list) else [value]
        texts += [f"{part:.12g}" if isinstance(part, float) else clean(part) for part in parts]
    return SEPARATOR.join(text for text in texts if text)


def _spelled(field: str, text: str) -> str:
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if field == "colours":
        parts = (part.strip() for part in text.replace(",", SEPARATOR).replace("/", SEPARATOR).split(SEPARATOR))
        return SEPARATOR.join(dict.fromkeys(part for part in parts if part not in ("", "-")))
    if field in LENGTHS:
        try:
            length = float(text)
        except ValueError:
            return ""
        return f"{length:.6g}" if math.isfinite(length) and length > 0 else ""
    if field == "item_seq":
        text = text.removesuffix(".0")  # of a table that holds it as a number
    return "" if text == "-" else text
