"""ultralytics' detection head with outputs, boxes and scores in single precision under autocast.

Imported only by functions of `detector.py`, after `quiet_ultralytics`.
"""

from __future__ import annotations

from typing import Any

import torch

from pillsnap.models.precision import at_least_single, compute_in_single, without_autocast


def make_head_precise(head: Any) -> None:
    """Make a `Detect` head compute its last convolutions, boxes and scores in float32; the rest follows autocast."""
    parts = [head.one2many, *([head.one2one] if getattr(head, "one2one_cv2", None) is not None else [])]
    for layers in (layers for part in parts for layers in part.values()):
        for level in layers:
            compute_in_single(level[-1])
    kind = type(head)
    head.__class__ = type(kind.__name__, (_PreciseHead, kind), {"built_as": kind})


class _PreciseHead:
    def forward_head(self, x: list[torch.Tensor], *heads: Any, **named_heads: Any) -> dict[str, Any]:
        outputs = super().forward_head(x, *heads, **named_heads)  # type: ignore[misc]
        if outputs:
            # The grid of anchors takes shape and type of the features. These occupy no memory.
            zero = at_least_single(x[0].new_zeros(()))
            outputs["feats"] = [zero.expand(features.shape) for features in x]
        return outputs

    def _inference(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        with without_autocast(x["scores"].device):
            return super()._inference(x)  # type: ignore[misc]
