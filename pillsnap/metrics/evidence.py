"""Evidence beside the photo: the codes that are possible, and hints about shape, colour and imprint.

Bayes' rule: log p(code | photo, hints) = log p(code | photo) + sum of the hints' log likelihood ratios + constant; a
forbidden code has the probability 0. A hint h is right with the rate R (RIGHT); otherwise it is a chance value:

    p(h | code) / p(h) = (1 - R) + R * s(code) / mean,    mean = (1 + sum of s over n codes) / (n + 1)

s, from 0 to 1, says how well the hint fits the attribute of a code; the mean is over the possible codes that have the
attribute and one more that fits. A wrong hint therefore divides by at most 1 / (1 - R) and never hides a code. Codes
without the attribute keep the ratio 1.

`pillsnap export` copies this file beside the models: it needs numpy alone.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pillsnap.errors import UserError

RIGHT = {"shape": 0.9, "colour": 0.85, "imprint": 0.9}
"""Assumed share of right hints, by attribute."""
NEAR = 0.3
"""Fit of two shapes or colours that are easily mistaken for each other."""
MISREAD = 0.1
"""Fit of an imprint with one character read wrongly; it is raised to the power of the cost of the differences."""
LOOK_ALIKE_COST, UNREAD_COST = 0.5, 0.25
_LOOK_ALIKE = [set(group) for group in ("0OQD", "1IL|", "2Z7", "5S", "8B", "6G9", "CG", "UV", "MW", "NZ", "EF", "PR")]
_KEYS = {
    "shape": ("shape", "모양", "형태"),
    "colour": ("colour", "color", "색", "색상"),
    "imprint": ("imprint", "print", "각인", "문자"),
}
# The first name is AI Hub's. Its labels call a capsule oblong.
_SHAPES = (
    ("원형", "round", "circle", "circular"),
    ("타원형", "oval", "ellipse", "elliptical"),
    ("장방형", "oblong", "caplet", "capsule", "캡슐", "캡슐형"),
    ("반원형", "semicircle", "semicircular"),
    ("삼각형", "triangle", "triangular"),
    ("사각형", "square", "rectangle", "rectangular"),
    ("마름모형", "diamond", "rhombus"),
    ("오각형", "pentagon", "pentagonal"),
    ("육각형", "hexagon", "hexagonal"),
    ("팔각형", "octagon", "octagonal"),
    ("기타", "other"),
)
_COLOURS = (
    ("하양", "white", "흰", "하얀", "백색"),
    ("노랑", "yellow", "노란", "황색"),
    ("주황", "orange"),
    ("분홍", "pink"),
    ("빨강", "red", "빨간", "적색"),
    ("갈색", "brown"),
    ("연두", "light green", "yellow green"),
    ("초록", "green", "녹색"),
    ("청록", "teal", "turquoise", "cyan"),
    ("파랑", "blue", "파란", "청색"),
    ("남색", "navy", "indigo"),
    ("자주", "magenta", "wine"),
    ("보라", "purple", "violet"),
    ("회색", "grey", "gray"),
    ("검정", "black", "검은", "흑색"),
    ("투명", "transparent", "clear"),
)
_NEAR = {
    frozenset(pair.split())
    for pair in (
        "원형 타원형", "타원형 장방형", "사각형 마름모형", "오각형 육각형", "육각형 팔각형", "원형 팔각형", "하양 노랑",
        "하양 회색", "하양 투명", "노랑 주황", "노랑 연두", "주황 분홍", "주황 빨강", "주황 갈색",
        "분홍 빨강", "분홍 보라", "빨강 갈색", "빨강 자주", "자주 보라", "자주 분홍", "연두 초록",
        "초록 청록", "청록 파랑", "파랑 남색", "남색 보라", "남색 검정", "회색 검정",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What is known beside a photo: `log_ratios` (classes,) to add to the calibrated logits, -inf where forbidden."""

    log_ratios: np.ndarray
    num_allowed: int
    """Number of possible codes."""
    hints: dict[str, np.ndarray] = field(default_factory=dict)
    """Likelihood ratio of every class (classes,), by hint."""

    @property
    def restricts(self) -> bool:
        return self.num_allowed < len(self.log_ratios)

    def facts(self, index: int, code: str, confidence: float, forbidden: float) -> dict[str, Any]:
        """What an answer says about the evidence: `unaided`, the answer of the photo alone (`code`, `confidence`);
        `restricted`, with the probability that the photo alone gives forbidden codes; the ratio of each hint for the
        class of `index`, that is named.
        """
        said: dict[str, Any] = {"unaided": {"code": code, "confidence": round(confidence, 4)}}
        if self.restricts:
            said["restricted"] = {"num_codes": self.num_allowed, "forbidden": round(forbidden, 4)}
        if self.hints:
            said["hints"] = {hint: round(float(ratios[index]), 3) for hint, ratios in self.hints.items()}
        return said


