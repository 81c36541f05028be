"""Photos that `pillsnap predict` passes to the models; the models are tested in tests/integration."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from pillsnap.cli.main import app
from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.evaluate import predict
from pillsnap.manifest.table import SCHEMA, ClassInfo, write_manifest
from pillsnap.metrics.evidence import Evidence
from pillsnap.metrics.likeness import fit_likeness
from pillsnap.metrics.limits import LIMITS_NAME, NOT_EVALUATED, Limits
from pillsnap.photos.archives import parse_location
from pillsnap.runs.directory import Run, open_run

PHOTO = {"image_type": "single", "codes": ["K-1"], "boxes": [None], "width": 10, "height": 10, "source": "test"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    rows = [
        {"sample_id": "a", "image_path": "TS_1/a.png", "archive": "TS_1.zip", "offset": 40, "length": 7,
         "compression": 0, "split": "val", "group": "a"},
        {"sample_id": "b", "image_path": "TS_1/b.png", "split": "train", "group": "b"},
        {"sample_id": "c", "image_path": "TS_1/c.png", "split": "val", "group": "c"},
    ]  # fmt: skip
    table = pa.Table.from_pylist([PHOTO | row for row in rows], SCHEMA)
    write_manifest(table, tmp_path / "manifest", [ClassInfo("K-1", 0)])
    return open_run(tmp_path / "run", load_settings("demo"), tmp_path / "manifest", tmp_path)[0]


def test_photos_of_a_split_are_read_by_location(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def infer(table: pa.Table, *_: Any, **__: Any) -> list[dict[str, Any]]:
        asked.update(table.select(["sample_id", "location"]).to_pydict())
        nothing = dict.fromkeys(("named_top", "named_probs", "boxes", "scores"))
        return [{"sample_id": name, "error": "missing"} | nothing for name in reversed(asked["sample_id"])]

    monkeypatch.setattr(predict, "infer", infer)
    entries = predict.predict_manifest_photos(run, tmp_path / "manifest", None, "val")
    assert [(entry["path"], entry["error"], entry["pills"]) for entry in entries] == [
        ("TS_1/a.png", "missing", []), ("TS_1/c.png", "missing", []),
    ]  # fmt: skip
    place = parse_location(asked["location"][0])
    assert place is not None and (place.archive, place.offset, place.length) == ("TS_1.zip", 40, 7)
    assert asked["location"][1] == "TS_1/c.png"
    with pytest.raises(UserError, match="no photo of the split 'test'"):
        predict.predict_manifest_photos(run, tmp_path / "manifest", None, "test")


FOUND = {
    "error": None, "boxes": [[1, 2, 3, 4]], "scores": [0.9],
    "named_top": [[1, 0]], "named_probs": [[0.75, 0.25]], "named_unaided": [2], "named_unaided_probs": [0.5],
    "named_forbidden": [0.625], "named_known": None,
}  # fmt: skip


@pytest.fixture
def other_run(run: Run) -> Run:
    classes = [
        ClassInfo("K-1", 0, attributes={"shape": "원형"}),
        ClassInfo("K-2", 1, attributes={"shape": "팔각형"}),
        ClassInfo("K-3", 2, attributes={"shape": "타원형"}),
    ]
    return replace(run, classes=classes)


def test_answer_says_how_it_was_restricted_and_hinted(
    other_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Evidence | None] = {}
    photos = [tmp_path / "K-1_0_2_1_0_75_260_200.png"]

    def infer(*_: Any, evidence: Evidence | None, **__: Any) -> list[dict[str, Any]]:
        given["evidence"] = evidence
        return [FOUND | {"sample_id": str(photos[0])}]

    monkeypatch.setattr(predict, "infer", infer)
    (tmp_path / "codes.txt").write_text("K-2\nK-1\n", encoding="utf-8")
    evidence = predict.evidence_for(other_run, tmp_path / "codes.txt", ["shape=octagon"])
    (entry,) = predict.predict_photos(other_run, photos, evidence=evidence)
    assert given["evidence"] is evidence and evidence is not None
    near = (1 + 1.3) / 3  # an octagon, a circle that it may be mistaken for, and one more that fits
    ratios = [0.1 + 0.9 * 0.3 / near, 0.1 + 0.9 / near, 0]
    assert np.exp(evidence.log_ratios).tolist() == pytest.approx(ratios)
    assert entry == {
        "path": str(photos[0]), "error": None, "side": "back", "pills": [{
            "box": [1, 2, 3, 4], "score": 0.9, "code": "K-2", "name": "", "edi_codes": [],
            "attributes": {"shape": "팔각형"}, "confidence": 0.75,
            "top5": [{"code": "K-2", "confidence": 0.75}, {"code": "K-1", "confidence": 0.25}],
            "answer": "unsure", "reason": "the model has no limits: evaluate its run with `pillsnap evaluate`",
            "unaided": {"code": "K-3", "confidence": 0.5}, "restricted": {"num_codes": 2, "forbidden": 0.625},
            "hints": {"shape=octagon": round(ratios[1], 3)},
        }],
    }  # fmt: skip
    (plain,) = predict.predict_photos(other_run, photos)
    assert not {"unaided", "restricted", "hints"} & set(plain["pills"][0])
    assert predict.evidence_for(other_run) is None


def test_answer_has_the_limits_of_the_evaluation(
    other_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(fit_likeness("sha", np.eye(3), np.arange(3)), max_wrong=0.05, confidence=0.7, known=0.0)
    (other_run.run_dir / LIMITS_NAME).write_bytes(limits.to_bytes())
    given: dict[str, Any] = {}
    photos = [tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png")]
    found = [{"named_known": [0.5]}, {"named_known": [-1.0]}, {"named_known": [0.5], "named_probs": [[0.6, 0.4]]}, {}]

    def infer(*_: Any, limits: Limits | None, **__: Any) -> list[dict[str, Any]]:
        given["limits"] = limits
        return [FOUND | {"sample_id": str(photo)} | row for photo, row in zip(photos, found, strict=True)]

    monkeypatch.setattr(predict, "infer", infer)
    entries = predict.predict_photos(other_run, photos)
    assert given["limits"].confidence == 0.7 and given["limits"].model == "sha"
    pills = [entry["pills"][0] for entry in entries]
    assert [pill["answer"] for pill in pills] == ["code", "unknown", "unsure", "unsure"]
    assert [pill["reason"] for pill in pills] == [
        None,
        "likeness -1.0 is below 0.0",
        "confidence 0.6000 is below 0.7000, the limit for at most 5 % wrong codes",
        NOT_EVALUATED["reason"],  # limits of another classifier
    ]
    assert {pill["code"] for pill in pills} == {"K-2"} and all(len(pill["top5"]) == 2 for pill in pills)


def test_photos_of_both_sides_have_one_answer(other_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [tmp_path / name for name in ("1_front.png", "2_front.png", "1_back.png", "2_back.png")]
    logits = {photos[0]: [2, 1, 0], photos[1]: [1, 0, 0], photos[2]: [0, 3, 2]}

    def infer(*_: Any, logits_of: list[str], **__: Any) -> list[dict[str, Any]]:
        assert sorted(logits_of) == sorted(map(str, photos))
        kept = {path: [np.array(values, np.float32).tobytes()] * 2 for path, values in logits.items()}
        return [FOUND | {"sample_id": str(path), "temperature": 0.5, "named_logits": kept.get(path)} for path in photos]

    monkeypatch.setattr(predict, "infer", infer)
    entries = predict.predict_photos(other_run, photos, pairs="name")
    front, back = (np.log(np.exp(each) / np.exp(each).sum()) for each in ([4, 2, 0], [0, 6, 4]))
    weight = np.exp(back.max() - front.max()) ** 2  # of the less certain photo
    joint = np.exp(front + weight * back if weight < 1 else front / weight + back)
    shares = joint / joint.sum()
    assert [entry["pills"][0]["code"] for entry in entries] == ["K-2"] * 4
    assert entries[0]["both_sides"] == {
        "code": "K-2", "name": "", "edi_codes": [], "attributes": {"shape": "팔각형"},
        "confidence": round(float(shares[1]), 4), "path": str(photos[2]), **NOT_EVALUATED,
        "top5": [{"code": f"K-{i + 1}", "confidence": round(float(shares[i]), 4)} for i in (1, 2, 0)],
    }  # fmt: skip
    assert entries[2]["both_sides"] == entries[0]["both_sides"] | {"path": str(photos[0])}
    assert entries[1]["both_sides"] is None  # its other photo shows no pill
    # Evidence counts once, and a forbidden code is not named.
    evidence = Evidence(np.array([1.0, -np.inf, 0.5]), 2)
    (entry, *_) = predict.predict_photos(other_run, photos, pairs="name", evidence=evidence)
    assert [row["code"] for row in entry["both_sides"]["top5"]] == ["K-1", "K-3"]
    ratio = joint[2] / joint[0] * np.exp(-0.5)
    assert entry["both_sides"]["confidence"] == pytest.approx(1 / (1 + ratio), abs=1e-4)


def test_commands_refuse_an_unknown_code_before_anything_starts(run: Run, tmp_path: Path) -> None:
    (tmp_path / "codes.txt").write_text("K-11\n", encoding="utf-8")
    (tmp_path / "photo.png").write_bytes(b"")
    words = [str(tmp_path / "photo.png"), "--run", str(run.run_dir), "--allow", str(tmp_path / "codes.txt")]
    for arguments in (["predict", *words], ["evaluate", *words[1:]]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "1 of 1 codes are not known to the model: 'K-11' (nearest: K-1)" in " ".join(result.output.split())


def test_attributes_of_a_table_serve_hints(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.png").write_bytes(b"")
    (tmp_path / "drugs.csv").write_text("code,shape,price\nK-1,원형,5\n", encoding="utf-8")
    given: dict[str, Any] = {}

    def predicted(run: Run, *_: Any, evidence: Evidence | None, **__: Any) -> list[dict[str, Any]]:
        given.update(classes=run.classes, evidence=evidence)
        return [{"error": None}]

    monkeypatch.setattr("pillsnap.evaluate.predict.predict_photos", predicted)
    monkeypatch.setattr("pillsnap.cluster.session.ray_session", nullcontext)
    monkeypatch.setattr("pillsnap.runs.best_checkpoints.require_models", lambda where, tasks: [])
    words = ["predict", str(tmp_path / "photo.png"), "--run", str(run.run_dir), "--hint", "shape=round"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "no class has a known shape; add them" in " ".join(refused.output.split())
    result = CliRunner().invoke(app, [*words, "--attributes", str(tmp_path / "drugs.csv")])
    assert result.exit_code == 0, result.output
    assert given["classes"] == [ClassInfo("K-1", 0, attributes={"shape": "원형"})]
    assert given["evidence"].hints["shape=round"] == pytest.approx([0.1 + 0.9 / 1])
    assert "columns not read: price" in result.stderr and "columns not read" not in result.stdout
