"""Enrolling a drug: its photos are named, trained logits stay bit for bit, what it may take is bounded."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pillsnap.cli.main import app
from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.evaluate import enrol
from pillsnap.evaluate.enrol import add_rows, enrol_drug, remove_drug
from pillsnap.evaluate.predict import evidence_for
from pillsnap.evaluate.two_stage import Detections, TwoStage
from pillsnap.manifest.table import ClassInfo
from pillsnap.metrics.likeness import fit_likeness
from pillsnap.metrics.limits import LIMITS_NAME
from pillsnap.models.imprinting import Crops
from pillsnap.runs.checkpoint import Position, save_checkpoint
from pillsnap.runs.directory import Run, open_run
from pillsnap.runs.enrolled import ENROLLED_FILE, Enrolled, read_enrolled
from pillsnap.tasks.registry import make_task

SIDE = 64
WHOLE = np.array([[0, 0, SIDE, SIDE]], np.float32)
TEMPERATURE = 0.5


def pill(number: int, view: int = 0) -> np.ndarray:
    """A picture of drug `number`: coarse colours of its own, and noise of the view."""
    colours = np.random.default_rng(number).integers(40, 215, (4, 4, 3)).astype(np.uint8)
    noise = np.random.default_rng([number, view, 1]).integers(-25, 25, (SIDE, SIDE, 3))
    large = cv2.resize(colours, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    return np.clip(large.astype(np.int16) + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def run(toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose classifier names `pill(number)` by class `number`: its head is fitted to random features."""
    changes = {"classification.image_size_px": SIDE, "train.amp": "off", "classification.crop_margin": 0.0}
    run, _ = open_run(tmp_path / "run", load_settings("demo", changes), toy_manifest, toy_tree)
    torch.manual_seed(0)
    model = make_task("classification", run.settings, run.codes).build().eval()
    save(run, model)
    models = TwoStage(run.run_dir, run.settings, run.codes)
    labels = np.repeat(np.arange(len(run.codes)), 12)
    pictures = [pill(label, view) for view, label in enumerate(labels)]
    features = np.stack([models.classify([picture], [WHOLE])[0].features[0] for picture in pictures])
    target = 6 * np.eye(len(run.codes))[labels] - 3
    fitted = np.linalg.lstsq(np.c_[features, np.ones(len(features))], target, rcond=1e-4)[0]
    with torch.no_grad():
        model.fc.weight.copy_(torch.from_numpy(fitted[:-1].T))
        model.fc.bias.copy_(torch.from_numpy(fitted[-1]))
    save(run, model)
    limits = fit_likeness(TwoStage(run.run_dir, run.settings, run.codes).weights_sha256, features, labels)
    (run.run_dir / LIMITS_NAME).write_bytes(limits.to_bytes())
    monkeypatch.setattr(enrol, "_compute_features", lambda _: (features, labels))
    return run


def save(run: Run, model: torch.nn.Module) -> None:
    weights = model.state_dict()
    folder = run.checkpoint_dir("classification")
    save_checkpoint(folder, Position(1, 0, 1), model=weights, ema=weights, trainer={},
                    meta={"metrics": {"temperature": TEMPERATURE}}, best=True, keep=1)  # fmt: skip


def photos_of(number: int, folder: Path, count: int = 3) -> list[Path]:
    paths = [folder / f"{number}-{view}.png" for view in range(100, 100 + count)]
    for view, path in enumerate(paths):
        cv2.imwrite(str(path), pill(number, 100 + view)[..., ::-1])
    return paths


def logits_of(run: Run, numbers: list[int]) -> np.ndarray:
    models = TwoStage(run.run_dir, run.settings, run.codes, enrolled=run.enrolled)
    pictures = [pill(number, view) for number in numbers for view in range(200, 204)]
    return np.stack([models.classify([picture], [WHOLE])[0].logits[0] for picture in pictures])


