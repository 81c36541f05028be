"""Drugs that were enrolled after the training: rows of the classifier's head, beside the trained ones, in one file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pillsnap.errors import UserError
from pillsnap.files import MISSING, write_atomically
from pillsnap.manifest.table import ClassInfo

ENROLLED_FILE = "enrolled.safetensors"
_ROWS = ("weight", "bias", "lowered")


@dataclass(frozen=True)
class Enrolled:
    """`classes` in the order of their enrolment, each with its number of photos, `num_train`; one row per photo,
    `weight` (rows, d) and `bias` (rows,), and `lowered` (classes,), all float32; `model`, the SHA-256 of the weights
    that gave the features.

    The logit of a class is the highest one of its rows, less the highest one of `lowered`: what the enrolment of each
    class needed for all.
    """

    classes: list[ClassInfo]
    weight: np.ndarray
    bias: np.ndarray
    lowered: np.ndarray
    model: str

    @classmethod
    def none(cls, num_features: int, model: str) -> Enrolled:
        """No drugs yet."""
        nothing = np.zeros(0, np.float32)
        return cls([], np.zeros((0, num_features), np.float32), nothing, nothing, model)

    @property
    def codes(self) -> list[str]:
        return [info.code for info in self.classes]

    @property
    def of_row(self) -> np.ndarray:
        """Index of the class of each row."""
        return np.repeat(np.arange(len(self.classes)), [info.num_train for info in self.classes])

    @property
    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight (classes, most rows, d) and bias (classes, most rows); a class of fewer rows repeats its first one."""
        most = max((info.num_train for info in self.classes), default=1)
        rows = []
        for number in range(len(self.classes)):
            own = np.flatnonzero(self.of_row == number)
            rows.append(np.concatenate([own, np.repeat(own[:1], most - len(own))]))
        index = np.array(rows, np.int64).reshape(-1, most)
        return self.weight[index], self.bias[index] - self.lowered.max(initial=0)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Logits (n, classes) of features (n, d)."""
        weight, bias = self.padded
        return (np.einsum("nd,crd->ncr", features, weight, optimize=True) + bias).max(2)

    def with_drug(self, info: ClassInfo, weight: np.ndarray, bias: np.ndarray, lowered: float = 0.0) -> Enrolled:
        """These drugs and one more, of the rows `weight` (photos, d) and `bias` (photos,)."""
        return Enrolled(
            [*self.classes, replace(info, num_train=len(weight))],
            np.concatenate([self.weight, weight]).astype(np.float32),
            np.append(self.bias, bias).astype(np.float32),
            np.append(self.lowered, lowered).astype(np.float32),
            self.model,
        )

    def without(self, code: str) -> Enrolled:
        """These drugs but one. Raises UserError when it is not among them."""
        if code not in self.codes:
            raise UserError(f"{code} is not enrolled; enrolled are: {', '.join(self.codes) or 'none'}.")
        number = self.codes.index(code)
        rows = self.of_row != number
        classes = [info for info in self.classes if info.code != code]
        return Enrolled(classes, self.weight[rows], self.bias[rows], np.delete(self.lowered, number), self.model)

    def require(self, model: str, where: str | Path) -> None:
        """Raise UserError when the drugs were enrolled with other weights than those of the SHA-256 `model`."""
        if model != self.model:
            raise UserError(
                f"The drugs in {where} were enrolled with other weights, before the classifier was trained further: "
                f"remove them with `pillsnap enrol --run {where} --remove CODE` and enrol them again "
                f"({', '.join(self.codes[:5])}{', …' if len(self.codes) > 5 else ''})."
            )


def read_enrolled(run_dir: Path) -> Enrolled | None:
    """The enrolled drugs of a run; None when there are none. Raises UserError for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = run_dir / ENROLLED_FILE
    try:
        data = path.read_bytes()
    except MISSING:
        return None
    try:
        tensors = load(data)
        facts = json.loads(bytes(tensors["facts"]))
        classes = [ClassInfo(**entry) for entry in facts["classes"]]
        found = Enrolled(classes, tensors["weight"], tensors["bias"], tensors["lowered"], facts["model"])
        sizes = len(found.weight), found.bias.size, found.lowered.size
        if found.weight.ndim != 2 or sizes != (len(found.of_row), len(found.of_row), len(classes)):
            raise ValueError("another number of rows than of photos")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a file of enrolled drugs ({reason}); restore or delete it.") from None
    return found


def write_enrolled(run_dir: Path, enrolled: Enrolled) -> None:
    """Write the drugs atomically; without any, no file is left. The same drugs give the same bytes."""
    from safetensors.numpy import save

    path = run_dir / ENROLLED_FILE
    if not enrolled.classes:
        path.unlink(missing_ok=True)
        return
    facts = {"model": enrolled.model, "classes": [replace(info, index=0).to_dict() for info in enrolled.classes]}
    text = json.dumps(facts, ensure_ascii=False).encode("utf-8")
    # A tensor: the metadata of safetensors have no fixed order.
    rows = {name: getattr(enrolled, name) for name in _ROWS} | {"facts": np.frombuffer(text, np.uint8)}
    write_atomically(path, save({name: np.ascontiguousarray(values) for name, values in rows.items()}))
