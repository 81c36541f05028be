"""The detector: ultralytics' own loss and boxes, inside another loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pillsnap.errors import UserError
from pillsnap.models.detector import build_detector, detect, detection_loss, export_for_ultralytics

GAINS = {"box_gain": 7.5, "cls_gain": 0.5, "dfl_gain": 1.5}


@pytest.fixture(scope="module")
def detector() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_detector("yolo11n", "random", **GAINS)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    boxes = torch.zeros(3, 5, 4)
    boxes[0, :2] = torch.tensor([[10.0, 12, 30, 24], [50, 40, 20, 40]])
    boxes[2, 0] = torch.tensor([5.0, 5, 80, 70])
    return images, boxes, torch.tensor([2, 0, 1])


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_loss_and_gradients_equal_ultralytics_own(name: str) -> None:
    """Against `DetectionModel.loss` with the batch that ultralytics' own data set would give."""
    torch.manual_seed(0)
    model = build_detector(name, "random", **GAINS).train()
    images, boxes, num_boxes = batch()
    ours = detection_loss(model, images, boxes, num_boxes)
    (sum(ours.values()) * len(images)).backward()
    our_gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    reference = build_detector(name, "random", **GAINS).train()
    theirs = {
        "img": images,
        "batch_idx": torch.tensor([0.0, 0, 2]),
        "cls": torch.zeros(3, 1),
        "bboxes": torch.tensor([[25.0, 24, 30, 24], [60, 60, 20, 40], [45, 40, 80, 70]]) / 96,
    }
    loss, _ = reference.loss(theirs)
    loss.sum().backward()
    assert float(sum(ours.values()).detach() * 3) == pytest.approx(float(loss.sum().detach()), rel=1e-6)
    for n, p in reference.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(our_gradients[n], p.grad, rtol=1e-5, atol=1e-5)