def test_enrolled_drugs_are_named_beside_the_trained_ones(run: Run, tmp_path: Path) -> None:
    trained = list(range(len(run.codes)))
    before = logits_of(run, trained)
    assert (before.argmax(1) == np.repeat(trained, 4)).all()
    attributes = {"shape": "원형"}
    for number, count in ((20, 3), (30, 1)):
        info = ClassInfo(f"K-9000{number}", 0, f"새 약 {number}", attributes=attributes)
        result = enrol_drug(run, info, photos_of(number, tmp_path, count), crops=True)
        assert (result.num_crops, result.num_photos) == (48, count)
        assert result.before == 1.0 and result.after >= 0.995
    complete = run.with_enrolled()
    assert complete.codes == [*run.codes, "K-900020", "K-900030"]
    assert [info.index for info in complete.classes] == list(range(len(trained) + 2))
    assert complete.classes[-2].num_train == 3 and complete.classes[-1].name == "새 약 30"
    after = logits_of(complete, trained)
    assert np.array_equal(after[:, : len(trained)], before)  # bit for bit
    assert (after.argmax(1) == np.repeat(trained, 4)).all()
    new = logits_of(complete, [20, 30])
    assert (new.argmax(1) == len(trained) + np.repeat([0, 1], 4)).all()
    # Lists and hints know them.
    (tmp_path / "codes.txt").write_text(f"K-900030\n{run.codes[1]}\n", encoding="utf-8")
    evidence = evidence_for(complete, tmp_path / "codes.txt", ["shape=round"])
    assert evidence is not None and evidence.num_allowed == 2
    assert np.flatnonzero(np.isfinite(evidence.log_ratios)).tolist() == [1, len(trained) + 1]


def test_removing_restores_the_bytes_of_before(run: Run, tmp_path: Path) -> None:
    path = run.run_dir / ENROLLED_FILE
    enrol_drug(run, ClassInfo("K-1", 0), photos_of(20, tmp_path), crops=True)
    before = path.read_bytes()
    enrol_drug(run, ClassInfo("K-2", 0), photos_of(30, tmp_path, 5), crops=True)
    assert path.read_bytes() != before
    remove_drug(run, "K-2")
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="K-2 is not enrolled; enrolled are: K-1"):
        remove_drug(run, "K-2")
    remove_drug(run, "K-1")
    assert not path.exists() and run.with_enrolled() is run
    with pytest.raises(UserError, match="K-1 is not enrolled"):
        remove_drug(run, "K-1")


def test_look_alike_of_a_trained_drug_is_refused(run: Run, tmp_path: Path) -> None:
    photos = photos_of(2, tmp_path)
    said = rf"K-1 is not enrolled: it would take .* % of 48 .* most of them from {run.codes[2]}, and at most 0\.5 %"
    with pytest.raises(UserError, match=said):
        enrol_drug(run, ClassInfo("K-1", 0), photos, crops=True)
    assert read_enrolled(run.run_dir) is None
    result = enrol_drug(run, ClassInfo("K-1", 0), photos, crops=True, max_loss=0.5)
    assert 0.5 <= result.after < 1 and result.lowered == 0
    # With the usual bound, another drug lowers the logits of both until the answers are right again.
    result = enrol_drug(run, ClassInfo("K-2", 0), photos_of(30, tmp_path), crops=True)
    assert result.after == 1 and result.lowered > 0
    complete = run.with_enrolled()
    assert complete.enrolled is not None and complete.enrolled.lowered.tolist() == [0, np.float32(result.lowered)]


def test_bound_holds_over_all_enrolled_drugs(run: Run, tmp_path: Path) -> None:
    """Pictures between trained ones and new ones press on the trained answers."""
    for number in range(40, 48):
        mixed = [cv2.addWeighted(pill(number % 4, view), 0.55, pill(number, view), 0.45, 0) for view in (1, 2)]
        paths = [tmp_path / f"{number}-{view}.png" for view in range(2)]
        for path, picture in zip(paths, mixed, strict=True):
            cv2.imwrite(str(path), picture[..., ::-1])
        try:
            result = enrol_drug(run, ClassInfo(f"K-{number}", 0), paths, crops=True, max_loss=1 / 48)
        except UserError as error:
            assert "it would take" in str(error)
        else:
            assert result.before - result.after <= 1 / 48 + 1e-9


@pytest.mark.parametrize(("num_crops", "taken"), [(398, 0), (399, 1), (799, 3)])
def test_bound_holds_for_other_crops_like_those_that_set_it(num_crops: int, taken: int) -> None:
    # Of crops like these, (taken + 1) / (crops + 1) is expected to be lost: at most 0.5 %.
    features = np.linspace(0, 1, num_crops, dtype=np.float32)[:, None]
    known = Crops(features, np.zeros((num_crops, 1), np.float32), np.zeros(num_crops, np.int64))
    alone = int(0.005 * num_crops)  # by itself the drug takes what is just not refused
    bias = -(1 - (alone - 0.5) / (num_crops - 1))
    rows = np.ones((1, 1)), np.array([bias])
    together, result = add_rows(Enrolled.none(1, ""), ClassInfo("K-1", 0), *rows, known, ["K-0"], 0.005)
    assert (together.logits(features)[:, 0] > 0).sum() == taken
    assert result.after == pytest.approx(1 - taken / num_crops) and (taken + 1) / (num_crops + 1) <= 0.005