def gather(
    classes: Sequence[Mapping[str, Any]], allowed: Iterable[str] | None = None, hints: Sequence[str] = ()
) -> Evidence:
    """Evidence for `classes` (each with `code` and `attributes`) of the possible codes and hints such as `shape=round`.

    Raises UserError for unknown codes, hints that are not understood, and attributes that no class has.
    """
    possible = np.ones(len(classes), bool)
    if allowed is not None:
        index = {entry["code"]: i for i, entry in enumerate(classes)}
        possible[:] = False
        possible[[index[code] for code in allowed]] = True
    ratios = {}
    for (name, wanted), hint in {_parsed(hint): hint for hint in hints}.items():
        ratios[hint] = _ratios(classes, possible, name, wanted, hint)
    with np.errstate(divide="ignore"):
        total = np.log(possible) + sum(np.log(ratio) for ratio in ratios.values())
    return Evidence(total, int(possible.sum()), ratios)


def both_sides(front: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Logits (n, classes) of one answer from photos of both sides of n pills, from the calibrated logits of each photo.

    Bayes' rule for independent photos and equally likely codes adds log p(code | photo). A blank side says little, and
    its small differences are noise: the less certain photo counts by the square of the ratio of both confidences.
    """
    front, back = (photo - _log_sum(photo) for photo in (front, back))
    sure_front, sure_back = (np.exp(logs.max(1, keepdims=True)) for logs in (front, back))
    most = np.maximum(sure_front, sure_back)
    return (sure_front / most) ** 2 * front + (sure_back / most) ** 2 * back


def _log_sum(logits: np.ndarray) -> np.ndarray:
    highest = logits.max(1, keepdims=True)
    return highest + np.log(np.exp(logits - highest).sum(1, keepdims=True))


def read_allowed(path: Path, codes: Sequence[str]) -> list[str]:
    """Codes of a text file, one per line; `#` starts a comment. Raises UserError for unknown codes and for none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the list of codes as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file with one code per line") from None
    words = (re.split(r"(?:^|\s)#", line)[0].strip() for line in text.splitlines())
    listed = list(dict.fromkeys(unicodedata.normalize("NFC", word) for word in words if word))
    if not listed:
        raise UserError(f"{path}: names no code; write one code per line")
    known = {unicodedata.normalize("NFC", code): code for code in codes}
    unknown = [word for word in listed if word not in known]
    if unknown:
        named = "; ".join(f"{word!r}{_nearest(word, known)}" for word in unknown[:5])
        raise UserError(f"{path}: {len(unknown):,} of {len(listed):,} codes are not known to the model: {named}")
    return [known[word] for word in listed]


def canonical(name: str, value: str) -> str:
    """AI Hub's name of a shape or colour in Korean or English; of an unknown value, the value in small letters."""
    word = " ".join(unicodedata.normalize("NFKC", value).casefold().replace("-", " ").split())
    names = _names(name)
    for spelling in (word, word.removesuffix("색"), word.removesuffix(" shaped"), word + "형"):
        if spelling in names:
            return names[spelling]
    return word


def imprint_fit(read: str, imprint: str) -> float:
    """Fit of a text that was read to an imprint: MISREAD ** cost, the least cost of an edit from one into the other.

    A look-alike character costs 0.5 and any other wrong or surplus one 1; a character of the imprint that was not read
    costs 0.25, because imprints are read in part.
    """
    costs = [UNREAD_COST * j for j in range(len(imprint) + 1)]
    for i, ours in enumerate(read, start=1):
        row = [float(i)]
        for j, theirs in enumerate(imprint, start=1):
            row.append(min(costs[j - 1] + _swap(ours, theirs), costs[j] + 1, row[j - 1] + UNREAD_COST))
        costs = row
    return MISREAD ** costs[-1]


def imprint_text(text: str) -> str:
    """Capital letters and digits of an imprint, without score lines, logos, spaces and signs."""
    text = unicodedata.normalize("NFKC", text).upper()
    for mark in ("십자분할선", "분할선", "마크"):
        text = text.replace(mark, "")
    return "".join(character for character in text if character.isalnum())


def _parsed(hint: str) -> tuple[str, str]:
    """Attribute and value of a hint; two spellings of one hint are equal."""
    key, equals, value = hint.partition("=")
    key = unicodedata.normalize("NFC", key).strip().casefold()
    name = next((name for name, keys in _KEYS.items() if key in keys), "")
    if not name or not equals or not value.strip():
        raise UserError(f"--hint {hint!r} is not understood: write shape=round, colour=white or imprint=YH")
    wanted = imprint_text(value) if name == "imprint" else canonical(name, value)
    if not wanted:
        raise UserError(f"--hint {hint!r}: an imprint has letters or digits")
    return name, wanted


def _ratios(
    classes: Sequence[Mapping[str, Any]], possible: np.ndarray, name: str, wanted: str, hint: str
) -> np.ndarray:
    values = [known_values(entry.get("attributes") or {}, name) for entry in classes]
    known = np.array([bool(texts) for texts in values])
    if not known.any():
        raise UserError(f"--hint {hint!r}: no class has a known {name}; add them with --attributes")
    if name != "imprint":
        spellings = {**_names(name), **{text: text for texts in values for text in texts}}
        if wanted not in spellings:
            raise UserError(f"--hint {hint!r}: unknown {name}{_nearest(wanted, spellings)}")
    fits = np.array([max((_fit(name, wanted, text) for text in texts), default=0.0) for texts in values])
    counted = known & possible
    mean = (1 + fits[counted].sum()) / (counted.sum() + 1)
    return np.where(known, 1 - RIGHT[name] + RIGHT[name] * fits / mean, 1.0)


def known_values(attributes: Mapping[str, Any], name: str) -> list[str]:
    """What is known of a class: its shape, its colours, or its imprints of both sides, in one spelling."""
    if name == "imprint":
        texts = (imprint_text(str(attributes.get(side, ""))) for side in ("imprint_front", "imprint_back"))
        return [text for text in texts if text]
    found = attributes.get("colours", []) if name == "colour" else [attributes.get("shape", "")]
    return [canonical(name, str(text)) for text in found if text]


def _fit(name: str, wanted: str, text: str) -> float:
    if name == "imprint":
        return imprint_fit(wanted, text)
    return 1.0 if wanted == text else NEAR if frozenset((wanted, text)) in _NEAR else 0.0


def _swap(ours: str, theirs: str) -> float:
    if ours == theirs:
        return 0.0
    return LOOK_ALIKE_COST if any(ours in group and theirs in group for group in _LOOK_ALIKE) else 1.0


@lru_cache
def _names(name: str) -> dict[str, str]:
    return {word: words[0] for words in (_SHAPES if name == "shape" else _COLOURS) for word in words}


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(found)})" if found else ""
