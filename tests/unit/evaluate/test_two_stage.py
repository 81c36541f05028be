"""Both models chained, from checkpoints of random weights."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from pillsnap.config import Settings, load_settings
from pillsnap.data import windows
from pillsnap.data.windows import Photo
from pillsnap.evaluate.inference import _decode
from pillsnap.evaluate.two_stage import TwoStage, _window
from pillsnap.export.pipeline import softmax
from pillsnap.metrics.evidence import Evidence
from pillsnap.photos.decode import decode_image
from pillsnap.photos.reader import PhotoReader
from pillsnap.runs.checkpoint import Position, save_checkpoint
from pillsnap.tasks.registry import make_task

CODES = [f"K-{number:06}" for number in range(8)]
TEMPERATURE = 2.5
SMALL = {"detection.image_size_px": 96, "classification.image_size_px": 64, "train.amp": "off"}


def settings_with(**changes: int) -> Settings:
    return load_settings("demo", SMALL | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of untrained models: one checkpoint per task."""
    path = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    for name in ("detection", "classification"):
        weights = make_task(name, settings_with(), CODES).build().state_dict()
        save_checkpoint(
            path / "checkpoints" / name, Position(1, 0, 1), model=weights, ema=weights, trainer={},
            meta={"metrics": {"temperature": TEMPERATURE}}, best=True, keep=1,
        )  # fmt: skip
    return path


def photo(seed: int = 0, height: int = 128, width: int = 98) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_confidence_is_divided_by_the_temperature(run_dir: Path) -> None:
    models = TwoStage(run_dir, settings_with(), CODES)
    boxes = np.array([[10, 10, 40, 30], [30, 40, 50, 60], [0, 0, 98, 128]], np.float32)
    with torch.no_grad():
        models.classifier.fc.weight *= 40
    names = models.classify([photo()], [boxes])[0]
    assert names.top.shape == names.probs.shape == (3, 5)
    # softmax(z / T) is softmax(z) ** (1 / T), normalised: ratios of the raw probabilities give the calibrated ones.
    models.temperature = 1.0
    raw = models.classify([photo()], [boxes])[0]
    np.testing.assert_allclose(names.raw, raw.probs[:, 0], rtol=1e-4)
    assert (names.top == raw.top).all()
    ratio, raw_ratio = names.probs[:, 0] / names.probs[:, 1], raw.probs[:, 0] / raw.probs[:, 1]
    np.testing.assert_allclose(ratio, raw_ratio ** (1 / TEMPERATURE), rtol=1e-3)
    assert (raw_ratio > 1.1).all()


def test_evidence_is_added_to_the_calibrated_logits(run_dir: Path) -> None:
    boxes = np.array([[10, 10, 40, 30], [30, 40, 50, 60], [0, 0, 98, 128]], np.float32)
    log_ratios = np.array([-np.inf, 0.0, 2.0, -np.inf, -np.inf, -1.0, -np.inf, -np.inf])
    (alone,) = TwoStage(run_dir, settings_with(), CODES).classify([photo()], [boxes])
    models = TwoStage(run_dir, settings_with(), CODES, evidence=Evidence(log_ratios, 3))
    (names,) = models.classify([photo()], [boxes])
    np.testing.assert_allclose(names.logits, alone.logits, atol=1e-6)
    photo_alone = softmax(alone.logits / TEMPERATURE)
    expected = photo_alone * np.exp(log_ratios)
    expected /= expected.sum(1, keepdims=True)
    assert names.top.shape == (3, 3) and set(names.top.ravel()) == {1, 2, 5}
    np.testing.assert_allclose(names.probs, np.take_along_axis(expected, names.top, 1), rtol=1e-4)
    assert (names.unaided == alone.top[:, 0]).all()
    np.testing.assert_allclose(names.unaided_probs, alone.probs[:, 0], rtol=1e-5)
    np.testing.assert_allclose(names.forbidden, photo_alone[:, np.isneginf(log_ratios)].sum(1), rtol=1e-4)
    assert not alone.forbidden.any()
    # A possible code of a probability of 0 comes before those that are not possible.
    with torch.no_grad():
        models.classifier.fc.weight *= 1e5
    assert set(models.classify([photo()], [boxes])[0].top.ravel()) == {1, 2, 5}