def test_run_without_limits_is_refused(run: Run, tmp_path: Path) -> None:
    (run.run_dir / LIMITS_NAME).unlink()
    with pytest.raises(UserError, match=r"not been evaluated with its weights.*`pillsnap evaluate --run"):
        enrol_drug(run, ClassInfo("K-1", 0), photos_of(20, tmp_path), crops=True)


@pytest.mark.parametrize(("found", "count"), [(0, "0 pills"), (2, "2 pills"), (1, "")])
def test_photos_show_exactly_one_pill(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: int, count: str
) -> None:
    boxes = np.repeat(WHOLE, found, 0)
    monkeypatch.setattr(TwoStage, "detect", lambda *_: [Detections(boxes, np.ones(found))])
    (photo,) = photos_of(20, tmp_path, 1)
    with pytest.raises(UserError, match=r"no trained detector: .*--crops"):
        enrol_drug(run, ClassInfo("K-1", 0), [photo])
    weights = make_task("detection", run.settings, run.codes).build().state_dict()
    save_checkpoint(run.checkpoint_dir("detection"), Position(1, 0, 1), model=weights, ema=weights, trainer={},
                    meta={"metrics": {}}, best=True, keep=1)  # fmt: skip
    if found == 1:
        assert enrol_drug(run, ClassInfo("K-1", 0), [photo]).num_photos == 1
        return
    with pytest.raises(UserError, match=rf"{re.escape(str(photo))}: the detector finds {count}.*--crops"):
        enrol_drug(run, ClassInfo("K-1", 0), [photo])


def test_what_cannot_be_enrolled_is_said(run: Run, tmp_path: Path) -> None:
    photos = photos_of(20, tmp_path, 11)
    with pytest.raises(UserError, match=f"{run.codes[0]} is one of the {len(run.codes)} trained drugs"):
        enrol_drug(run, ClassInfo(run.codes[0], 0), photos[:2], crops=True)
    with pytest.raises(UserError, match="11 photos given; a drug is enrolled from 1 to 10"):
        enrol_drug(run, ClassInfo("K-1", 0), photos, crops=True)
    (tmp_path / "bad.png").write_bytes(photos[0].read_bytes()[:100])
    with pytest.raises(UserError, match=r"bad\.png: cannot be read"):
        enrol_drug(run, ClassInfo("K-1", 0), [tmp_path / "bad.png"], crops=True)
    enrol_drug(run, ClassInfo("K-1", 0), photos[:2], crops=True)
    with pytest.raises(UserError, match=r"K-1 is enrolled: .*--remove K-1` first"):
        enrol_drug(run, ClassInfo("K-1", 0), photos[:2], crops=True)


def test_drugs_of_other_weights_are_refused(run: Run, tmp_path: Path) -> None:
    enrol_drug(run, ClassInfo("K-1", 0), photos_of(20, tmp_path), crops=True)
    save(run, make_task("classification", run.settings, run.codes).build())
    complete = run.with_enrolled()
    with pytest.raises(UserError, match=r"enrolled with other weights.*\(K-1\)"):
        TwoStage(run.run_dir, run.settings, complete.codes, enrolled=complete.enrolled)
    with pytest.raises(UserError, match="enrolled with other weights"):
        enrol_drug(run, ClassInfo("K-2", 0), photos_of(30, tmp_path), crops=True)
    remove_drug(run, "K-1")
    assert run.with_enrolled() is run


def test_command_enrols_lists_and_removes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    photos_of(20, tmp_path / "new", 3)
    (tmp_path / "drugs.csv").write_text("code,shape\nK-7,원형\n", encoding="utf-8")

    def pillsnap(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["enrol", "--run", str(run.run_dir), *words])
        return result.exit_code, " ".join(result.output.split())

    words = ["K-7", str(tmp_path / "new"), "--crops", "--name", "새 약", "--attributes", str(tmp_path / "drugs.csv")]
    code, text = pillsnap(*words)
    assert code == 0 and "K-7 is enrolled from 3 photos; of 48 validation crops" in text, text
    assert pillsnap("--list") == (0, "K-7 3 photos 새 약")
    (info,) = run.with_enrolled().classes[len(run.codes) :]
    assert (info.name, info.attributes) == ("새 약", {"shape": "원형"})
    code, text = pillsnap("K-7", str(tmp_path / "new"), "--remove", "K-7")
    assert code == 2 and "Give a code and its photos, --remove CODE, or --list." in text
    assert pillsnap("--remove", "K-7") == (0, "K-7 is no longer enrolled")
    assert pillsnap("--list") == (0, "")
