"""What is answered to a pill: a code, with a stated share of wrong ones, `unsure`, or `unknown`.

Likeness to the trained classes is the relative Mahalanobis distance of the classifier's features (Ren et al., "A
Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021): how much nearer they are to a class mean,
under the covariance within classes, than to the mean of all, under the covariance of all. likeness.py fits it.
benchmarks/log/unknown.md compares it with other scores.

`pillsnap export` copies this file beside the models: it needs numpy alone.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pillsnap.errors import UserError

LIMITS_NAME = "limits.npz"
ANSWERS = ("code", "unsure", "unknown")
NOT_EVALUATED = {"answer": "unsure", "reason": "the model has no limits: evaluate its run with `pillsnap evaluate`"}
"""The answer to every pill of a run without limits."""
ENROLLED = {"answer": "unsure", "reason": "the limits were fitted before this drug was enrolled"}


@dataclass(frozen=True)
class Limits:
    """From which confidence and likeness on a pill is answered with a code.

    Of c classes and d features: `middle` (d,), `overall` (d, d), `within` (d, d) and `centres` (c, d), float32; see
    `likeness`. At 5,000 classes and 1,280 features 39 MB.
    """

    model: str
    """SHA-256 of the classifier's weights; the limits hold for no others."""
    max_wrong: float
    """Largest share of wrong codes among the answers with a code."""
    confidence: float
    """Least confidence of an answer with a code; infinite if none is known to keep `max_wrong`."""
    known: float
    """Least likeness of a known pill."""
    middle: np.ndarray
    overall: np.ndarray
    within: np.ndarray
    centres: np.ndarray

    def likeness(self, features: np.ndarray) -> np.ndarray:
        """Likeness (k,) of features (k, d) to the trained classes; higher is more alike."""
        deviations = features - self.middle
        points = deviations @ self.within
        squares = (points**2).sum(1)[:, None] - 2 * points @ self.centres.T + (self.centres**2).sum(1)
        return (((deviations @ self.overall) ** 2).sum(1) - squares.min(1)).astype(np.float64)

    @property
    def precision(self) -> np.ndarray:
        """The inverse of the covariance within a class, shrunk, (d, d) float64."""
        within = self.within.astype(np.float64)
        return within @ within.T

    def answer(self, confidence: float, known: float) -> dict[str, Any]:
        """`answer` (one of ANSWERS) to a pill of this confidence and likeness, and its `reason`; None for a code."""
        kept = f"the limit for at most {100 * self.max_wrong:g} % wrong codes"
        if not known >= self.known:
            return {"answer": "unknown", "reason": f"likeness {known:.1f} is below {self.known:.1f}"}
        if self.confidence == np.inf:
            return {"answer": "unsure", "reason": f"no confidence is known to be {kept}"}
        if confidence < self.confidence:
            return {"answer": "unsure", "reason": f"confidence {confidence:.4f} is below {self.confidence:.4f}, {kept}"}
        return {"answer": "code", "reason": None}

    def to_bytes(self) -> bytes:
        """Contents of the file LIMITS_NAME: arrays, without pickles."""
        file = io.BytesIO()
        np.savez(file, **asdict(self))
        return file.getvalue()


def answer_of(
    limits: Limits | None, confidence: float, known: float | None, *, enrolled: bool = False
) -> dict[str, Any]:
    """As Limits.answer; without limits, or a likeness, NOT_EVALUATED. An `enrolled` drug is like no trained class, and
    how often its code is wrong is not known: ENROLLED.
    """
    if limits is None or known is None:
        return NOT_EVALUATED
    return ENROLLED if enrolled else limits.answer(confidence, known)


def read_limits(folder: str | Path) -> Limits | None:
    """The limits in a folder; None if there are none. Raises UserError for a damaged file."""
    path = Path(folder) / LIMITS_NAME
    try:
        with np.load(path) as file:
            values = {each.name: file[each.name] for each in fields(Limits)}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): evaluate the run again") from None
    return Limits(**{name: value if value.ndim else value.item() for name, value in values.items()})