def test_environment_is_set_before_ultralytics_is_imported_and_not_at_import(tmp_path: Path) -> None:
    code = """if True:
        import os, socket, sys
        lookups = []
        socket.getaddrinfo = lambda *host, **_: lookups.append(host)
        import pillsnap.models.detector as detector
        assert not any(name.startswith("YOLO_") for name in os.environ) and "ultralytics" not in sys.modules
        detector.build_detector("yolo11n", "random", box_gain=1, cls_gain=1, dfl_gain=1)
        from ultralytics.utils import AUTOINSTALL, SAFE_LOAD, USER_CONFIG_DIR
        assert not lookups and "YOLO_OFFLINE" not in os.environ, lookups
        print(AUTOINSTALL, SAFE_LOAD, USER_CONFIG_DIR)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("YOLO_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment | {"TMPDIR": str(tmp_path)}
    )
    assert done.stdout.split() == ["False", "True", str(tmp_path / f"pillsnap-{os.getuid()}/ultralytics/Ultralytics")]


def test_photos_without_pills_give_a_loss(detector: torch.nn.Module) -> None:
    images, boxes, _ = batch()
    losses = detection_loss(detector.train(), images, boxes, torch.zeros(3, dtype=torch.int64))
    assert float(losses["box"].detach()) == 0.0
    assert float(losses["cls"].detach()) > 0.0


def test_exported_file_gives_the_same_boxes_in_ultralytics(detector: torch.nn.Module, tmp_path: Path) -> None:
    from ultralytics import YOLO

    torch.manual_seed(4)
    with torch.no_grad():  # untrained weights score all anchors alike, below the threshold
        for scores, distances in zip(detector.model[-1].cv3, detector.model[-1].cv2, strict=True):
            scores[-1].weight.normal_(0, 40)
            scores[-1].bias.fill_(0)
            distances[-1].weight.normal_(0, 4)
    detector.eval()
    path = tmp_path / "best.pt"
    export_for_ultralytics(detector, path, {"image_size_px": 96, "batch_size": 4, "epochs": 1})
    photo = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    images = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    ours = detect(detector, images, nms_iou=0.7, min_score=0.25)[0]
    theirs = YOLO(path).predict(
        photo[..., ::-1].copy(), imgsz=96, conf=0.25, iou=0.7, max_det=300, verbose=False, device="cpu"
    )[0]
    assert len(ours) == len(theirs.boxes) > 10
    expected = theirs.boxes.xyxy.numpy()
    corners = np.concatenate([ours[:, :2], ours[:, :2] + ours[:, 2:4]], axis=1).clip(0, 96)
    # Boxes of equal score come in any order: each of ours must be one of theirs, with its score, and the reverse.
    scores = theirs.boxes.conf.numpy()
    apart = np.abs(corners[:, None] - expected[None]).max(-1) + 1000 * np.abs(ours[:, None, 4] - scores[None])
    assert apart.min(axis=1).max() < 0.2
    assert apart.min(axis=0).max() < 0.2
    assert np.ptp(ours[:, 4]) > 0.1


def test_weights_come_from_a_local_file(detector: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    export_for_ultralytics(detector, path, {"image_size_px": 96, "batch_size": 4, "epochs": 1})
    torch.manual_seed(9)
    loaded = build_detector("yolo11n", str(path), **GAINS)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_errors_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="yolo99z"):
        build_detector("yolo99z", "random", **GAINS)
    with pytest.raises(UserError, match=r"detection\.weights"):
        build_detector("yolo11n", str(tmp_path / "none.pt"), **GAINS)
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(UserError, match=r"text\.pt"):
        build_detector("yolo11n", str(tmp_path / "text.pt"), **GAINS)


def test_end_to_end_head_shifts_its_loss_as_in_ultralytics_trainer() -> None:
    model = build_detector("yolo26n", "random", **GAINS, epochs=11).train()
    images, boxes, num_boxes = batch()
    weights = []
    for epoch in (0, 5, 10, 5):
        detection_loss(model, images, boxes, num_boxes, epoch)
        weights.append((model.criterion.o2m, model.criterion.o2o))
    assert weights == [pytest.approx(pair) for pair in ((0.8, 0.2), (0.45, 0.55), (0.1, 0.9), (0.45, 0.55))]


def test_unassigned_anchors_in_unsure_areas_have_no_class_loss() -> None:
    """Image 0 is unsure as a whole and has two boxes; image 1 on its left, without boxes; image 2 nowhere."""
    from pillsnap.models.dense_loss import dense_criterion

    torch.manual_seed(0)
    model = build_detector("yolo11n", "random", **GAINS).train()
    images, boxes, num_boxes = batch()
    unsure = torch.zeros(3, 4, 4)
    unsure[0, 2] = torch.tensor([0.0, 0, 96, 96])
    unsure[1, 0] = torch.tensor([0.0, 0, 48, 96])
    predictions = model(images)
    predictions["scores"].retain_grad()
    given = {"boxes": boxes, "num_boxes": num_boxes, "unsure": unsure}
    losses, _ = dense_criterion(model)(predictions, given)
    losses[1].backward()
    counted = predictions["scores"].grad[:, 0] != 0  # (3, anchors): 12 x 12, 6 x 6 and 3 x 3 of them
    left = torch.cat([(torch.arange(side) + 0.5 < side / 2).repeat(side) for side in (12, 6, 3)])
    assert 2 <= int(counted[0].sum()) <= 20  # assigned anchors, up to ten per box
    assert not counted[1][left].any() and counted[1][~left].all()
    assert counted[2].all()

    plain = detection_loss(build_like(model), images, boxes, num_boxes)
    unmarked = detection_loss(build_like(model), images, boxes, num_boxes, 0, torch.zeros(3, 4, 4))
    for name, loss in plain.items():
        torch.testing.assert_close(unmarked[name], loss, rtol=1e-5, atol=1e-6)


def build_like(model: torch.nn.Module) -> torch.nn.Module:
    fresh = build_detector("yolo11n", "random", **GAINS).train()
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_loss_and_gradients_are_those_of_the_valid_images(name: str, dense: bool) -> None:
    """Normalisation sees all images. With copies of the valid ones in equal numbers its statistics are theirs, too."""
    from pillsnap.models.dense_loss import dense_criterion

    images, boxes, num_boxes = batch()
    two, copies = [0, 2], [0, 2, 0, 2]
    valid = torch.tensor([True, False, True])
    found = {}
    for case, rows, given, frozen in (
        ("alone, frozen", two, None, True), ("masked, frozen", [0, 1, 2], valid, True),
        ("alone", two, None, False), ("masked", copies, torch.tensor([True, True, False, False]), False),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = build_detector(name, "random", **GAINS).train()
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d) and frozen:
                layer.eval()
        if dense:
            model.criterion = dense_criterion(model)
        losses = detection_loss(model, images[rows], boxes[rows], num_boxes[rows], 0, None, given)
        num_counted = len(rows) if given is None else int(given.sum())
        (sum(losses.values()) * num_counted).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[case] = losses, gradients, dict(model.named_buffers())
    for case in ("frozen", ""):
        suffix = f", {case}" if case else ""
        alone, masked = found[f"alone{suffix}"], found[f"masked{suffix}"]
        assert all(float(loss.detach()) > 0 for loss in alone[0].values())
        for part, loss in alone[0].items():
            torch.testing.assert_close(masked[0][part], loss, rtol=1e-4, atol=0)
        scale = max(float(gradient.abs().max()) for gradient in alone[1].values())
        assert masked[1].keys() == alone[1].keys() and len(alone[1]) > 100
        for n, gradient in alone[1].items():
            torch.testing.assert_close(masked[1][n] / scale, gradient / scale, rtol=1e-4, atol=1e-5, msg=n)
        for n, buffer in alone[2].items():
            if n.endswith("running_mean"):
                torch.testing.assert_close(masked[2][n], buffer, rtol=1e-4, atol=1e-6, msg=n)


def corners_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of each row of two (n, 4) tensors x1, y1, x2, y2."""
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return both / (areas[0] + areas[1] - both)


