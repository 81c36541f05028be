"""A batch that does not fit into memory is split equally on all workers, with one warning per size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pillsnap.data.loader import Loader
from pillsnap.errors import UserError
from pillsnap.runs.directory import MEMORY_FILE
from pillsnap.tasks.classification import ClassificationTask
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner, SplitAgain
from pillsnap.train.step.training_state import TrainingState, _Losses
from tests.reliability.harness import NO_BATCH_NORM, LoopRun, inject, same_state, say, tiny, train_two


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(TrainingState, "step", TrainingState.step)
    monkeypatch.setattr(_Losses, "forward", _Losses.forward)
    faults: dict = {}
    inject(faults, 0)
    return faults


def test_split_steps_equal_unsplit_ones(faults: dict, toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    settings = tiny(
        classification__epochs=1, train__amp="off", **{k.replace(".", "__"): v for k, v in NO_BATCH_NORM.items()}
    )
    whole = LoopRun(tmp_path / "whole", "classification", settings, toy_manifest, toy_tree)
    whole.train()
    losses = [event["loss"] for event in whole.events("step")]
    passed = 0
    for rows in (4, 2, 1):
        faults["oom_above_rows"] = rows
        split = LoopRun(tmp_path / f"rows-{rows}", "classification", settings, toy_manifest, toy_tree)
        split.train()
        assert split.events("step")[0]["loss"] == pytest.approx(losses[0], abs=1e-5)
        assert [event["loss"] for event in split.events("step")] == pytest.approx(losses, abs=1e-3)
        warnings = [event["message"] for event in split.events("warning")]
        assert len(warnings) == {4: 1, 2: 2, 1: 3}[rows] <= 3
        assert "does not fit into GPU memory" in warnings[-1] and f"parts of {rows} " in warnings[-1]
        assert json.loads((split.run_dir / MEMORY_FILE).read_text()) == {"classification": rows}
        passed += 1
    say(passed, 3, "out of memory above 4, 2 and 1 rows: at most 3 retries, loss of the unsplit step within 1e-5")


def test_restart_begins_with_the_last_size(faults: dict, toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    faults["oom_above_rows"] = 2
    run = LoopRun(tmp_path / "run", "classification", tiny(classification__epochs=2), toy_manifest, toy_tree)
    run.train(stop_at=lambda polls: polls == 2)
    before = len(run.events("warning"))
    run.train()
    assert len(run.events("warning")) == before == 2
    assert [event["epoch"] for event in run.events("epoch")] == [1, 2]


def test_single_row_too_large_is_an_error(faults: dict, toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    faults["oom_above_rows"] = 0
    run = LoopRun(tmp_path / "run", "classification", tiny(), toy_manifest, toy_tree)
    with pytest.raises(UserError, match=r"a single image does not fit.*image_size_px"):
        run.train()
    assert run.last() is None


class Shortage:
    """Replaces a method: its calls with these numbers run out of memory, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *numbers: int) -> None:
        method, self.num_calls = getattr(owner, name), 0

        def replacement(*arguments: Any) -> Any:
            self.num_calls += 1
            result = method(*arguments)
            if self.num_calls in numbers:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return result

        monkeypatch.setattr(owner, name, replacement)


PLACES = {
    "step": (_Losses, "forward"),
    "loader": (Loader, "_to_device"),
    "validation": (ClassificationTask, "validate"),
}


