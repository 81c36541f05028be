"""Rows of a classifier's head for classes that were never trained, from the features of a few photos.

A new class has one row for each of its photos, because its two sides differ, and the logit of the highest. With the
mean m of trained crops, their covariance S within a class, and p, a photo's features drawn a little towards the mean of
the class, a row is a linear discriminant:

    score(f) = d . (f - (p + m) / 2),    d = S^-1 (p - m),    logit(f) = scale * score(f) + offset

`scale` and `offset` make it comparable with the trained logits. Trained classes play new ones: they get such rows, from
as many of their validation crops, in place of the trained one, and both numbers minimise the negative log-likelihood of
other validation crops, at the temperature; this is nearly convex.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

TOWARDS_MEAN = 0.3
NUM_ROUNDS = 4
PLAYING, MAX_PLAYING = 0.3, 100
"""Share of the classes that play new ones in a round and their weight in the likelihood; their highest number."""
MAX_OTHERS = 2000
"""Crops of a round that do not play."""


@dataclass(frozen=True)
class Crops:
    """Validation crops of the trained classes: `features` (n, d), `logits` (n, classes), `labels` (n,)."""

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class _Round:
    """Of n crops: log-sum-exp of the trained logits that are left, `rest` (n,); `scores` (n, playing); the class that
    plays, or -1, `playing` (n,); and the logit of a label that does not play, `own` (n,).
    """

    rest: torch.Tensor
    scores: torch.Tensor
    playing: torch.Tensor
    own: torch.Tensor


class Imprinter:
    """Makes rows for new classes beside a trained head: `mean` (d,) and `precision` (d, d), the inverse of S, are of
    training crops; scale and offset come from validation `crops`, of which two at least have one class.
    """

    def __init__(self, crops: Crops, temperature: float, mean: np.ndarray, precision: np.ndarray) -> None:
        self._crops, self._temperature = crops, temperature
        self._mean, self._precision = mean.astype(np.float64), precision
        self._several = np.flatnonzero(np.bincount(crops.labels) > 1)
        self._fitted: dict[int, tuple[float, float]] = {}

    def rows(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weight (photos, d) and bias (photos,) of a class, from the features (photos, d) of its photos."""
        if len(features) not in self._fitted:
            self._fitted[len(features)] = self._fit(len(features))
        scale, offset = self._fitted[len(features)]
        weight, bias = self._scores(features)
        return scale * weight, scale * bias + offset

    def _scores(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points = (1 - TOWARDS_MEAN) * features + TOWARDS_MEAN * features.mean(0, dtype=np.float64)
        weight = (points - self._mean) @ self._precision
        return weight, -((points + self._mean) * weight).sum(1) / 2

    def _fit(self, num_photos: int) -> tuple[float, float]:
        """Scale and offset for classes of so many photos."""
        rng = np.random.default_rng(0)
        rounds = [self._round(num_photos, rng) for _ in range(NUM_ROUNDS)]
        scores = torch.cat([each.scores.flatten() for each in rounds])
        centre, spread = float(scores.mean()), float(scores.std())
        parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for each in rounds:
                new = parameters[0] * (each.scores - centre) / spread + parameters[1]
                of_playing = new.gather(1, each.playing.clamp(min=0)[:, None])[:, 0]
                label = torch.where(each.playing >= 0, of_playing, each.own)
                losses = torch.logaddexp(each.rest, new.logsumexp(1)) - label
                plays = each.playing >= 0
                total = total + PLAYING * losses[plays].mean() + (1 - PLAYING) * losses[~plays].mean()
            total.backward()
            return total

        optimizer.step(loss)
        slope, offset = (self._temperature * value for value in parameters.tolist())
        return slope / spread, offset - slope * centre / spread

    def _round(self, num_photos: int, rng: np.random.Generator) -> _Round:
        crops, several = self._crops, self._several
        number = min(MAX_PLAYING, max(1, round(PLAYING * len(several))))
        classes = rng.choice(several, number, replace=False)
        played, rows = [], []
        for label in classes:
            own = rng.permutation(np.flatnonzero(crops.labels == label))
            photos = min(num_photos, len(own) - 1)
            rows.append(self._scores(crops.features[own[:photos]]))
            played.append(own[photos:])
        others = rng.permutation(np.flatnonzero(~np.isin(crops.labels, classes)))
        chosen = np.concatenate([*played, others[:MAX_OTHERS]])
        logits = torch.from_numpy(crops.logits[chosen]).double() / self._temperature
        labels = crops.labels[chosen]
        own_logits = logits[torch.arange(len(labels)), torch.from_numpy(labels)]
        logits[:, torch.from_numpy(classes)] = -torch.inf
        features = crops.features[chosen]
        scores = np.stack([(features @ weight.T + bias).max(1) for weight, bias in rows], 1)
        playing = np.full(crops.logits.shape[1], -1)
        playing[classes] = np.arange(len(classes))
        return _Round(logits.logsumexp(1), torch.from_numpy(scores), torch.from_numpy(playing[labels]), own_logits)
