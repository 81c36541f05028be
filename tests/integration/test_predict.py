"""`pillsnap predict` over a manifest: actors with both models, one JSON entry per photo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.inference import random_run
from pillsnap.cli.main import app
from pillsnap.config import load_settings
from pillsnap.data import augment
from pillsnap.data.augment import CropJitter
from pillsnap.evaluate.answers import count_answers
from pillsnap.evaluate.enrol import _compute_features
from pillsnap.evaluate.evaluator import evaluate_run
from pillsnap.evaluate.predict import evidence_for, predict_manifest_photos
from pillsnap.evaluate.two_stage import Names, TwoStage
from pillsnap.export.pipeline import softmax
from pillsnap.manifest.table import read_classes, read_manifest
from pillsnap.metrics.evidence import both_sides
from pillsnap.metrics.likeness import fit_likeness
from pillsnap.metrics.limits import ANSWERS, LIMITS_NAME, read_limits
from pillsnap.models.classifier import input_statistics, normalise
from pillsnap.photos.reader import PhotoReader
from pillsnap.runs.checkpoint import find_checkpoint, save_checkpoint
from pillsnap.runs.directory import Run, open_run
from pillsnap.runs.enrolled import ENROLLED_FILE
from pillsnap.tasks.registry import make_task

SMALL = {
    "detection.image_size_px": 96, "classification.image_size_px": 224, "train.amp": "off", "wandb.mode": "disabled",
    "train.cpus_per_worker": 0.25, "data.decoding_cpus": 0.5, "evaluation.batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(toy_manifest: Path, toy_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of untrained models that find boxes and distinguish crops; two of its photos are unreadable."""
    folder = tmp_path_factory.mktemp("predict")
    root = Path(shutil.copytree(toy_tree, folder / "photos"))
    manifest = read_manifest(toy_manifest)
    paths = manifest.filter(np.array(manifest["split"]) == "val")["image_path"].to_pylist()
    photos = [cv2.imread(str(root / path))[..., ::-1] for path in paths]
    codes = [entry.code for entry in read_classes(toy_manifest.parent)]
    settings = random_run(folder / "run", load_settings("demo", SMALL), codes, photos)
    checkpoint, _ = find_checkpoint(folder / "run" / "checkpoints" / "classification")
    assert checkpoint is not None
    weights = checkpoint.weights()
    model = make_task("classification", settings, codes).build().eval()
    model.load_state_dict(weights)
    chosen = settings.classification
    crops = [
        augment.crop(photo, box, chosen.image_size_px, chosen.crop_margin, CropJitter(), np.random.default_rng(0))
        for photo, found in zip(photos, TwoStage(folder / "run", settings, codes).detect(photos), strict=True)
        for box in found.boxes[found.scores >= settings.evaluation.confidence]
    ]
    pixels = torch.from_numpy(np.stack(crops))
    with torch.no_grad():
        logits = model(normalise(pixels, *input_statistics(model)))
    # Gives crops different classes and confidences.
    gain = 2 / float(logits.std(0).mean())
    weights["fc.weight"] *= gain
    weights["fc.bias"] = gain * (weights["fc.bias"] - logits.mean(0))
    save_checkpoint(
        checkpoint.path.parent, replace(checkpoint.position, global_step=2), model=weights, ema=weights, trainer={},
        meta={"metrics": {"temperature": 1.5}}, best=True, keep=1,
    )  # fmt: skip
    (root / paths[0]).write_bytes((root / paths[0]).read_bytes()[:500])
    (root / paths[1]).unlink()
    return open_run(folder / "run", settings, toy_manifest, root)[0]


