"""ultralytics' detection loss over all anchors, without host syncs.

ultralytics selects the assigned anchors, which makes the host wait for their number several times per step. Here the
other anchors have weight 0: the same sums, within rounding. On a CPU selecting is faster. Imported only by functions of
`detector.py`, after `quiet_ultralytics`.
"""

from __future__ import annotations

from typing import Any

import torch
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import TaskAlignedAssigner, bbox2dist

from pillsnap.models.precision import at_least_single

_MAX_PAIRS = 2**24
"""Maximum number of pairs of box and anchor computed at once, for memory; above it, as ultralytics does."""


def dense_criterion(detector: Any) -> Any:
    """`detector.init_criterion()` as a dense loss.

    Its batch has `boxes` (n, m, 4) x, y, w, h in pixels, `num_boxes` (n,), and optionally `unsure` (n, k, 4): areas
    with possibly unlabelled pills, in which unassigned anchors have no class loss.
    """
    if getattr(detector.model[-1], "one2one_cv2", None) is not None:
        return E2ELoss(detector, loss_fn=DenseLoss)
    return DenseLoss(detector)


def is_dense(criterion: Any) -> bool:
    """Whether a criterion takes padded boxes."""
    return isinstance(getattr(criterion, "one2many", criterion), DenseLoss)


class DenseAssigner(TaskAlignedAssigner):
    """Assigns anchors to boxes by scores and overlaps of all pairs.

    Feng et al., "TOOD: Task-aligned One-stage Object Detection", 2021, as in ultralytics.
    """

    def get_box_metrics(
        self, pd_scores: torch.Tensor, pd_bboxes: torch.Tensor, gt_labels: torch.Tensor, gt_bboxes: torch.Tensor,
        mask_gt: torch.Tensor, **extra: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Alignment and overlap (n, m, anchors); 0 where `mask_gt` (n, m, anchors) is 0."""
        if mask_gt.numel() > _MAX_PAIRS:
            return super().get_box_metrics(pd_scores, pd_bboxes, gt_labels, gt_bboxes, mask_gt, **extra)
        allowed = mask_gt.bool()
        overlaps = self.iou_calculation(gt_bboxes[:, :, None], pd_bboxes[:, None])
        overlaps = torch.where(allowed, overlaps, 0)
        anchors = pd_scores.shape[1]
        scores = pd_scores.transpose(1, 2).gather(1, gt_labels.long().expand(-1, -1, anchors))
        return torch.where(allowed, scores.pow(self.alpha) * overlaps.pow(self.beta), 0), overlaps

    def select_candidates_in_gts(
        self, xy_centers: torch.Tensor, gt_bboxes: torch.Tensor, mask_gt: torch.Tensor, eps: float = 1e-9
    ) -> torch.Tensor:
        """Whether anchor centres are inside boxes, bool (n, m, anchors); boxes are widened to `stride_val`."""
        low, high = gt_bboxes[:, :, None].chunk(2, 3)
        side = (high - low).clamp(min=self.stride_val)
        half, middle = torch.where(mask_gt[..., None].bool(), side, high - low) / 2, (low + high) / 2
        return ((xy_centers - (middle - half) > eps) & (middle + half - xy_centers > eps)).all(3)


class DenseLoss(v8DetectionLoss):
    """Box, class and distribution-focal loss over all anchors."""

    def __init__(self, model: Any, tal_topk: int = 10, tal_topk2: int | None = None) -> None:
        super().__init__(model, tal_topk, tal_topk2)
        theirs: TaskAlignedAssigner = self.assigner  # type: ignore[has-type]
        self.assigner = DenseAssigner(
            topk=tal_topk, topk2=tal_topk2, num_classes=self.nc, alpha=theirs.alpha, beta=theirs.beta,
            stride=theirs.stride,
        )  # fmt: skip
        self._grids: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def loss(
        self, preds: dict[str, Any], batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Box, class and distribution loss (3,), with gains, times the number of images; and the same by name."""
        distances, logits = (at_least_single(preds[name]).permute(0, 2, 1).contiguous() for name in ("boxes", "scores"))
        centres, strides = self._grid(preds["feats"])
        found = self.bbox_decode(centres, distances)
        boxes, num_boxes = batch["boxes"], batch["num_boxes"]
        given = torch.arange(boxes.shape[1], device=boxes.device) < num_boxes[:, None]
        corners = torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], 2) * given[..., None]
        _, wanted, scores, chosen, _ = self.assigner(
            logits.detach().sigmoid(), (found.detach() * strides).type(corners.dtype), centres * strides,
            torch.zeros_like(corners[..., :1]), corners, given[..., None].type(corners.dtype),
        )  # fmt: skip
        wanted, weight, total = wanted / strides, scores.sum(-1, keepdim=True), scores.sum().clamp_(min=1)
        each = self.bce(logits, scores.to(logits.dtype))
        if self.class_weights is not None:
            each = each * self.class_weights
        if "unsure" in batch:
            each = each * (chosen | ~_within(centres * strides, batch["unsure"]))[..., None]
        class_loss = each.sum() / total
        # Unassigned anchors get the target box, since NaN * 0 would be NaN in the gradient.
        overlap = bbox_iou(torch.where(chosen[..., None], found, wanted), wanted, xywh=False, CIoU=True)
        box_loss = ((1 - overlap) * weight).sum() / total
        form_loss = (self._form(distances, wanted, centres, strides, preds["feats"][0]) * weight).sum() / total
        losses = torch.stack(
            [part.float() * gain for part, gain in (
                (box_loss, self.hyp.box), (class_loss, self.hyp.cls), (form_loss, self.hyp.dfl)
            )]
        )  # fmt: skip
        return losses * len(boxes), dict(zip(self.loss_names, losses.detach(), strict=True))

    def _form(
        self, distances: torch.Tensor, wanted: torch.Tensor, centres: torch.Tensor, strides: torch.Tensor,
        finest: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """(n, anchors, 1): loss of the distances to a box's four sides: distribution-focal, or L1 without it."""
        shape = (*distances.shape[:2], 1)
        if self.use_dfl:
            sides = bbox2dist(centres, wanted, self.reg_max - 1)
            return self.bbox_loss.dfl_loss(distances.view(-1, self.reg_max), sides.view(-1, 4)).view(shape)
        height, width = (length * self.assigner.stride[0] for length in finest.shape[2:])
        off = (distances - bbox2dist(centres, wanted)).abs() * strides
        return torch.stack([off[..., 0::2] / width, off[..., 1::2] / height]).mean((0, 3)).view(shape)

    def _grid(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres (anchors, 2) and strides (anchors, 1), cached for the last image size."""
        key = (tuple(feature.shape[2:] for feature in features), torch.promote_types(features[0].dtype, torch.float32))
        if key not in self._grids:
            centres, strides = [], []
            options: dict[str, Any] = {"device": self.device, "dtype": key[1]}
            for (height, width), stride in zip(key[0], self.assigner.stride, strict=True):
                y, x = torch.meshgrid(
                    torch.arange(height, **options) + 0.5, torch.arange(width, **options) + 0.5, indexing="ij"
                )
                centres.append(torch.stack([x, y], -1).view(-1, 2))
                strides.append(torch.full((height * width, 1), stride, **options))
            self._grids = {key: (torch.cat(centres), torch.cat(strides))}
        return self._grids[key]


def _within(points: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
    """Whether points (anchors, 2) are in any of the areas (n, k, 4) x, y, w, h; bool (n, anchors)."""
    low, high = areas[:, :, None, :2], areas[:, :, None, :2] + areas[:, :, None, 2:]
    return ((points >= low) & (points < high)).all(3).any(1)
