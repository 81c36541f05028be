"""Loss, gradients and accuracy equal those of the frameworks' own code with their own data loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from timm.utils import AverageMeter, accuracy

from pillsnap.config import ClassificationSettings, load_settings
from pillsnap.data.loader import DeviceBatch
from pillsnap.models.detector import build_detector, detection_loss
from pillsnap.tasks.classification import ClassificationTask

NUM_PHOTOS, SIZE_PX, NUM_CLASSES = 4, 96, 7


class FirstStepDone(Exception):
    """Stops ultralytics' training before its first optimizer step."""


@pytest.fixture
def yolo_folder(tmp_path: Path) -> Path:
    """Four photos of noise with zero to three boxes each, as ultralytics reads them."""
    rng = np.random.default_rng(3)
    for folder in ("images", "labels"):
        (tmp_path / folder / "train").mkdir(parents=True)
    for number in range(NUM_PHOTOS):
        photo = rng.integers(0, 256, (72, SIZE_PX, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"images/train/{number}.png"), photo)
        size = rng.uniform(0.15, 0.4, (number, 2))
        lines = [
            f"0 {x} {y} {w} {h}" for (x, y), (w, h) in zip(rng.uniform(0.25, 0.75, (number, 2)), size, strict=True)
        ]
        (tmp_path / f"labels/train/{number}.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/train\nnames: [pill]\n")
    return tmp_path


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_loss_and_gradients_equal_those_of_the_running_detection_trainer(name: str, yolo_folder: Path) -> None:
    """`DetectionTrainer.train()` with its augmentation, stopped before the optimizer step, against the CPU loss and the
    dense loss.
    """
    from ultralytics.models.yolo.detect import DetectionTrainer

    from pillsnap.models.dense_loss import dense_criterion

    seen: dict[str, Any] = {}

    class HaltingTrainer(DetectionTrainer):
        def _do_train(self) -> None:
            self.add_callback("on_train_start", lambda trainer: seen.update(weights=_copied(trainer.model)))
            super()._do_train()

        def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            seen["batch"] = super().preprocess_batch(batch)
            return seen["batch"]

        def optimizer_step(self) -> None:
            raise FirstStepDone

    trainer = HaltingTrainer(
        overrides={
            "model": f"{name}.yaml", "data": str(yolo_folder / "data.yaml"), "imgsz": SIZE_PX, "batch": NUM_PHOTOS,
            "nbs": NUM_PHOTOS, "epochs": 1, "pretrained": False, "device": "cpu", "amp": False, "seed": 5,
            "plots": False,
            "verbose": False, "project": str(yolo_folder / "runs"), "close_mosaic": 0,
        }
    )  # fmt: skip
    with pytest.raises(FirstStepDone):
        trainer.train()
    batch, args = seen["batch"], trainer.args

    boxes, num_boxes = _padded(batch)
    assert int(num_boxes.sum()) >= 4
    theirs = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    for dense in (False, True):
        model = build_detector(name, "random", box_gain=args.box, cls_gain=args.cls, dfl_gain=args.dfl).train()
        model.load_state_dict(seen["weights"])
        if dense:
            model.criterion = dense_criterion(model)
        losses = detection_loss(model, batch["img"], boxes, num_boxes)
        total = sum(losses.values()) * len(batch["img"])
        total.backward()

        assert float(total.detach()) == pytest.approx(float(trainer.loss.detach()), rel=1e-5)
        if name == "yolo11n":  # of an end-to-end head the trainer shows one branch, and differentiates both
            for part, item in zip(losses.values(), trainer.loss_items.values(), strict=True):
                assert float(part.detach()) == pytest.approx(float(item), abs=1e-5)
        ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert ours.keys() == theirs.keys() and len(ours) > 100
        for n, gradient in theirs.items():
            torch.testing.assert_close(ours[n] / scale, gradient / scale, rtol=1e-5, atol=1e-5, msg=n)