def test_crops_of_several_photos_keep_their_order(run_dir: Path) -> None:
    models = TwoStage(run_dir, settings_with(classification__batch_size=2), CODES)
    box = np.array([[5, 5, 60, 60]], np.float32)
    none = np.zeros((0, 4), np.float32)
    together = models.classify([photo(1), photo(2), photo(3), photo(4)], [box, none, np.repeat(box, 2, 0), none])
    assert [len(names.top) for names in together] == [1, 0, 2, 0]
    alone = models.classify([photo(3)], [box])[0]
    np.testing.assert_allclose(together[2].probs, np.repeat(alone.probs, 2, 0), rtol=1e-4)


@pytest.mark.parametrize("num_allowed", [3, 8])
def test_names_of_photos_without_pills_are_as_wide_as_others(run_dir: Path, num_allowed: int) -> None:
    # Limits and enrolled drugs compute with the features of each photo, also where a whole batch shows no pill.
    evidence = Evidence(np.where(np.arange(8) < num_allowed, 0.0, -np.inf), num_allowed)
    models = TwoStage(run_dir, settings_with(), CODES, evidence=evidence)
    none, box = np.zeros((0, 4), np.float32), np.array([[5, 5, 60, 60]], np.float32)
    (some,) = models.classify([photo()], [box])
    for empty in models.classify([photo(1), photo(2)], [none, none]):
        for each in fields(empty):
            found, wanted = getattr(empty, each.name), getattr(some, each.name)
            assert (found.dtype, found.shape) == (wanted.dtype, (0, *wanted.shape[1:])), each.name


def test_a_gpu_sees_one_shape_of_crops_and_of_frames(run_dir: Path) -> None:
    # cuDNN plans the convolutions of each new shape for seconds.
    settings, one = settings_with(evaluation__confidence=0.0), np.array([[5, 5, 60, 60]], np.float32)
    plain, filled = TwoStage(run_dir, settings, CODES), TwoStage(run_dir, settings, CODES)
    filled._equal_shapes = True
    seen: dict[str, set[tuple[int, ...]]] = {"crops": set(), "frames": set()}
    assert filled.classifier is not None and filled.detector is not None
    for model, kind in ((filled.classifier, "crops"), (filled.detector, "frames")):
        first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_pre_hook(lambda _, inputs, kind=kind: seen[kind].add(tuple(inputs[0].shape)))
    for count in (1, 3, 40):
        photos = [photo(count), photo(count + 1)]
        boxes = [np.repeat(one, count, 0), one]
        for ours, wanted in zip(filled.classify(photos, boxes), plain.classify(photos, boxes), strict=True):
            for each in fields(ours):
                found, expected = getattr(ours, each.name), getattr(wanted, each.name)
                np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=each.name)
        for ours, wanted in zip(filled.detect(photos), plain.detect(photos), strict=True):
            np.testing.assert_allclose(ours.boxes, wanted.boxes, atol=1e-2)
    assert seen == {"crops": {(32, 3, 64, 64)}, "frames": {(16, 3, 96, 96)}}


def test_average_over_rotations_does_not_depend_on_the_rotation_of_the_pill(run_dir: Path) -> None:
    square = photo(5, 100, 100)
    box = np.array([[0, 0, 100, 100]], np.float32)
    for rotations, differ in ((1, True), (4, False)):
        models = TwoStage(run_dir, settings_with(evaluation__rotations=rotations), CODES)
        with torch.no_grad():
            models.classifier.fc.weight *= 40
        first, turned = (
            models.classify([np.ascontiguousarray(view)], [box])[0].raw for view in (square, np.rot90(square))
        )
        assert (abs(first - turned) > 1e-3).all() == differ
    names = models.classify([square], [box])[0]
    head = models.classifier.fc
    logits = names.features @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(logits, names.logits, rtol=1e-4)


def test_padding_is_removed_in_whole_strides() -> None:
    portrait, landscape = np.zeros((1280, 976, 3)), np.zeros((976, 1280, 3))
    assert _window([portrait], 640) == (64, 0, 576, 640)
    assert _window([landscape, landscape], 640) == (0, 64, 640, 576)
    assert _window([portrait, landscape], 640) == (0, 0, 640, 640)
    for width in range(300, 1281, 7):  # whatever the shape, no pixel of the photo is lost
        left, top, right, bottom = _window([np.zeros((1280, width, 3))], 640)
        assert left <= 320 - width / 4 and right >= 320 + width / 4
        assert (top, bottom) == (0, 640) and (right - left) % 32 == 0


