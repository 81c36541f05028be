"""Both tasks: samples, targets of the loss, empty rows, validation facts and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pillsnap.config import TASKS
from pillsnap.data.loader import DeviceBatch
from pillsnap.manifest.table import read_manifest
from pillsnap.models import detector
from pillsnap.planner.measure import mock_batch
from pillsnap.runs.checkpoint import Position
from pillsnap.tasks.classification import ClassificationTask
from pillsnap.tasks.detection import DetectionTask
from pillsnap.tasks.registry import make_task
from pillsnap.tasks.tensors import unit_range, valid_rows
from tests.reliability.harness import LoopRun, tiny

CPU = torch.device("cpu")


def with_empty_row(batch: DeviceBatch, row: int) -> DeviceBatch:
    """Mark a row as holding no sample."""
    batch.index[row], batch.targets["valid"][row] = -1, False
    batch.num_valid -= 1
    return batch


def test_registry_knows_every_task() -> None:
    settings = tiny()
    assert [make_task(name, settings, ["K-1"]).name for name in TASKS] == list(TASKS)
    with pytest.raises(AssertionError, match="segmentation"):
        make_task("segmentation", settings, [])


def test_unit_range() -> None:
    images = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    torch.testing.assert_close(unit_range(images), torch.tensor([[[[0.0]], [[0.2]], [[1.0]]]]))


@pytest.mark.parametrize(("empty", "kept"), [((), [0, 1, 2, 3]), ((3,), [0, 1, 2]), ((1,), [0, 2, 3])])
def test_valid_rows(empty: tuple[int, ...], kept: list[int]) -> None:
    batch = mock_batch(make_task("classification", tiny(), ["K-1"]), 4, CPU)
    for row in empty:
        with_empty_row(batch, row)
    (rows,) = valid_rows(batch, torch.arange(4))
    assert rows.tolist() == kept


def test_letterboxed_label_boxes_are_the_targets_of_the_detection_loss(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LoopRun(tmp_path, "detection", tiny(), toy_manifest, toy_tree)
    batch = next(run._batches(Position(0, run.plan.train_steps, 0)))
    passed: list[Any] = []

    def loss(*arguments: Any) -> dict[str, torch.Tensor]:
        passed[:] = arguments
        return {"box": torch.tensor(2.0)}

    monkeypatch.setattr(detector, "detection_loss", loss)
    assert float(run.task.losses(torch.nn.Identity(), batch)["box"]) == 2.0 * batch.num_valid  # a sum, not a mean
    _, images, boxes, num_boxes, epoch, unsure, valid, weights = passed
    assert (
        weights is None
        and images.shape == (4, 3, 64, 64)
        and float(images.max()) <= 1.0
        and epoch == 0
        and unsure is None
    )
    assert int(valid.sum()) == batch.num_valid
    sizes = {row["sample_id"]: (row["width"], row["height"]) for row in read_manifest(toy_manifest).to_pylist()}
    for row in range(batch.num_valid):
        sample = run.samples.val.slice(int(batch.index[row]), 1).to_pylist()[0]
        width, height = sizes[sample["sample_id"]]
        scale = 64 / max(width, height)
        left, top = (64 - width * scale) / 2, (64 - height * scale) / 2
        expected = np.array(sample["boxes"]) * scale + [left, top, 0, 0]
        assert int(num_boxes[row]) == len(expected) > 0
        np.testing.assert_allclose(boxes[row, : len(expected)].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_empty_rows_do_not_count(name: str) -> None:
    """The losses are sums over the valid rows, and there is one fact per valid row."""
    torch.manual_seed(0)
    task = make_task(name, tiny(), ["K-1", "K-2", "K-3"])
    model = task.build().eval() if name == "classification" else task.build().train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    whole, partial = mock_batch(task, 4, CPU, 3), with_empty_row(mock_batch(task, 4, CPU, 3), 3)
    three = mock_batch(task, 4, CPU, 3)
    three.images, three.index, three.num_valid = three.images[:3], three.index[:3], 3
    three.targets = {name: values[:3] for name, values in three.targets.items()}
    sums = [
        {key: float(value.detach()) for key, value in task.losses(model, b).items()} for b in (whole, partial, three)
    ]
    for key, value in sums[1].items():
        assert value == pytest.approx(sums[2][key], rel=1e-4)
    assert sum(sums[0].values()) != pytest.approx(sum(sums[1].values()), rel=1e-3)
    model.eval()
    with torch.inference_mode():
        assert [len(task.validate(model, b)) for b in (whole, partial, three)] == [4, 3, 3]


def test_worker_without_samples_takes_part_with_zero_loss() -> None:
    task = make_task("detection", tiny(), ["K-1"])
    model = task.build().train()
    batch = mock_batch(task, 2, CPU)
    for row in (0, 1):
        with_empty_row(batch, row)
    losses = task.losses(model, batch)
    torch.stack(list(losses.values())).sum().backward()
    assert [float(loss.detach()) for loss in losses.values()] == [0.0, 0.0, 0.0]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    assert task.validate(model, batch) == []


def test_detection_scores_found_boxes() -> None:
    settings = tiny()
    task = DetectionTask(settings.detection, 0.5)
    labels = np.array([[10, 10, 20, 20], [40, 40, 10, 10]], np.float32)
    found = np.array([[10, 10, 20, 20, 0.9], [40, 40, 10, 10, 0.8]], np.float32)
    assert task.score([(found, labels)])["map50"] == pytest.approx(1.0, abs=0.01)
    assert task.score([(found[:1], labels)])["map50"] == pytest.approx(0.5, abs=0.02)
    assert task.score([(np.zeros((0, 5), np.float32), labels)])["map50_95"] == 0.0


def test_classification_labels_follow_the_codes_and_rare_classes_are_repeated(toy_manifest: Path) -> None:
    manifest = read_manifest(toy_manifest)
    codes = sorted({code for codes in manifest["codes"].to_pylist() for code in codes})
    plain, balanced = (
        ClassificationTask(tiny(classification__class_balance=strength).classification, tuple(codes)).samples(manifest)
        for strength in (0.0, 1.0)
    )
    boxes = {(row["sample_id"], tuple(box)): code for row in manifest.to_pylist()
             for box, code in zip(row["boxes"], row["codes"], strict=True)}  # fmt: skip
    assert len(boxes) == len(plain.train) + len(plain.val)
    counts = np.bincount(plain.train["label"].to_numpy(), minlength=len(codes))
    expected = [sum(code == each for row in manifest.to_pylist() if row["split"] == "train" for each in row["codes"])
                for code in codes]  # fmt: skip
    assert counts.tolist() == expected
    assert np.bincount(balanced.train["label"].to_numpy()).tolist() == [max(expected)] * len(codes)
    assert len(set(balanced.train["sample_id"].to_pylist())) == len(balanced.train)
    assert balanced.val.equals(plain.val)


class FixedLogits(torch.nn.Module):
    """A classifier whose logits are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_classification_facts_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    task = ClassificationTask(tiny().classification, ("K-1", "K-2", "K-3"))
    monkeypatch.setattr(ClassificationTask, "_inputs", lambda self, model, images, size_px: images)
    batch = mock_batch(task, 3, CPU, 3)
    batch.targets["label"] = torch.tensor([0, 2, 1])
    logits = torch.tensor([[5.0, 1.0, 0.0], [3.0, 2.0, 1.0], [0.0, 4.0, 1.0]])
    facts = task.validate(FixedLogits(logits), batch)
    assert [rank for rank, _, _ in facts] == [0, 2, 0]
    losses = torch.nn.functional.cross_entropy(logits, batch.targets["label"], reduction="none")
    assert [loss for _, loss, _ in facts] == pytest.approx(losses.tolist(), rel=1e-5)
    score = task.score(facts)
    assert (score["top1"], score["top5"]) == (pytest.approx(2 / 3), 1.0)
    assert score["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert task.score([]) == {"top1": 0.0, "top5": 0.0, "loss": 0.0, "temperature": 1.0}


@pytest.mark.parametrize("broken", ["nan", "inf", "constant"])
def test_logits_that_say_nothing_are_wrong(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = tuple(f"K-{number}" for number in range(8))
    task = ClassificationTask(tiny().classification, codes)
    monkeypatch.setattr(ClassificationTask, "_inputs", lambda self, model, images, size_px: images)
    batch = mock_batch(task, 4, CPU, 8)
    logits = torch.full((4, 8), 1.0 if broken == "constant" else float(broken))
    score = task.score(task.validate(FixedLogits(logits), batch))
    assert (score["top1"], score["top5"]) == (0.0, 0.0)
    assert np.isfinite(score["loss"]) == (broken == "constant")
    if broken != "constant":
        assert score["temperature"] == 1.0


def test_tie_with_the_label_counts_against_it_and_one_broken_row_is_one_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = ClassificationTask(tiny().classification, ("K-1", "K-2", "K-3"))
    monkeypatch.setattr(ClassificationTask, "_inputs", lambda self, model, images, size_px: images)
    batch = mock_batch(task, 4, CPU, 3)
    batch.targets["label"] = torch.tensor([0, 0, 2, 1])
    logits = torch.tensor([[5.0, 5.0, 0.0], [5.0, 4.0, 0.0], [1.0, 1.0, float("nan")], [float("-inf"), 2.0, 1.0]])
    facts = task.validate(FixedLogits(logits), batch)
    assert [rank for rank, _, _ in facts][:2] == [1, 0]
    assert task.score(facts)["top1"] == 0.25 and task.score(facts)["top5"] == 0.5
