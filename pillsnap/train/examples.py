"""Draws a panel of example predictions from a validation batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pillsnap.data.loader import DeviceBatch
from pillsnap.tasks.base import Task

_COLUMNS, _MAX_IMAGES = 4, 8
_GREEN, _RED, _BLUE = (40, 170, 80), (215, 60, 50), (50, 110, 230)
_SHOWN_SCORE = 0.25


def draw_examples(task: Task, batch: DeviceBatch, facts: list[Any], run_dir: Path, epoch: int) -> Path:
    """Write `examples/<task>-epoch-NNNN.png`: labels in green and detections in blue, or crops with a green frame when
    right and a red one when wrong.
    """
    images = batch.images[batch.targets["valid"]][:_MAX_IMAGES].cpu().numpy()
    tiles = [_draw(task.name, image.copy(), fact) for image, fact in zip(images, facts, strict=False)]
    if not tiles:
        tiles = [np.full((64, 64, 3), 255, np.uint8)]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % _COLUMNS)
    rows = [np.hstack(tiles[i : i + _COLUMNS]) for i in range(0, len(tiles), _COLUMNS)]
    path = run_dir / "examples" / f"{task.name}-epoch-{epoch:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.vstack(rows)[..., ::-1])
    return path


def _draw(task_name: str, image: np.ndarray, fact: Any) -> np.ndarray:
    if task_name == "classification":
        rank = fact[0]
        thickness = max(2, len(image) // 32)
        return cv2.rectangle(image, (0, 0), (len(image) - 1, len(image) - 1), _GREEN if rank == 0 else _RED, thickness)
    found, labels = fact
    for boxes, colour in ((labels, _GREEN), (found[found[:, 4] >= _SHOWN_SCORE], _BLUE)):
        for x, y, width, height in boxes[:, :4].round().astype(int).tolist():
            cv2.rectangle(image, (x, y), (x + width, y + height), colour, 1)
    return image
