"""Limits survive their file; answers name their limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pillsnap.errors import UserError
from pillsnap.metrics.likeness import fit_likeness
from pillsnap.metrics.limits import ENROLLED, LIMITS_NAME, NOT_EVALUATED, answer_of, read_limits
from tests.unit.metrics.test_likeness import crops


def test_limits_survive_their_file(tmp_path: Path) -> None:
    assert read_limits(tmp_path) is None
    features, labels = crops()
    limits = replace(fit_likeness("abc", features, labels), max_wrong=0.01, known=-3.5)
    (tmp_path / LIMITS_NAME).write_bytes(limits.to_bytes())
    found = read_limits(tmp_path)
    assert found is not None
    assert (found.model, found.max_wrong, found.confidence, found.known) == ("abc", 0.01, np.inf, -3.5)
    np.testing.assert_array_equal(found.likeness(features), limits.likeness(features))
    (tmp_path / LIMITS_NAME).write_bytes(limits.to_bytes()[:-200])
    with pytest.raises(UserError, match=r"limits.npz is damaged .*: evaluate the run again"):
        read_limits(tmp_path)


def test_answers_name_their_limit() -> None:
    limits = replace(fit_likeness("m", *crops()), max_wrong=0.01, confidence=0.9, known=-5.0)
    assert limits.answer(0.9, -5.0) == {"answer": "code", "reason": None}
    assert limits.answer(0.8999, 0.0) == {
        "answer": "unsure",
        "reason": "confidence 0.8999 is below 0.9000, the limit for at most 1 % wrong codes",
    }
    assert limits.answer(1.0, -5.1) == {"answer": "unknown", "reason": "likeness -5.1 is below -5.0"}
    assert limits.answer(0.0, float("nan"))["answer"] == "unknown"  # logits that are not finite
    never = replace(limits, confidence=np.inf).answer(1.0, 0.0)
    assert never["answer"] == "unsure" and "no confidence is known" in never["reason"]


def test_without_limits_or_for_an_enrolled_drug_the_answer_is_unsure() -> None:
    limits = replace(fit_likeness("m", *crops()), max_wrong=0.01, confidence=0.9, known=-5.0)
    assert answer_of(None, 1.0, 0.0) == answer_of(limits, 1.0, None) == NOT_EVALUATED
    assert answer_of(limits, 1.0, 0.0) == {"answer": "code", "reason": None}
    assert answer_of(limits, 1.0, -9.0, enrolled=True) == ENROLLED
    assert ENROLLED["answer"] == NOT_EVALUATED["answer"] == "unsure"
