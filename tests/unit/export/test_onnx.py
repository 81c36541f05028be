"""Exported models equal torch, and the exported pipeline equals the two-stage inference."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from pillsnap.config import load_settings
from pillsnap.data.windows import Photo
from pillsnap.errors import UserError
from pillsnap.evaluate.predict import evidence_for
from pillsnap.evaluate.two_stage import TwoStage
from pillsnap.export.onnx import MAX_DIFFERENCE, export_run
from pillsnap.export.pipeline import Pipeline, softmax
from pillsnap.manifest.table import ClassInfo
from pillsnap.metrics.evidence import both_sides
from pillsnap.metrics.likeness import fit_likeness
from pillsnap.metrics.limits import LIMITS_NAME, Limits
from pillsnap.photos.decode import BadImage, decode_image
from pillsnap.runs.checkpoint import Position, save_checkpoint
from pillsnap.runs.directory import Run
from pillsnap.runs.enrolled import ENROLLED_FILE, Enrolled, write_enrolled
from pillsnap.synthetic.faults import encode
from pillsnap.tasks.registry import make_task

CODES = [f"K-{number:06}" for number in range(6)]
# A process that cannot import PillSnap, torch or timm.
BLOCKED = "import runpy, sys; sys.modules.update(dict.fromkeys(['torch', 'timm', 'ultralytics', 'pillsnap', 'ray']));"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of untrained models; the scores of the detector are spread, so that some boxes pass."""
    settings = load_settings(
        "demo", {"detection.image_size_px": 128, "classification.image_size_px": 64, "train.amp": "off"}
    )
    path = tmp_path_factory.mktemp("run")
    torch.manual_seed(4)
    for name in ("detection", "classification"):
        model = make_task(name, settings, CODES).build()
        with torch.no_grad():
            # The statistics of one batch spread the features, and so the scores and classes.
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1.0
            model.train()(torch.rand(8, 3, 128, 128))
            if name == "detection":
                for scores, distances in zip(model.model[-1].cv3, model.model[-1].cv2, strict=True):
                    scores[-1].weight.normal_(0, 0.3)
                    scores[-1].bias.fill_(-2)
                    distances[-1].weight.normal_(0, 0.3)
            else:
                model.fc.weight *= 10
        weights = model.state_dict()
        save_checkpoint(
            path / "checkpoints" / name, Position(1, 0, 1), model=weights, ema=weights, trainer={},
            meta={"metrics": {"temperature": 1.7}}, best=True, keep=1,
        )  # fmt: skip
    classes = [
        ClassInfo(code, index, f"pill {code}", ["1"], attributes={"shape": "원형" if index % 2 else "장방형"})
        for index, code in enumerate(CODES)
    ]
    return Run(path, settings, None, "", classes, "", "run")  # type: ignore[arg-type]


