"""Part `losses`: the detector's loss and gradient on one fixed batch, ours against ultralytics' own `model.loss`.

Weights and batch are the same for all. The reference is ultralytics in double precision where it runs in it, else in
single precision without TF32. Printed are relative differences of each loss component and of the gradient's norm, and
`gradient`: the length of the difference of the gradients as a share of the reference gradient's length.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.lease.report import Report

_STEPS_BEFORE = 30
"""Optimizer steps on the batch before the second comparison: the first one is of random weights."""


def losses(report: Report, quick: bool) -> None:
    from pillsnap.models.precision import this_device

    device = this_device()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for model in ("yolo11n",) if quick else ("yolo11m", "yolo11s"):
        _compare(report, model, 64 if quick else 640, 4 if quick else 8, device)


def _compare(report: Report, model: str, size_px: int, batch_size: int, device: torch.device) -> None:
    from benchmarks.gpu import settings_for
    from pillsnap.models.detector import build_detector
    from pillsnap.planner.measure import mock_batch
    from pillsnap.tasks.registry import make_task

    settings = settings_for(quick=False)
    chosen = settings.detection.model_copy(update={"image_size_px": size_px})
    task = make_task("detection", settings.model_copy(update={"detection": chosen}), ["K-000001"])
    batch = mock_batch(task, batch_size, device)
    images = batch.images.permute(0, 3, 1, 2).float() / 255
    boxes, num_boxes = batch.targets["boxes"].clone(), batch.targets["num_boxes"].clone()
    num_boxes[0] = 1  # photos differ in their number of boxes
    torch.manual_seed(settings.train.seed)
    detector = build_detector(
        model, "random", box_gain=chosen.box_gain, cls_gain=chosen.cls_gain, dfl_gain=chosen.dfl_gain
    )
    detector = detector.to(device).to(memory_format=torch.channels_last).train()
    for when in ("random weights", f"after {_STEPS_BEFORE} steps"):
        found: dict[str, tuple[dict[str, float], torch.Tensor]] = {}
        weights = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
        for kind in ("theirs fp64", "theirs fp32", "ours fp64", "ours fp32", "theirs bf16", "ours bf16"):
            detector.load_state_dict(weights)
            try:
                found[kind] = _evaluate(detector, kind, images, boxes, num_boxes)
            except Exception as error:
                report.line(f"{model} {kind}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
                detector.float()
        detector.load_state_dict(weights)
        reference = "theirs fp64" if "theirs fp64" in found else "theirs fp32"
        theirs_off = _differences(found["theirs fp32"], found[reference]).values()
        for kind in [kind for kind in found if kind != reference]:
            off = _differences(found[kind], found[reference])
            text = " ".join(f"{name} {value:.0e}" for name, value in off.items())
            report.line(f"{model} {when}, {kind} against {reference}: {text}", **{f"{model} {when} {kind}": off})
            # The gradient of random weights is off by 1e-3 in single precision, whoever computes it.
            if kind == "ours fp32" and max(off.values()) > max(1e-3, 2 * max(theirs_off)):
                report.problem(f"{model} {kind} is off by more than 1e-3 and twice theirs")
        _train_a_little(detector, images, boxes, num_boxes)
    _compare_boxes(report, model, detector, images)


def _evaluate(
    detector: Any, kind: str, images: torch.Tensor, boxes: torch.Tensor, num_boxes: torch.Tensor
) -> tuple[dict[str, float], torch.Tensor]:
    """Loss components an image, and the gradient as one vector on the device."""
    from pillsnap.models.dense_loss import dense_criterion
    from pillsnap.models.detector import _batch, detection_loss

    whose, precision = kind.split()
    detector.to(torch.float64 if precision == "fp64" else torch.float32)
    images = images.to(torch.float64 if precision == "fp64" else torch.float32)
    detector.zero_grad(set_to_none=True)
    detector.criterion = dense_criterion(detector) if whose == "ours" else detector.init_criterion()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        if whose == "ours":
            parts = detection_loss(detector, images, boxes, num_boxes)
        else:
            batch = _batch(detector.criterion, images.shape[-1], boxes, num_boxes) | {"img": images}
            total, _ = detector.loss(batch)
            parts = dict(zip(("box", "cls", "dfl"), total / len(images), strict=True))
    torch.stack(list(parts.values())).sum().backward()
    gradient = torch.cat([p.grad.double().flatten() for p in detector.parameters() if p.grad is not None])
    detector.float()
    return {name: float(part) for name, part in parts.items()} | {"norm": float(gradient.norm())}, gradient


def _differences(
    one: tuple[dict[str, float], torch.Tensor], reference: tuple[dict[str, float], torch.Tensor]
) -> dict[str, float]:
    off = {name: abs(one[0][name] - value) / abs(value) for name, value in reference[0].items()}
    return off | {"gradient": float((one[1] - reference[1]).norm() / reference[1].norm())}


def _train_a_little(detector: Any, images: torch.Tensor, boxes: torch.Tensor, num_boxes: torch.Tensor) -> None:
    from pillsnap.models.dense_loss import dense_criterion
    from pillsnap.models.detector import detection_loss

    detector.criterion = dense_criterion(detector)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    for _ in range(_STEPS_BEFORE):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            parts = detection_loss(detector, images, boxes, num_boxes)
        torch.stack(list(parts.values())).sum().backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def _compare_boxes(report: Report, model: str, detector: Any, images: torch.Tensor) -> None:
    """How far the boxes that validation gets in bfloat16 are off, in pixels: from 512 on it has steps of 4."""
    import copy

    found = []
    for enabled in (False, True):
        one = copy.deepcopy(detector).eval()  # the head keeps the precision of its first call
        with torch.autocast(images.device.type, torch.bfloat16, enabled=enabled):
            found.append(one(images)[0])
    off = (found[0][:, :4].float() - found[1][:, :4].float()).abs()
    sure = found[0][:, 4] > 0.25
    text = f"{model} boxes of validation in bf16 ({found[1].dtype}): off by {float(off.mean()):.2f} px"
    text += f", at most {float(off.max()):.1f}"
    if bool(sure.any()):
        text += f"; where the score is over 0.25: {float(off.amax(1)[sure].mean()):.2f} px"
    report.line(text, **{f"{model} bf16 boxes off px": float(off.mean())})