def test_boxes_come_back_in_pixels_of_the_photo(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector sees a 96-pixel frame without padding; its boxes are mapped back to the photo."""
    import pillsnap.models.detector as detector

    def find(_: object, images: torch.Tensor, **__: float) -> list[np.ndarray]:
        assert tuple(images.shape) == (1, 3, 96, 64)
        dark = (images[0].mean(0) < 0.1).nonzero()
        (top, left), (bottom, right) = dark.min(0).values.tolist(), (dark.max(0).values + 1).tolist()
        return [np.array([[left, top, right - left, bottom - top, 0.9]], np.float32)]

    monkeypatch.setattr(detector, "detect", find)
    image = np.full((1280, 640, 3), 200, np.uint8)
    image[400:800, 200:440] = 0
    found = TwoStage(run_dir, settings_with(), CODES).detect([image])[0]
    np.testing.assert_allclose(found.boxes[0], (200, 400, 240, 400), atol=15)


def test_crop_without_finite_logits_has_no_answer(run_dir: Path) -> None:
    models = TwoStage(run_dir, settings_with(), CODES)
    boxes = np.array([[10, 10, 40, 30]], np.float32)
    with torch.no_grad():
        models.classifier.fc.weight[3] = float("nan")
    names = models.classify([photo()], [boxes])[0]
    assert not names.probs.any() and not names.raw.any()


def test_setting_for_the_cpu_holds_where_there_is_a_gpu(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings("demo", SMALL | {"train.device": "cpu"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    models = TwoStage(run_dir, settings, CODES)
    assert {parameter.device.type for parameter in models.classifier.parameters()} == {"cpu"}
    assert len(models.classify([photo()], [np.array([[10, 10, 40, 30]], np.float32)])[0].top) == 1


def large_jpeg() -> bytes:
    """A photo of 1200 x 800 with soft noise and a dark pill."""
    pixels = cv2.resize(photo(7, 40, 60), (1200, 800), interpolation=cv2.INTER_CUBIC) // 2 + 100
    pixels[200:600, 300:700] = 20
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def test_large_jpeg_is_decoded_at_the_size_of_use(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same boxes, in pixels of the photo, and same names as from the whole photo; each reduction is decoded once."""
    reductions: list[int] = []

    def decode(data: bytes, *, max_pixels: int, reduction: int = 1) -> np.ndarray:
        reductions.append(reduction)
        return decode_image(data, max_pixels=max_pixels, reduction=reduction)

    monkeypatch.setattr(windows, "decode_image", decode)
    models, data = TwoStage(run_dir, settings_with(), CODES), large_jpeg()
    boxes = np.array([[300, 200, 400, 400], [310, 210, 380, 390], [500, 300, 90, 60]], np.float32)
    encoded, whole = Photo(data, 10**7), decode_image(data)
    seen = [models.detect([each], min_score=0)[0] for each in (encoded, whole)]
    np.testing.assert_allclose(seen[0].boxes[:5], seen[1].boxes[:5], atol=6)
    assert seen[0].boxes[:, 2:].max() > 100
    one, other = (models.classify([each], [boxes])[0] for each in (encoded, whole))
    np.testing.assert_allclose(one.probs, other.probs, atol=5e-3)
    # 96 of 1200 px; 64 of 400 px and of 390 px with margin; 64 of 90 px.
    assert reductions == [8, 4, 1]


def test_inference_tasks_keep_the_bytes_of_a_jpeg(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(large_jpeg())
    cv2.imwrite(str(tmp_path / "small.png"), photo())
    (tmp_path / "bad.jpg").write_bytes(large_jpeg()[:999])
    table = pa.table({"location": ["large.jpg", "small.png", "bad.jpg", "none.png"]})
    rows = _decode(table, reader=PhotoReader(str(tmp_path), 10**7), size_px=96).to_pylist()
    assert [row["reduction"] for row in rows] == [8, 1, 1, 1]
    assert [row["shape"] for row in rows] == [[100, 150, 3], [128, 98, 3], [0, 0, 3], [0, 0, 3]]
    assert [len(row["pixels"]) for row in rows] == [100 * 150 * 3, 128 * 98 * 3, 0, 0]
    assert [row["data"] for row in rows] == [large_jpeg(), b"", b"", b""]
    assert [(row["error"] or "").split(":")[0] for row in rows] == ["", "", "truncated", "missing"]