@pytest.mark.usefixtures("ray_local")
def test_manifest_photos_are_predicted_as_one_by_one(run: Run, toy_manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "named.json"
    words = ["predict", toy_manifest, "--run", run.run_dir, "--split", "val", "--json", out]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1, result.output  # two photos could not be read
    entries = json.loads(out.read_text(encoding="utf-8"))
    rows = run.manifest.filter(np.array(run.manifest["split"]) == "val").to_pylist()
    assert [entry["path"] for entry in entries] == [row["image_path"] for row in rows]

    assert "truncated" in entries[0]["error"] and entries[0]["pills"] == []
    assert "missing" in entries[1]["error"] and entries[1]["pills"] == []
    assert [entry["error"] for entry in entries[2:]] == [None] * (len(rows) - 2)

    models, reader = TwoStage(run.run_dir, run.settings, run.codes), PhotoReader(run.data_root, 10**7)
    pills = [pill for entry in entries for pill in entry["pills"]]
    assert len(pills) >= len(rows) and max(len(entry["pills"]) for entry in entries) > 1
    assert len({pill["code"] for pill in pills}) > 1
    reduced_differs = 0
    for entry in entries[2:]:
        photo = reader.read(entry["path"])
        assert isinstance(photo, np.ndarray) and photo.shape == (320, 244, 3)
        (found,) = models.detect([photo], run.settings.evaluation.confidence)
        named = np.array([pill["box"] for pill in entry["pills"]]).reshape(-1, 4)
        np.testing.assert_allclose(named, found.boxes, atol=0.11)
        assert [pill["score"] for pill in entry["pills"]] == pytest.approx(found.scores.tolist(), abs=2e-4)
        (names,) = models.classify([photo], [found.boxes])
        for number, pill in enumerate(entry["pills"]):
            check_pill(pill, names, number, run)
        # Crops are cut at full resolution: a photo of half the size gives other confidences.
        (coarse,) = models.classify([cv2.resize(photo, None, fx=0.5, fy=0.5)], [found.boxes / 2])
        print(np.c_[coarse.probs[:, 0], names.probs[:, 0]])
        reduced_differs += int((np.abs(coarse.probs[:, 0] - names.probs[:, 0]) > 0.005).sum())
    assert reduced_differs > len(pills) / 2


def test_a_cluster_with_gpus_is_used(run: Run, toy_manifest: Path, tmp_path: Path) -> None:
    """Ray demands more of actors with GPUs. It is told of a GPU here; the models find none and run on the CPU."""
    out = tmp_path / "named.json"
    words = ["predict", toy_manifest, "--run", run.run_dir, "--split", "val", "--json", out]
    told = os.environ | {"RAY_OVERRIDE_RESOURCES": '{"GPU": 1}'}
    done = subprocess.run([sys.executable, "-m", "pillsnap.cli", *words], env=told, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr  # two photos could not be read
    assert sum(entry["error"] is None for entry in json.loads(out.read_text(encoding="utf-8"))) >= 4


def check_pill(pill: dict[str, Any], names: Names, number: int, run: Run) -> None:
    best = run.classes[names.top[number, 0]]
    assert (pill["code"], pill["name"], pill["edi_codes"]) == (best.code, best.name, best.edi_codes)
    assert best.edi_codes and best.name
    assert [row["code"] for row in pill["top5"]] == [run.codes[i] for i in names.top[number]]
    assert [row["confidence"] for row in pill["top5"]] == pytest.approx(names.probs[number].tolist(), abs=2e-3)
    assert pill["confidence"] == pill["top5"][0]["confidence"]


@pytest.mark.usefixtures("ray_local")
def test_single_mode_keeps_the_pill_of_the_highest_score(run: Run, toy_manifest: Path) -> None:
    torch.manual_seed(0)
    entries = predict_manifest_photos(run, toy_manifest, None, "val", single=True)
    assert {len(entry["pills"]) for entry in entries[2:]} <= {0, 1}
    assert [entry["error"] is None for entry in entries] == [False, False, *[True] * (len(entries) - 2)]
    models, reader = TwoStage(run.run_dir, run.settings, run.codes), PhotoReader(run.data_root, 10**7)
    for entry in entries[2:]:
        (found,) = models.detect([reader.read(entry["path"])], run.settings.evaluation.confidence)
        assert [pill["score"] for pill in entry["pills"]] == pytest.approx(found.scores[:1].tolist(), abs=2e-4)


@pytest.mark.usefixtures("ray_local")
def test_list_and_hint_reach_the_models_and_the_metrics(
    run: Run, toy_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = tmp_path / "codes.txt"
    allowed.write_text("\n".join(run.codes[1:3]), encoding="utf-8")
    shape = run.classes[1].attributes["shape"]
    out = tmp_path / "named.json"
    words = ["predict", toy_manifest, "--run", run.run_dir, "--split", "val", "--json", out]
    words += ["--allow", allowed, "--hint", f"shape={shape}"]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 1  # two photos could not be read
    entries = json.loads(out.read_text(encoding="utf-8"))
    evidence = evidence_for(run, allowed, [f"shape={shape}"])
    models, reader = (
        TwoStage(run.run_dir, run.settings, run.codes, evidence=evidence),
        PhotoReader(run.data_root, 10**7),
    )
    pills = [pill for entry in entries for pill in entry["pills"]]
    assert {pill["code"] for pill in pills} <= set(run.codes[1:3])
    assert {entry["side"] for entry in entries} <= {"front", "back"}
    assert any(pill["unaided"]["code"] != pill["code"] for pill in pills)
    for entry in entries[2:]:
        photo = reader.read(entry["path"])
        (found,) = models.detect([photo], run.settings.evaluation.confidence)
        (names,) = models.classify([photo], [found.boxes])
        for number, pill in enumerate(entry["pills"]):
            check_pill(pill, names, number, run)
            assert pill["attributes"] == run.classes[names.top[number, 0]].attributes
            assert pill["restricted"]["forbidden"] == pytest.approx(float(names.forbidden[number]), abs=2e-3)

    trained, _ = find_checkpoint(run.checkpoint_dir("classification"))
    assert trained is not None
    checkpoint = SimpleNamespace(meta=trained.meta | {"manifest_hash": run.manifest_hash})
    best = {"classification": checkpoint}
    monkeypatch.setattr("pillsnap.evaluate.evaluator.best_checkpoints", lambda *_: (best, []))
    counts = dict.fromkeys(run.codes, 1.0)
    metrics = evaluate_run(run, allowed=run.codes[1:3], counts=counts)
    restricted = metrics["restricted"]["classification"]
    num_pills = restricted["restricted"]["num_samples"]
    assert 0 < num_pills == restricted["unrestricted"]["num_samples"] < metrics["classification"]["num_samples"]
    assert restricted["restricted"]["top1"] >= restricted["unrestricted"]["top1"]
    assert metrics["classification"]["weighted"]["covered"] == 1.0
    rows = metrics["classification"]["by_attribute"]["shape"]
    assert sum(row["num_samples"] for row in rows) == metrics["classification"]["num_samples"]
    text = " ".join((run.run_dir / "report.html").read_text(encoding="utf-8").split())
    assert "Restricted to 2 codes" in text and "By attribute" in text


@pytest.mark.usefixtures("ray_local")
def test_evaluation_and_prediction_give_the_same_answers(
    run: Run, toy_manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.run_dir / LIMITS_NAME).unlink(missing_ok=True)
    assert set(answers_of(run, toy_manifest)) == {"unsure"}
    trained, _ = find_checkpoint(run.checkpoint_dir("classification"))
    assert trained is not None
    checkpoint = SimpleNamespace(meta=trained.meta | {"manifest_hash": run.manifest_hash})
    best = {"classification": checkpoint}
    monkeypatch.setattr("pillsnap.evaluate.evaluator.best_checkpoints", lambda *_: (best, []))
    metrics = evaluate_run(run)
    limits = read_limits(run.run_dir)
    assert limits is not None and limits.model == trained.meta["files"]["ema.safetensors"]
    found = metrics["classification"]["answers"]
    # Too few photos to show anything.
    assert (found["max_wrong"], found["threshold"], limits.confidence) == (0.01, None, np.inf)
    assert found["coverage"] == 0 and "at least 299 validated photo groups" in found["reason"]
    answers = answers_of(run, toy_manifest)
    assert {answer: answers.count(answer) for answer in ANSWERS} == metrics["pipeline"]["answers"]
    assert answers.count("unsure") > 0 == answers.count("code")
    text = " ".join((run.run_dir / "report.html").read_text(encoding="utf-8").split())
    assert "Code, unsure or unknown" in text
    assert f"Found pills: 0 with a code, {answers.count('unsure')} unsure" in text

    # Limits that parts of the pills fall below.
    pipeline = pq.read_table(run.run_dir / "predictions" / "pipeline.parquet")
    likeness, probs = (np.concatenate(pipeline[name].to_pylist()) for name in ("known", "probs"))
    least = float(np.quantile(likeness, 0.3)) + 1e-6
    limits = replace(limits, known=least, confidence=float(np.median(probs[likeness >= least])) + 1e-6)
    (run.run_dir / LIMITS_NAME).write_bytes(limits.to_bytes())
    answers = answers_of(run, toy_manifest)
    counts = {answer: answers.count(answer) for answer in ANSWERS}
    assert counts == count_answers(limits, pipeline) and min(counts.values()) > 0


def answers_of(run: Run, manifest: Path) -> list[str]:
    """Answers to all pills of the validation photos; each but a code has a reason."""
    pills = [pill for entry in predict_manifest_photos(run, manifest, None, "val") for pill in entry["pills"]]
    assert all((pill["reason"] is None) == (pill["answer"] == "code") for pill in pills)
    return [pill["answer"] for pill in pills]


@pytest.mark.usefixtures("ray_local")
def test_enrolled_drug_and_both_sides_reach_prediction(
    run: Run, toy_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation features are computed once; a drug is named in a manifest's photos; pairs have a joint answer."""
    sha256 = TwoStage(run.run_dir, run.settings, run.codes).weights_sha256
    (run.run_dir / LIMITS_NAME).write_bytes(fit_likeness(sha256, *_compute_features(run)).to_bytes())
    photo = tmp_path / "new.png"
    cv2.imwrite(str(photo), np.random.default_rng(5).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    words = ["enrol", "--run", run.run_dir, "K-900001", photo, "--crops", "--max-loss", "1", "--name", "new"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0 and "K-900001 is enrolled from 1 photos; of " in result.output, result.output
    monkeypatch.setattr("pillsnap.evaluate.enrol.infer", lambda *_, **__: pytest.fail("computed twice"))
    words[3:5] = "K-900002", tmp_path / "other.png"
    cv2.imwrite(str(words[4]), np.random.default_rng(6).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    complete = run.with_enrolled()
    assert complete.enrolled is not None and complete.codes[-2:] == ["K-900001", "K-900002"]
    out = tmp_path / "named.json"
    words = ["predict", toy_manifest, "--run", run.run_dir, "--split", "val", "--json", out, "--pairs", "order"]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 1  # two photos could not be read
    entries = json.loads(out.read_text(encoding="utf-8"))
    models = TwoStage(run.run_dir, run.settings, complete.codes, enrolled=complete.enrolled)
    reader, checked = PhotoReader(run.data_root, 10**7), 0
    for first, second in zip(entries[::2], entries[1::2], strict=True):
        if first["error"] or second["error"] or not (first["pills"] and second["pills"]):
            assert first["both_sides"] is second["both_sides"] is None
            continue
        logits = []
        for entry in (first, second):
            photo = reader.read(entry["path"])
            (found,) = models.detect([photo], run.settings.evaluation.confidence)
            (names,) = models.classify([photo], [found.boxes[:1]])
            check_pill(entry["pills"][0], names, 0, complete)
            logits.append(names.logits.astype(np.float64) / 1.5)
        joint = softmax(both_sides(*logits))[0]
        assert first["both_sides"]["path"] == second["path"] and second["both_sides"]["path"] == first["path"]
        assert first["both_sides"]["code"] == complete.codes[int(joint.argmax())]
        assert first["both_sides"]["confidence"] == pytest.approx(joint.max(), abs=5e-3)
        checked += 1
    assert checked >= 2
    for code in ("K-900002", "K-900001"):
        assert CliRunner().invoke(app, ["enrol", "--run", str(run.run_dir), "--remove", code]).exit_code == 0
    assert not (run.run_dir / ENROLLED_FILE).exists()