def assert_same_reader(folder: Path) -> None:
    """decode.py beside the models reads and refuses what training does, in a process without PillSnap and kornia."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    files = {
        "alpha.png": encode(Image.fromarray(pixels)),
        "plain.png": encode(rgb),
        "turned.jpg": encode(rgb, "JPEG", exif=exif),
        "webp.jpg": encode(rgb, "WEBP"),
        "cut.jpg": encode(rgb, "JPEG")[:-200],
        "cut.png": encode(rgb)[:-12],
    }
    code = (
        "import sys; sys.path.insert(0, ''); sys.modules.update(dict.fromkeys(['pillsnap', 'kornia_rs']))\n"
        "import decode, hashlib\n"
        "for data in eval(sys.stdin.read()):\n"
        "    try: print(hashlib.sha256(decode.decode_image(data).tobytes()).hexdigest())\n"
        "    except decode.BadImage as error: print(error.reason)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, input=repr(list(files.values())), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    expected = []
    for data in files.values():
        try:
            expected.append(hashlib.sha256(decode_image(data).tobytes()).hexdigest())
        except BadImage as error:
            expected.append(error.reason)
    assert done.stdout.split() == expected
    assert expected[-2:] == ["truncated"] * 2


def test_exported_models_and_pipeline(run: Run, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    limits = write_limits(run, photo)
    differences = export_run(run, tmp_path)
    assert_same_reader(tmp_path)
    assert set(differences) == {"detector", "classifier"}
    assert max(differences.values()) < MAX_DIFFERENCE

    cv2.imwrite(str(tmp_path / "photo.png"), photo[..., ::-1])
    # A large photo, whose JPEG is decoded at an eighth for detection and at the size that each crop needs.
    large = cv2.resize(photo, (1280, 1280), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "large.jpg"), large[..., ::-1])

    # A process that cannot import PillSnap, torch or timm.
    words = "sys.argv[1:] = ['photo.png', 'large.jpg']"
    code = f"{BLOCKED} {words}; runpy.run_path('pipeline.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    small_pills, large_pills = (json.loads(line)["pills"] for line in done.stdout.splitlines())
    boxes = assert_same_pills(run, photo, small_pills, 0.11)
    assert_same_pills(run, Photo((tmp_path / "large.jpg").read_bytes(), 10**7), large_pills, 0.5)
    assert_same_evidence(run, tmp_path, photo, boxes)
    assert_same_features(run, tmp_path, photo, boxes)
    assert_same_both_sides(run, tmp_path)
    assert_same_answers(run, limits, photo, boxes, small_pills)

    # Limits of another classifier are not exported, and those of an earlier export removed.
    (run.run_dir / LIMITS_NAME).write_bytes(replace(limits, model="another").to_bytes())
    export_run(run, tmp_path)
    assert not (tmp_path / LIMITS_NAME).exists()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    answers = [pill["answer"] for line in done.stdout.splitlines() for pill in json.loads(line)["pills"]]
    assert set(answers) == {"unsure"}


def write_limits(run: Run, photo: np.ndarray) -> Limits:
    """Limits within the widest gaps, so that roundings do not matter."""
    models = TwoStage(run.run_dir, run.settings, CODES)
    found = models.detect([photo], min_score=run.settings.evaluation.confidence)[0]
    (names,) = models.classify([photo], [found.boxes])
    fitted = fit_likeness(models.weights_sha256, names.features, np.arange(len(found.boxes)) // 3)
    least = widest_gap(fitted.likeness(names.features))
    confidence = widest_gap(names.probs[fitted.likeness(names.features) >= least, 0])
    limits = replace(fitted, max_wrong=0.01, confidence=confidence, known=least)
    (run.run_dir / LIMITS_NAME).write_bytes(limits.to_bytes())
    return limits


def widest_gap(values: np.ndarray) -> float:
    """The middle of the widest gap between two of the lower values."""
    ordered = np.sort(values)[: len(values) // 2 + 1]
    widest = int(np.argmax(np.diff(ordered)))
    return float(ordered[widest : widest + 2].mean())


def assert_same_answers(
    run: Run, limits: Limits, photo: np.ndarray, boxes: np.ndarray, pills: list[dict[str, Any]]
) -> None:
    (names,) = TwoStage(run.run_dir, run.settings, CODES).classify([photo], [boxes])
    known = limits.likeness(names.features)
    expected = [limits.answer(*pair)["answer"] for pair in zip(names.probs[:, 0], known, strict=True)]
    found = [min(pills, key=lambda p, box=box: np.abs(np.array(p["box"]) - box).max())["answer"] for box in boxes]
    assert found == expected and set(found) == {"code", "unsure", "unknown"}


def assert_same_both_sides(run: Run, folder: Path) -> None:
    """Photos of both sides have the same joint answer in prediction and in the exported pipeline."""
    photos = [folder / "photo.png", folder / "large.jpg"]
    temperature, models = 1.7, TwoStage(run.run_dir, run.settings, CODES)
    logits = []
    for path in photos:
        pixels = Photo(path.read_bytes(), 10**7)
        (found,) = models.detect([pixels], min_score=run.settings.evaluation.confidence)
        logits.append(models.classify([pixels], [found.boxes[:1]])[0].logits[0] / temperature)
    expected = softmax(both_sides(*(each[None] for each in logits)))[0]
    code = f"{BLOCKED} sys.argv[1:] = ['--pairs', 'photo.png', 'large.jpg'];"
    code += "runpy.run_path('pipeline.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    answers = [json.loads(line)["both_sides"] for line in done.stdout.splitlines()]
    assert [answer.pop("path") for answer in answers] == ["large.jpg", "photo.png"] and answers[0] == answers[1]
    assert answers[0]["code"] == CODES[int(expected.argmax())]
    assert answers[0]["confidence"] == pytest.approx(expected.max(), abs=0.02)
    assert answers[0]["answer"] in ("code", "unsure", "unknown")
    refused = subprocess.run([sys.executable, "pipeline.py", "--pairs", "photo.png"], cwd=folder, capture_output=True)
    assert refused.returncode == 2 and b"an even number of photos" in refused.stderr


def assert_same_features(run: Run, folder: Path, photo: np.ndarray, boxes: np.ndarray) -> None:
    pipeline = Pipeline(folder)
    (names,) = TwoStage(run.run_dir, run.settings, CODES).classify([photo], [boxes])
    found = pipeline.features(photo, boxes)
    assert found.shape == (len(boxes), 512)
    np.testing.assert_allclose(found, names.features, atol=1e-3 * np.abs(found).max())
    assert pipeline.features(photo, boxes[:0]).shape == (0, 512)
    assert pipeline.logits(photo, boxes[:0]).shape == (0, len(CODES))


def assert_same_pills(
    run: Run, photo: np.ndarray | Photo, pills: list[dict[str, Any]], tolerance_px: float
) -> np.ndarray:
    """Also gives the boxes that prediction finds."""
    models = TwoStage(run.run_dir, run.settings, CODES)
    found = models.detect([photo], min_score=run.settings.evaluation.confidence)[0]
    names = models.classify([photo], [found.boxes])[0]
    assert len(found.boxes) > 3 and np.ptp(found.scores) > 0.1
    assert len(pills) == len(found.boxes)
    # Boxes of nearly equal score may be in another order, and several may have the same score.
    for box, score, top, probs in zip(found.boxes, found.scores, names.top, names.probs, strict=True):
        apart = [np.abs(np.array(p["box"]) - box).max() + 100 * abs(p["score"] - score) for p in pills]
        pill = pills[int(np.argmin(apart))]
        np.testing.assert_allclose(pill["box"], box, atol=tolerance_px)
        assert pill["score"] == pytest.approx(score, abs=1e-3)
        assert pill["code"] == CODES[top[0]]
        # Boxes equal to a rounding may be cut a 32nd of a pixel apart, which this classifier's steep answers show.
        assert pill["confidence"] == pytest.approx(probs[0], abs=0.02)
        assert pill["name"] == f"pill {pill['code']}"
        assert pill["attributes"] == {"shape": "원형" if top[0] % 2 else "장방형"}
    return found.boxes


def assert_same_evidence(run: Run, folder: Path, photo: np.ndarray, boxes: np.ndarray) -> None:
    """The exported pipeline restricts and weighs answers as prediction does, and says the same about it."""
    (folder / "codes.txt").write_text("\n".join(CODES[1:4]), encoding="utf-8")
    evidence = evidence_for(run, folder / "codes.txt", ["shape=round"])
    assert evidence is not None
    models = TwoStage(run.run_dir, run.settings, CODES, evidence=evidence)
    (names,) = models.classify([photo], [boxes])
    words = ["photo.png", "--allow", "codes.txt", "--hint", "shape=round"]
    done = subprocess.run(
        [sys.executable, "-c", f"{BLOCKED} sys.argv[1:] = {words}; runpy.run_path('pipeline.py', run_name='__main__')"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    pills = json.loads(done.stdout)["pills"]
    assert len(pills) == len(boxes)
    for number, box in enumerate(boxes):
        pill = min(pills, key=lambda p: np.abs(np.array(p["box"]) - box).max())
        index = int(names.top[number, 0])
        unaided = names.unaided[number], names.unaided_probs[number], names.forbidden[number]
        said = evidence.facts(index, CODES[unaided[0]], float(unaided[1]), float(unaided[2]))
        assert pill["code"] == CODES[index] and pill["hints"] == said["hints"]
        assert [row["code"] for row in pill["top5"]] == [CODES[i] for i in names.top[number]]
        assert pill["confidence"] == pytest.approx(names.probs[number, 0], abs=0.02)
        assert pill["restricted"]["num_codes"] == 3
        assert pill["restricted"]["forbidden"] == pytest.approx(said["restricted"]["forbidden"], abs=0.02)
        assert pill["unaided"]["code"] == said["unaided"]["code"]
    refused = subprocess.run(
        [sys.executable, "pipeline.py", "photo.png", "--hint", "shape=rond"], cwd=folder, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "unknown shape (nearest: round" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_exported_pipeline_knows_enrolled_drugs(run: Run, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    boxes = np.array([[10, 20, 60, 60], [70, 80, 80, 60], [5, 90, 50, 50]], np.float32)
    models = TwoStage(run.run_dir, run.settings, CODES)
    (before,) = models.classify([photo], [boxes])
    # Each drug is the crop of one box; the second one has two photos.
    centred = before.features - before.features.mean(0)
    weight = 40 * centred / (centred**2).sum(1, keepdims=True)
    bias = before.logits.max(1) + 5 - (weight * before.features).sum(1)
    enrolled = Enrolled.none(weight.shape[1], models.weights_sha256)
    for name, rows in (("K-900001", [0]), ("K-900002", [1, 2])):
        enrolled = enrolled.with_drug(ClassInfo(name, 0, f"pill {name}"), weight[rows], bias[rows])
    write_enrolled(run.run_dir, enrolled)
    try:
        complete = run.with_enrolled()
    finally:
        (run.run_dir / ENROLLED_FILE).unlink()
    assert max(export_run(complete, tmp_path).values()) < MAX_DIFFERENCE
    pipeline = Pipeline(tmp_path)
    (names,) = TwoStage(run.run_dir, run.settings, complete.codes, enrolled=complete.enrolled).classify(
        [photo], [boxes]
    )
    assert np.array_equal(names.logits[:, : len(CODES)], before.logits)
    assert names.top[:, 0].tolist() == [6, 7, 7]
    np.testing.assert_allclose(names.logits[:, 6:], enrolled.logits(before.features), rtol=1e-4, atol=1e-3)
    found = pipeline.logits(photo, boxes)
    np.testing.assert_allclose(found, names.logits / 1.7, atol=2e-3 * np.abs(found).max())
    assert [entry["name"] for entry in pipeline.facts["classes"][6:]] == ["pill K-900001", "pill K-900002"]
    other = replace(complete, enrolled=replace(enrolled, model="0" * 64))
    with pytest.raises(UserError, match="enrolled with other weights"):
        export_run(other, tmp_path)


def test_gpu_plans_no_shape_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipeline.json").write_text("{}")
    given: list[Any] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda _, providers: given.append(providers))
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    Pipeline(tmp_path)
    assert given == [[(names[1], {"cudnn_conv_algo_search": "HEURISTIC"}), names[2]]] * 2
    Pipeline(tmp_path, names[:1])
    assert given[2:] == [names[:1]] * 2


def test_missing_package_or_model_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else known(name))
    with pytest.raises(UserError, match="pip install onnxscript"):
        export_run(run, tmp_path)
    monkeypatch.undo()
    empty = Run(tmp_path, run.settings, None, "", run.classes, "", "run")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no trained model for detection and classification"):
        export_run(empty, tmp_path)
