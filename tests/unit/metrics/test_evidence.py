"""A list of possible codes and hints change an answer by the stated formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pillsnap.errors import UserError
from pillsnap.export.pipeline import softmax
from pillsnap.metrics.evidence import (
    RIGHT,
    Evidence,
    canonical,
    gather,
    imprint_fit,
    imprint_text,
    read_allowed,
)
from pillsnap.synthetic.catalog import CLASSES_PER_GROUP, build_catalog

CLASSES: list[dict[str, Any]] = [
    {"code": "K-000001", "attributes": {"shape": "원형", "colours": ["하양"], "imprint_front": "YH|분할선|LT"}},
    {"code": "K-000002", "attributes": {"shape": "장방형", "colours": ["파랑", "하양"], "imprint_back": "B8"}},
    {"code": "K-000003", "attributes": {"shape": "round", "imprint_front": "마크"}},
    {"code": "K-000004", "attributes": {}},
]


def listed(path: Path, text: str, encoding: str = "utf-8") -> Path:
    (path / "codes.txt").write_text(text, encoding=encoding)
    return path / "codes.txt"


def test_list_of_codes(tmp_path: Path) -> None:
    codes = [entry["code"] for entry in CLASSES]
    text = "# stock\nK-000003\n\n  K-000001\t# aspirin\r\nK-000003 # again\n"
    assert read_allowed(listed(tmp_path, text, "utf-8-sig"), codes) == ["K-000003", "K-000001"]
    for text, message in (
        ("# none\n\n", "names no code; write one code per line"),
        ("K-00001\nK-000001", r"1 of 2 codes are not known to the model: 'K-00001' \(nearest: K-000001"),
        ("xyz", "1 of 1 codes are not known to the model: 'xyz'$"),
    ):
        with pytest.raises(UserError, match=message):
            read_allowed(listed(tmp_path, text), codes)
    with pytest.raises(UserError, match="not UTF-8"):
        read_allowed(listed(tmp_path, "약", "cp949"), codes)
    with pytest.raises(UserError, match="cannot be read"):
        read_allowed(tmp_path, codes)


def test_restriction_renormalises_over_the_possible_codes() -> None:
    probabilities = np.array([[0.5, 0.3, 0.15, 0.05]])
    evidence = gather(CLASSES, ["K-000004", "K-000002"])
    assert evidence.restricts and evidence.num_allowed == 2
    found = softmax(np.log(probabilities) + evidence.log_ratios)
    np.testing.assert_allclose(found, [[0, 0.3 / 0.35, 0, 0.05 / 0.35]])
    assert evidence.facts(1, "K-000001", 0.5, 0.65) == {
        "unaided": {"code": "K-000001", "confidence": 0.5},
        "restricted": {"num_codes": 2, "forbidden": 0.65},
    }


def test_hint_multiplies_by_the_stated_ratio() -> None:
    evidence = gather(CLASSES, hints=["shape=Round"])
    mean = (1 + 2) / (3 + 1)  # two of three known shapes are round, and one more
    ratios = [0.1 + 0.9 / mean, 0.1, 0.1 + 0.9 / mean, 1.0]
    np.testing.assert_allclose(np.exp(evidence.log_ratios), ratios)
    assert evidence.facts(0, "K-000002", 0.9, 0.0)["hints"] == {"shape=Round": 1.3}
    twice = gather(CLASSES, hints=["shape=원형", "모양 = round"])
    np.testing.assert_allclose(np.exp(twice.log_ratios), ratios)
    both = gather(CLASSES, ["K-000001", "K-000002"], ["모양=원형", "colour=blue"])
    mean = (1 + 1) / (2 + 1)
    expected = (0.1 + 0.9 / mean) * 0.15, 0.1 * (0.15 + 0.85 / mean)
    np.testing.assert_allclose(np.exp(both.log_ratios), [*expected, 0, 0])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("원형", ("round", "Circle", "원형", "\u110b\u116f\u11ab\u1112\u1167\u11bc")),
        ("장방형", ("oblong", "capsule", "캡슐", "장방")),
        ("하양", ("white", "흰색", "하양", "하얀색")),
        ("연두", ("light-green", "연두색", "연두")),
        ("회색", ("gray", "grey", "회색")),
        ("blue shell", ("Blue  shell",)),
    ],
)
def test_names_in_korean_and_english_are_one(name: str, values: tuple[str, ...]) -> None:
    kind = "shape" if name.endswith("형") else "colour"
    assert {canonical(kind, value) for value in values} == {name}


def test_imprints_are_graded() -> None:
    assert imprint_text("yh 분할선|lt-1 마크") == "YHLT1" and imprint_text("십자분할선") == ""
    assert imprint_fit("YHLT", "YHLT") == 1.0
    assert imprint_fit("YH", "YHLT") == pytest.approx(10**-0.5)  # half of it was read
    assert imprint_fit("B8", "BB") == pytest.approx(10**-0.5)  # a look-alike
    assert imprint_fit("BX", "BB") == pytest.approx(0.1)
    assert imprint_fit("BBX", "BB") == pytest.approx(0.1)
    assert imprint_fit("XY", "BB") == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        ("round", "is not understood: write shape=round, colour=white or imprint=YH"),
        ("shape=", "is not understood"),
        ("size=3", "is not understood"),
        ("shape=rond", "unknown shape .nearest: round"),
        ("colour=qqqq", "unknown colour$"),
        ("imprint=분할선", "an imprint has letters or digits"),
    ],
)
def test_hint_that_is_not_understood_is_refused(hint: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        gather(CLASSES, hints=[hint])
    with pytest.raises(UserError, match="no class has a known shape; add them with --attributes"):
        gather(CLASSES[3:], hints=["shape=round"])


NUM_CLASSES, PER_CLASS = 120, 20


@pytest.fixture(scope="module")
def hard() -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Classes, labels (n,) and log probabilities (n, classes) of a classifier that confuses the six of a group: shape,
    colours and size tell groups apart, the imprint alone tells the classes of a group apart.
    """
    pills = build_catalog(3, NUM_CLASSES, "shared")
    classes = [
        {"code": pill.code, "attributes": {"shape": pill.look.shape, "colours": [pill.look.colour],
         "imprint_front": pill.prints[0], "imprint_back": pill.prints[1]}}
        for pill in pills
    ]  # fmt: skip
    looks = [pill.look for pill in pills]
    assert max(looks.count(look) for look in looks) == CLASSES_PER_GROUP
    alike = np.array([[(a == b) + 0.4 * (a.shape == b.shape and a.colour == b.colour) for b in looks] for a in looks])
    labels = np.repeat(np.arange(NUM_CLASSES), PER_CLASS)
    rng = np.random.default_rng(0)
    # Calibrated: the logits are log likelihoods of a Gaussian observation of each class.
    scale = 3.2 * (2 - alike[labels].clip(0, 1))
    scale[np.arange(len(labels)), labels] = 0
    noise = rng.normal(size=scale.shape)
    return classes, labels, np.log(softmax(-(scale**2) / 2 + scale * noise))