@pytest.mark.parametrize("place", PLACES)
def test_transient_shortage_changes_nothing(
    place: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out twice, but not twice in a row: the batch is computed again at the same size."""
    settings = tiny(classification__epochs=2, classification__drop_rate=0.5)
    runs = [LoopRun(tmp_path / name, "classification", settings, toy_manifest, toy_tree) for name in ("whole", "short")]
    runs[0].train()
    second = 8 if place == "loader" else 4  # the loader copies several arrays per batch
    shortage = Shortage(monkeypatch, *PLACES[place], 2, second)
    runs[1].train()
    assert shortage.num_calls > second
    ends = [run.last() for run in runs]
    assert ends[0] and ends[1] and same_state(ends[0], ends[1]) == []
    assert runs[0].trained_ids == runs[1].trained_ids
    assert runs[1].events("warning") == [] and not (runs[1].run_dir / MEMORY_FILE).exists()


@pytest.mark.parametrize("place", PLACES)
def test_lasting_shortage_halves_the_size(
    place: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(classification__epochs=2)
    run = LoopRun(tmp_path / "run", "classification", settings, toy_manifest, toy_tree)
    Shortage(monkeypatch, *PLACES[place], 2, 3)
    assert run.train().epoch == 2
    assert json.loads((run.run_dir / MEMORY_FILE).read_text()) == {"classification": 4}
    (warning,) = run.events("warning")
    assert "parts of 4 " in warning["message"]
    steps = [(epoch, step) for epoch, step, _ in run.trained_ids]
    assert steps == [(epoch, step) for epoch in range(2) for step in range(run.plan.train_steps)]
    assert [event["step"] for event in run.events("step")] == list(range(1, len(steps) + 1))


def test_retry_equals_splitting_at_once(faults: dict, toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    """Running statistics and random state of the failed attempt are restored."""
    settings = tiny(classification__epochs=1, classification__drop_rate=0.5)
    faults["oom_above_rows"] = 4
    retried = LoopRun(tmp_path / "retried", "classification", settings, toy_manifest, toy_tree)
    retried.train()
    at_once = LoopRun(tmp_path / "at_once", "classification", settings, toy_manifest, toy_tree)
    at_once.run_dir.mkdir()
    (at_once.run_dir / MEMORY_FILE).write_text('{"classification": 4}')
    at_once.train()
    ends = [run.last() for run in (retried, at_once)]
    assert ends[0] and ends[1]
    for which in ("model", "ema"):
        first, second = ends[0].weights(which), ends[1].weights(which)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_all_workers_split_when_one_runs_out_of_memory(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    ends = train_two(
        tmp_path / "run", "classification", tiny(classification__epochs=1), toy_manifest, toy_tree,
        {"oom_above_rows": 2, "oom_rank": 1},
    )  # fmt: skip
    assert [end["error"] for end in ends] == ["", ""]
    run = LoopRun(tmp_path / "run", "classification", tiny(classification__epochs=1), toy_manifest, toy_tree)
    assert len(run.events("warning")) == 1 and "parts of 2 " in run.events("warning")[0]["message"]
    last = run.last()
    assert last is not None and last.position.epoch == 1
    ends = train_two(
        tmp_path / "none", "classification", tiny(classification__image_size_px=64), toy_manifest, toy_tree,
        {"oom_above_rows": 0, "oom_rank": 1},
    )  # fmt: skip
    assert all("a single image does not fit" in end["error"] for end in ends), ends
    say(2, 2, "one of two workers out of memory: both split alike; at one row both end with the same error")


def test_worker_out_of_memory_after_the_trial_steps_restarts_all(tmp_path: Path) -> None:
    class Two(WorkerGroup):
        def __init__(self) -> None:
            self.rank, self.size = 1, 2

        def any(self, flag: bool) -> bool:
            return flag

    class Batch:
        images = torch.zeros(8, 1)

    warnings: list[str] = []
    memory = MicrobatchRunner("detection", 8, Two(), tmp_path / MEMORY_FILE, warnings.append)
    for _ in range(3):
        memory.run(Batch(), lambda part, last: {"loss": torch.ones(())}, lambda: None)  # type: ignore[arg-type]
    assert not memory.agrees

    def out_of_memory(part: object, last: bool) -> dict[str, torch.Tensor]:
        raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(SplitAgain, match="parts of 4"):
        memory.run(Batch(), out_of_memory, lambda: None)  # type: ignore[arg-type]
    assert json.loads((tmp_path / MEMORY_FILE).read_text()) == {"detection": 4}
    assert len(warnings) == 1


class Scripted(WorkerGroup):
    """Rank 1 of two workers; rank 0 runs out of memory at the agreements with these numbers, counted from 1."""

    def __init__(self, *numbers: int) -> None:
        self.rank, self.size = 1, 2
        self._numbers, self.num_agreements = numbers, 0

    def any(self, flag: bool) -> bool:
        self.num_agreements += 1
        return flag or self.num_agreements in self._numbers


def test_no_batch_is_skipped_when_the_loader_of_another_worker_has_no_memory(tmp_path: Path) -> None:
    for numbers, size in (((1, 3), 8), ((1, 2), 4)):
        memory = MicrobatchRunner("detection", 8, Scripted(*numbers), tmp_path / str(size), lambda message: None)
        batches: Any = iter(["first", "second"])
        assert [memory.fetch(batches), memory.fetch(batches)] == ["first", "second"]
        assert memory.size == size


def test_loader_of_one_worker_without_memory_after_the_trial_steps_restarts_all(tmp_path: Path) -> None:
    """First it is tried again, without the other workers: copying a batch has no collectives."""
    group = Scripted()
    memory = MicrobatchRunner("detection", 8, group, tmp_path / MEMORY_FILE, lambda message: None)
    memory._trials_left = 0
    failures = [True, False, True, True]

    class Batches:
        def __next__(self) -> str:
            if failures.pop(0):
                raise RuntimeError("CUDA error: out of memory")
            return "batch"

    batches: Any = Batches()
    assert memory.fetch(batches) == "batch" and memory.size == 8
    with pytest.raises(SplitAgain, match="parts of 4"):
        memory.fetch(batches)
    assert group.num_agreements == 0 and failures == []
    assert json.loads((tmp_path / MEMORY_FILE).read_text()) == {"detection": 4}