def test_loss_and_accuracy_equal_timm_validation(tmp_path: Path) -> None:
    """timm's own data set, loader, meters and accuracy over PNG files, against the task on the same pixels."""
    from timm.data import create_dataset, create_loader

    rng = np.random.default_rng(1)
    crops, labels = rng.integers(0, 256, (50, 64, 64, 3), dtype=np.uint8), rng.integers(0, NUM_CLASSES, 50)
    for number, (crop, label) in enumerate(zip(crops, labels, strict=True)):
        path = tmp_path / f"{label}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), crop[..., ::-1])
    torch.manual_seed(2)
    model = timm.create_model("resnet10t", num_classes=NUM_CLASSES).eval()
    config = model.pretrained_cfg
    loader = create_loader(
        create_dataset("", str(tmp_path)), (3, 64, 64), 16, is_training=False, interpolation="bilinear",
        mean=config["mean"], std=config["std"], crop_pct=1.0, num_workers=0, use_prefetcher=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    criterion, loss_meter, top1, top5 = torch.nn.CrossEntropyLoss(), AverageMeter(), AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, target in loader:
            output = model(images)
            first, fifth = accuracy(output, target, topk=(1, 5))
            for meter, value in ((loss_meter, criterion(output, target)), (top1, first), (top5, fifth)):
                meter.update(value.item(), len(images))
    assert loss_meter.count == 50

    task = ClassificationTask(ClassificationSettings(model="resnet10t"), tuple("ABCDEFG"))
    facts: list[Any] = []
    with torch.inference_mode():
        for start in range(0, 50, 16):  # the last batch is not full: its rows are masked
            rows = np.arange(start, min(start + 16, 50))
            facts += task.validate(model, _crop_batch(crops[rows], labels[rows], 16))
    figures = task.score(facts)
    assert figures["loss"] == pytest.approx(loss_meter.avg, abs=1e-6)
    assert figures["top1"] == pytest.approx(top1.avg / 100, abs=1e-6)
    assert figures["top5"] == pytest.approx(top5.avg / 100, abs=1e-6)
    assert 0 < figures["top1"] < figures["top5"] < 1


def test_training_loss_equals_timm_task() -> None:
    """With label smoothing, against `timm.task.ClassificationTask`, which timm's training script differentiates."""
    from timm.task import ClassificationTask as TimmTask

    settings = load_settings("demo", {"classification.image_size_px": 64}).classification
    task = ClassificationTask(settings, tuple("ABCDEFG"))
    torch.manual_seed(2)
    model = task.build().train()
    rng = np.random.default_rng(1)
    batch = _crop_batch(rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8), rng.integers(0, NUM_CLASSES, 16), 16)
    (task.losses(model, batch)["cross_entropy"] / 16).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    theirs = TimmTask(model, criterion_kwargs={"smoothing": settings.label_smoothing}, verbose=False)
    theirs((batch.images.permute(0, 3, 1, 2).float() / 255 - mean) / std, batch.targets["label"])["loss"].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-6)


def _copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _padded(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """ultralytics' flat boxes as one padded row a photo, x y w h in pixels."""
    counts = torch.bincount(batch["batch_idx"].long(), minlength=NUM_PHOTOS)
    boxes = torch.zeros(NUM_PHOTOS, int(counts.max()), 4)
    for photo in range(NUM_PHOTOS):
        rows = batch["bboxes"][batch["batch_idx"] == photo] * SIZE_PX
        boxes[photo, : len(rows)] = torch.cat([rows[:, :2] - rows[:, 2:] / 2, rows[:, 2:]], dim=1)
    return boxes, counts


def _crop_batch(crops: np.ndarray, labels: np.ndarray, capacity: int) -> DeviceBatch:
    images, padded = torch.zeros(capacity, *crops.shape[1:], dtype=torch.uint8), torch.zeros(capacity, dtype=torch.long)
    images[: len(crops)], padded[: len(crops)] = torch.from_numpy(crops), torch.from_numpy(labels)
    valid = torch.arange(capacity) < len(crops)
    return DeviceBatch(0, False, 0, images, {"label": padded, "valid": valid}, np.arange(capacity), len(crops))