def top1(classes: list[dict[str, Any]], labels: np.ndarray, logs: np.ndarray, hints: list[list[str]]) -> float:
    """Share of right answers, with the hints of each sample."""
    known: dict[str, np.ndarray] = {}
    total = np.zeros_like(logs)
    for row, given in enumerate(hints):
        for hint in given:
            if hint not in known:
                known[hint] = gather(classes, hints=[hint]).log_ratios
            total[row] += known[hint]
    return float(((logs + total).argmax(1) == labels).mean())


def given_hints(classes: list[dict[str, Any]], labels: np.ndarray, names: list[str], wrong: float) -> list[list[str]]:
    """Hints about `names` of each sample; a share `wrong` of them is that of another class at random."""
    rng = np.random.default_rng(1)
    keys = {"shape": "shape", "colour": "colours", "imprint": "imprint_front"}
    rows = []
    for label in labels:
        row = []
        for name in names:
            owner = int(rng.integers(len(classes))) if rng.random() < wrong else label
            value = classes[owner]["attributes"][keys[name]]
            row.append(f"{name}={value[0] if name == 'colour' else value}")
        rows.append(row)
    return rows


def test_right_hints_raise_top1_and_wrong_ones_cost_little(
    hard: tuple[list[dict[str, Any]], np.ndarray, np.ndarray],
) -> None:
    classes, labels, logs = hard
    found = {
        (names, wrong): top1(classes, labels, logs, given_hints(classes, labels, names.split(), wrong))
        for names in ("", "shape", "imprint", "colour imprint")
        for wrong in (0.0, 0.1, 1.0)
    }
    print(found)
    assert 0.6 < found["", 0.0] < 0.75
    assert found["shape", 0.0] > found["", 0.0] + 0.02
    assert found["imprint", 0.0] > found["", 0.0] + 0.25
    assert found["colour imprint", 0.0] >= found["imprint", 0.0]
    for names in ("shape", "imprint", "colour imprint"):
        assert found["", 0.0] < found[names, 0.1] < found[names, 0.0] < found[names, 0.1] + 0.04
        assert found[names, 1.0] > found["", 0.0] - 0.08  # only wrong hints


def test_wrong_hint_never_hides_an_answer(hard: tuple[list[dict[str, Any]], np.ndarray, np.ndarray]) -> None:
    classes, _, logs = hard
    for hint in ("shape=pentagon", "colour=red", "imprint=QQ9"):
        evidence = gather(classes, hints=[hint])
        ratios = np.exp(evidence.log_ratios)
        name = hint.partition("=")[0]
        assert ratios.min() >= 1 - RIGHT[name] - 1e-9 and np.isfinite(ratios).all()
        before, after = softmax(logs), softmax(logs + evidence.log_ratios)
        kept = after / before * (before * ratios).sum(1, keepdims=True)
        assert kept.min() >= 1 - RIGHT[name] - 1e-9
    assert isinstance(evidence, Evidence) and math.isfinite(evidence.log_ratios.sum())


def test_restriction_to_twenty_codes_raises_top1(hard: tuple[list[dict[str, Any]], np.ndarray, np.ndarray]) -> None:
    classes, labels, logs = hard
    chosen = np.random.default_rng(2).permutation(NUM_CLASSES)[:20]
    evidence = gather(classes, [classes[i]["code"] for i in chosen])
    shown = np.isin(labels, chosen)
    alone = float((logs[shown].argmax(1) == labels[shown]).mean())
    restricted = float(((logs + evidence.log_ratios)[shown].argmax(1) == labels[shown]).mean())
    print(alone, restricted)
    assert restricted > alone + 0.2
