"""Scores that tell known from unknown inputs, of a classifier's logits and pooled features; higher is more known.

Hendrycks and Gimpel, 2017 (maximum softmax); Hendrycks et al., 2022 (maximum logit); Liu et al., 2020 (energy); Sun et
al., 2022 (k nearest neighbours of normalised features); Lee et al., 2018 (Mahalanobis) and Ren et al., 2021 (relative);
Wang et al., 2022 (ViM); Park et al., 2023 (NNGuide).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pillsnap.export.pipeline import softmax

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Logits (n, classes), features (n, d) -> (n,)."""


@dataclass(frozen=True)
class Fitted:
    """What a score is fitted to: crops of known classes."""

    logits: np.ndarray
    features: np.ndarray
    labels: np.ndarray


def scores(fitted: Fitted) -> dict[str, Score]:
    """All scores by name."""
    return {
        "maximum softmax": lambda logits, features: softmax(logits).max(1),
        "maximum logit": lambda logits, features: logits.max(1),
        "energy": lambda logits, features: energy(logits),
        "margin of logits": lambda logits, features: -np.diff(np.sort(logits, 1)[:, [-1, -2]], axis=1)[:, 0],
        "1 nearest neighbour": nearest(fitted, 1),
        "5 nearest neighbours": nearest(fitted, 5),
        "nearest of the answer's class": nearest_of_answer(fitted),
        "class means, cosine": means(fitted),
        "mean of the answer's class, cosine": mean_of_answer(fitted),
        "Mahalanobis": mahalanobis(fitted, relative=False),
        "relative Mahalanobis": mahalanobis(fitted, relative=True),
        "ViM": vim(fitted),
        "NNGuide": nn_guide(fitted),
    }


def energy(logits: np.ndarray) -> np.ndarray:
    highest = logits.max(1)
    return highest + np.log(np.exp(logits - highest[:, None]).sum(1))


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def nearest(fitted: Fitted, k: int) -> Score:
    bank = unit(fitted.features)
    return lambda logits, features: np.sort(unit(features) @ bank.T, 1)[:, -k]


def nearest_of_answer(fitted: Fitted) -> Score:
    bank = unit(fitted.features)

    def score(logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        same = logits.argmax(1)[:, None] == fitted.labels[None]
        return np.where(same, unit(features) @ bank.T, -1).max(1)

    return score


def class_means(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    present = np.unique(labels)
    return np.stack([features[labels == label].mean(0) for label in present])


def means(fitted: Fitted) -> Score:
    centres = unit(class_means(unit(fitted.features), fitted.labels))
    return lambda logits, features: (unit(features) @ centres.T).max(1)


def mean_of_answer(fitted: Fitted) -> Score:
    centres = np.zeros((fitted.logits.shape[1], fitted.features.shape[1]))
    present = np.unique(fitted.labels)
    centres[present] = unit(class_means(unit(fitted.features), fitted.labels))
    return lambda logits, features: (unit(features) * centres[logits.argmax(1)]).sum(1)


def mahalanobis(fitted: Fitted, *, relative: bool) -> Score:
    index = np.unique(fitted.labels, return_inverse=True)[1]
    centres = class_means(fitted.features, fitted.labels)
    within = whitening(fitted.features - centres[index])
    middle = fitted.features.mean(0)
    overall = whitening(fitted.features - middle)

    def score(logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        x, c = features @ within, centres @ within
        distance = ((x**2).sum(1)[:, None] - 2 * x @ c.T + (c**2).sum(1)).min(1)
        return -distance + (((features - middle) @ overall) ** 2).sum(1) * relative

    return score


def whitening(deviations: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(deviations.T @ deviations / len(deviations))
    return vectors / np.sqrt(values.clip(0) + 1e-3 * values.mean())


def head(fitted: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """Weight (d, classes) and bias (classes,) of the linear head, from its inputs and outputs."""
    inputs = np.concatenate([fitted.features, np.ones((len(fitted.features), 1))], 1)
    solved = np.linalg.lstsq(inputs, fitted.logits, rcond=None)[0]
    return solved[:-1], solved[-1]


def vim(fitted: Fitted) -> Score:
    weight, bias = head(fitted)
    origin = -np.linalg.pinv(weight.T) @ bias
    centred = fitted.features - origin
    _, vectors = np.linalg.eigh(centred.T @ centred)
    num_kept = min(weight.shape[1], fitted.features.shape[1] // 2)  # of the paper: about half of the features
    rest = vectors[:, :-num_kept]

    def residual(features: np.ndarray) -> np.ndarray:
        return np.linalg.norm((features - origin) @ rest, axis=1)

    alpha = fitted.logits.max(1).mean() / residual(fitted.features).mean()
    return lambda logits, features: energy(logits) - alpha * residual(features)


def nn_guide(fitted: Fitted) -> Score:
    bank = unit(fitted.features) * energy(fitted.logits)[:, None]

    def score(logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        return np.sort(unit(features) @ bank.T, 1)[:, -10:].mean(1) * energy(logits)

    return score
