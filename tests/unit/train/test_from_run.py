"""A run that starts from the best models of another one, with other classes, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pillsnap.cluster.session import Workers
from pillsnap.config import Settings
from pillsnap.errors import UserError
from pillsnap.manifest.table import read_classes
from pillsnap.observe.events import EventLog, read_events
from pillsnap.runs.checkpoint import Position, find_checkpoint, save_checkpoint
from pillsnap.runs.directory import Run, open_run
from pillsnap.runs.remote_checkpoints import find_run_checkpoint
from pillsnap.storage import scratch
from pillsnap.tasks.best_model import load_best
from pillsnap.tasks.registry import make_task
from pillsnap.train import driver
from pillsnap.train.from_run import best_checkpoints, start_from
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState
from tests.reliability.harness import LoopRun, same_state, tiny

CPU = torch.device("cpu")
SETTINGS = tiny(classification__epochs=1)


def trained_run(where: Path, codes: list[str], settings: Settings = SETTINGS) -> Path:
    """A run directory with a best checkpoint of both tasks, whose average differs from its model."""
    for number, name in enumerate(settings.tasks):
        torch.manual_seed(number)
        task = make_task(name, settings, codes, untrained=True)
        model, average = task.build().state_dict(), task.build().state_dict()
        save_checkpoint(
            where / "checkpoints" / name, Position(2, 0, 20), model=model, ema=average, trainer={"best": 0.5},
            meta={"task": name, "config": settings.model_dump(mode="json"), "codes": codes, "manifest_hash": "0"},
            best=True, keep=1,
        )  # fmt: skip
    return where


@pytest.fixture
def codes(toy_manifest: Path) -> list[str]:
    """Two of the toy manifest's four classes, in another order, around one that it does not have."""
    own = [entry.code for entry in read_classes(toy_manifest.parent)]
    return [own[3], "K-999999", own[1]]


def begin(where: Path, source: Path, manifest: Path, root: Path, settings: Settings = SETTINGS) -> tuple[Run, Any]:
    best = best_checkpoints(str(source), str(where), settings)
    run, _ = open_run(where, settings, manifest, root)
    return run, start_from(run, str(source), best)


def before_the_first_step(run: Run, name: str) -> TrainingState:
    task, group = make_task(name, run.settings, run.codes, untrained=True), WorkerGroup(CPU)
    last = find_checkpoint(run.checkpoint_dir(name))[0]
    assert last is not None and last.position == Position()
    return TrainingState(task, run.settings.train, CPU, group, MicrobatchRunner(name, 4, group, None, print), last)