def distance_logits(cells: torch.Tensor, num_bins: int = 16) -> torch.Tensor:
    """(...) distances -> (..., 16) logits of the distribution on the two next bins with that mean."""
    lower = cells.floor().clamp(max=num_bins - 2)
    share = (cells - lower).clamp(0.0, 1.0)[..., None]
    bins = torch.arange(num_bins)
    masses = torch.where(bins == lower[..., None], 1 - share, torch.where(bins == lower[..., None] + 1, share, 0.0))
    return masses.clamp(min=1e-9).log()


@pytest.mark.parametrize("side_px", [60, 110])
def test_boxes_are_decoded_in_single_precision_from_a_bfloat16_body(side_px: int) -> None:
    """Every anchor of stride 8 gives the exact distances of a box around it. In bfloat16: IoU 0.967 and 0.976."""
    model = build_detector("yolo11n", "random", **GAINS).eval()
    logits = distance_logits(torch.full((4,), side_px / 16)).flatten()
    with torch.no_grad():
        for level in model.model[-1].cv2:
            level[-1].weight.zero_()
            level[-1].bias.copy_(logits)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = model(torch.rand(1, 3, 640, 640))[0][0, :4, :6400].T
    grid = (torch.arange(80) + 0.5) * 8
    centres = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).view(-1, 2)
    corners = torch.cat([found[:, :2] - found[:, 2:] / 2, found[:, :2] + found[:, 2:] / 2], 1)
    overlaps = corners_iou(corners.float(), torch.cat([centres - side_px / 2, centres + side_px / 2], 1))
    assert float(overlaps.mean()) == pytest.approx(1.0, abs=1e-5)
    assert float(overlaps.min()) > 0.9999


@pytest.mark.parametrize("side_px", [60, 110])
def test_dense_loss_of_exact_predictions_is_zero(side_px: int) -> None:
    """Outputs in bfloat16 lose 0.001 by their own rounding; with boxes in bfloat16 the loss is 0.48 and 0.27."""
    from pillsnap.models.dense_loss import dense_criterion

    loss = dense_criterion(build_detector("yolo11n", "random", **GAINS))
    box = torch.tensor([537.0, 561, 537 + side_px, 561 + side_px])
    shapes = [(side, side) for side in (80, 40, 20)]
    distances = []
    for (height, width), stride in zip(shapes, (8, 16, 32), strict=True):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centres = torch.stack([x, y], -1).view(-1, 2)
        distances.append(torch.cat([centres - box[:2] / stride, box[2:] / stride - centres], 1).clamp(0, 14.99))
    exact = distance_logits(torch.cat(distances)).view(1, -1, 64).transpose(1, 2)
    given = {"boxes": torch.tensor([[[*box[:2], side_px, side_px]]]), "num_boxes": torch.tensor([1])}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.002)):
        predictions = {
            "boxes": exact.to(dtype), "scores": torch.full((1, 1, exact.shape[2]), 2.0, dtype=dtype),
            "feats": [torch.zeros(1, 1, *shape, dtype=dtype) for shape in shapes],
        }  # fmt: skip
        box_loss = float(loss(predictions, given)[0][0])
        assert 0 <= box_loss < limit


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_outputs_of_a_bfloat16_body_are_float32_and_scores_have_no_ties(name: str) -> None:
    torch.manual_seed(0)
    model = build_detector(name, "random", **GAINS)
    images = torch.rand(2, 3, 256, 256)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.train()(images)
        losses = detection_loss(model, images, torch.tensor([[[10.0, 12, 30, 24]]] * 2), torch.tensor([1, 1]))
        with torch.inference_mode():
            decoded = model.eval()(images)[0]
    for part in outputs.values() if name == "yolo26n" else (outputs,):
        assert {values.dtype for values in (part["boxes"], part["scores"], *part["feats"])} == {torch.float32}
    assert decoded.dtype == torch.float32 and all(loss.dtype == torch.float32 for loss in losses.values())
    scores = outputs["one2many"]["scores"] if name == "yolo26n" else outputs["scores"]
    assert len(scores.unique()) > 0.95 * scores.numel()


def test_exported_file_names_no_class_of_this_package(detector: torch.nn.Module, tmp_path: Path) -> None:
    import zipfile

    export_for_ultralytics(detector, tmp_path / "best.pt", {"image_size_px": 96, "batch_size": 4, "epochs": 1})
    with zipfile.ZipFile(tmp_path / "best.pt") as file:
        pickled = b"".join(file.read(name) for name in file.namelist() if name.endswith(".pkl"))
    assert b"Detect" in pickled and b"pillsnap" not in pickled