def test_logits_of_old_classes_are_the_other_runs(
    codes: list[str], toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    """Bit for bit by the same matrix product: MKL sums in another order where a product has more rows."""
    source = trained_run(tmp_path / "old", codes)
    run, notes = begin(tmp_path / "new", source, toy_manifest, toy_tree)
    path = source / "checkpoints/classification/step-00000020-epoch-0002"
    kept = "2 classes keep their weights, 2 are new, 1 are left out"
    assert notes[1] == f"classification starts from {path}; {kept}"
    old = load_best(source, "classification", SETTINGS, codes)
    assert old is not None
    photo = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    state = before_the_first_step(run, "classification")
    rows = [run.codes.index(code) for code in (codes[0], codes[2])]
    with torch.inference_mode():
        images = old.task._inputs(old.model, torch.from_numpy(photo), 32)  # type: ignore[attr-defined]
        expected = _features_and_logits(old.model.to(memory_format=torch.channels_last), images, [0, 2])
        for model in (state.model, state.ema.module):
            got = _features_and_logits(model.eval(), images, rows)
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
            torch.testing.assert_close(model(images)[:, rows], expected[1], rtol=0, atol=1e-6)


def _features_and_logits(model: Any, images: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    return features, torch.nn.functional.linear(features, model.fc.weight[rows], model.fc.bias[rows])


def test_the_detector_is_taken_whole(codes: list[str], toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    source = trained_run(tmp_path / "old", codes)
    run, notes = begin(tmp_path / "new", source, toy_manifest, toy_tree)
    assert notes[0] == f"detection starts from {source / 'checkpoints/detection/step-00000020-epoch-0002'}"
    best = load_best(source, "detection", SETTINGS, codes)
    assert best is not None
    state = before_the_first_step(run, "detection").model.state_dict()
    assert [name for name, tensor in best.model.state_dict().items() if not torch.equal(tensor, state[name])] == []


def test_the_run_trains_on_without_the_other_one_and_restarts_alike(
    codes: list[str], toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    """Also when it dies before its first own checkpoint, and when the same command is given again."""
    source = trained_run(tmp_path / "old", codes)
    run, _ = begin(tmp_path / "new", source, toy_manifest, toy_tree)
    shutil.rmtree(source)
    _, notes = begin(tmp_path / "new", source, toy_manifest, toy_tree)
    assert notes[1] == f"classification has begun: it continues from its own checkpoint, not from {source}"
    shutil.copytree(run.run_dir, tmp_path / "copy")
    ends = []
    for folder in (run.run_dir, tmp_path / "copy"):
        one = LoopRun(folder, "classification", SETTINGS, toy_manifest, toy_tree)
        assert one.train().epoch == 1
        ends.append(one.last())
    assert same_state(*ends) == []  # type: ignore[arg-type]


def test_the_start_of_the_task_is_an_event(
    codes: list[str], toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = trained_run(tmp_path / "old", codes)
    run, _ = begin(tmp_path / "new", source, toy_manifest, toy_tree)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "make_stream", stop)
    with EventLog(run.run_dir) as events:
        for name in run.settings.tasks:
            with pytest.raises(KeyboardInterrupt):
                driver._train_task(run, name, Workers(1, 1, False), events, None)
    found = [event for event in read_events(run.run_dir) if event["kind"] == "initial_weights"]
    assert [event["task"] for event in found] == ["detection", "classification"]
    assert {event["source"] for event in found} == {str(source)}
    assert [found[1][f"classes_{part}"] for part in ("kept", "new", "left")] == [2, 2, 1]


def test_runs_in_remote_storage(
    codes: list[str], toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / "cache"))
    trained_run(tmp_path / "storage/old", codes)
    source, where = (f"{(tmp_path / 'storage').as_uri()}/{name}" for name in ("old", "new"))
    best = best_checkpoints(source, where, SETTINGS)
    run, _ = open_run(scratch(where, "driver"), SETTINGS, toy_manifest, toy_tree, uri=where)
    notes = start_from(run, source, best)
    assert [note.split(" starts from")[0] for note in notes] == ["detection", "classification"]
    for name in SETTINGS.tasks:
        last, damaged = find_run_checkpoint(where, name, role="worker")
        assert last is not None and not damaged and last.meta["from_run"]["source"] == source
    assert best_checkpoints(source, where, SETTINGS) == {}


def test_what_cannot_be_taken_is_refused_before_anything_is_written(
    codes: list[str], toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    source, new = trained_run(tmp_path / "old", codes), tmp_path / "new"

    def refused(match: str, source: Path = source, settings: Settings = SETTINGS) -> None:
        with pytest.raises(UserError, match=match) as caught:
            begin(new, source, toy_manifest, toy_tree, settings)
        assert "\n" not in str(caught.value) and not new.exists()

    refused("is the run itself: name another one", source=tmp_path / "elsewhere/../new")
    refused("has no trained model of detection", source=tmp_path / "none")
    refused("has resnet10t for classification, and this run has resnet18: give --set classification.model=resnet10t",
            settings=tiny(classification__model="resnet18"))  # fmt: skip
    (source / "checkpoints/classification/step-00000020-epoch-0002/ema.safetensors").write_bytes(b"x")
    refused(r"ema\.safetensors is damaged: its sha256 is not the recorded one: name another run")
    begin(new, source, toy_manifest, toy_tree, tiny(train__task="detection"))  # needs only the detector
