"""TrainingState: layer decay, compilation, a step, and its round trip through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pillsnap.config import load_settings
from pillsnap.planner.measure import mock_batch
from pillsnap.runs.checkpoint import (
    Checkpoint,
    Position,
    copy_state,
    copy_weights,
    load_checkpoint,
    save_checkpoint,
)
from pillsnap.tasks.registry import make_task
from pillsnap.train.step import training_state
from pillsnap.train.step.batch_statistics import STATISTICS
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState
from tests.reliability.harness import same_state

CPU = torch.device("cpu")


def new_state(resume: Checkpoint | None = None, **changes: object) -> TrainingState:
    small = {"classification.image_size_px": 32, "train.amp": "off"}
    settings = load_settings("demo", small | {name.replace("__", "."): value for name, value in changes.items()})
    task = make_task("classification", settings, ["K-1", "K-2"])
    group = WorkerGroup(CPU)
    return TrainingState(task, settings.train, CPU, group, MicrobatchRunner(task.name, 4, group, None, print), resume)


def test_layer_decay_lowers_the_learning_rate_of_early_layers() -> None:
    state = new_state(classification__layer_decay=0.5)
    task = state._task
    state.step(mock_batch(task, 4, CPU, 2), 0.1, 4, 0)
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in state.optimizer.param_groups for p in group["params"]}
    assert rates["fc.weight"] == pytest.approx(0.1)
    assert rates["conv1.0.weight"] < rates["layer2.0.conv1.weight"] < rates["layer4.0.conv1.weight"] < 0.1 + 1e-9
    assert len(rates) == len(names)
    decayed = {group["weight_decay"] for group in state.optimizer.param_groups}
    assert decayed == {0.0, task.settings.weight_decay}


def test_without_a_compiler_training_runs_eagerly_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find\n C compiler")

    monkeypatch.setattr(torch, "compile", broken)
    state = new_state(train__compile="on")
    assert state.notes == [
        "classification: the model is not compiled, steps take longer: RuntimeError: Failed to find C compiler."
    ]
    step = state.step(mock_batch(state._task, 4, CPU, 2), 0.1, 4, 0)
    assert torch.isfinite(step.norm) and not step.bad
    assert training_state.compile_problem(CPU) is not None
    assert new_state(train__compile="off").notes == []


def save(state: TrainingState, folder: Path) -> Checkpoint:
    path = save_checkpoint(
        folder, Position(0, 2, 2), model=copy_weights(state.model.state_dict()),
        ema=copy_weights(state.ema.module.state_dict()), trainer=copy_state(state.trainer_state()), meta={},
        best=False, keep=1,
    )  # fmt: skip
    return load_checkpoint(path)


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_restored_state_continues_bit_for_bit(amp: str, tmp_path: Path) -> None:
    """Weights, average, optimizer, loss scale, best metric and random state survive a checkpoint."""
    options = {"train__amp": amp, "classification__drop_rate": 0.5}
    state = new_state(**options)
    batch = mock_batch(state._task, 4, CPU, 2)
    for step in range(2):
        state.step(batch, 0.01, 4, step)
    assert state.is_best(0.5) and not state.is_best(0.25)
    if state.loss_scale is not None:
        state.loss_scale.update(torch.tensor(0.0))
    first = save(state, tmp_path / "first")
    state.step(batch, 0.01, 4, 2)
    expected = save(state, tmp_path / "expected")
    restored = new_state(first, **options)
    assert restored.best == 0.5 and not restored.is_best(0.4)
    restored.step(batch, 0.01, 4, 2)
    assert same_state(save(restored, tmp_path / "restored"), expected) == []
    assert ("loss_scale" in expected.trainer_state()) == (amp == "float16")


def test_best_is_the_higher_score_then_the_lower_loss_and_always_finite(tmp_path: Path) -> None:
    state = new_state()
    nan, inf = float("nan"), float("inf")
    assert not state.is_best(1.0, nan) and not state.is_best(1.0, inf) and not state.is_best(nan, 0.1)
    assert state.is_best(0.5, 0.9)
    assert not state.is_best(0.4, 0.1) and not state.is_best(0.5, 0.9) and not state.is_best(0.5, 1.0)
    assert not state.is_best(0.9, nan) and state.is_best(0.5, 0.8)
    restored = new_state(save(state, tmp_path))
    assert not restored.is_best(0.5, 0.8) and restored.is_best(0.5, 0.7) and restored.is_best(0.6, 5.0)


def test_step_moves_weights_and_average(tmp_path: Path) -> None:
    state = new_state()
    before = save(state, tmp_path / "before")
    step = state.step(mock_batch(state._task, 4, CPU, 2), 0.01, 4, 0)
    assert not step.bad and float(step.norm) > 0
    after = save(state, tmp_path / "after")
    for which in ("model", "ema"):
        changed = {name for name, value in before.weights(which).items() if not value.equal(after.weights(which)[name])}
        statistics = {name for name in before.weights(which) if name.endswith(STATISTICS)}
        if which == "ema":  # estimated before a validation
            assert not changed & statistics
            changed |= statistics
        assert len(changed) > 0.9 * len(before.weights(which))
    weight = "fc.weight"
    decay = state.ema.get_decay(1)
    average = decay * before.weights("ema")[weight] + (1 - decay) * after.weights("model")[weight]
    torch.testing.assert_close(after.weights("ema")[weight], average)


def test_workers_agree_again_when_the_crops_grow() -> None:
    """Larger crops may not fit, and are compiled again."""
    sizes = {"classification__progressive_from_px": 32, "classification__image_size_px": 128}
    state = new_state(classification__epochs=9, **sizes)
    batch, careful = mock_batch(state._task, 4, CPU, 2), []
    for batch.epoch in range(9):
        for _ in range(4):
            state.step(batch, 0.01, 4, len(careful))
            careful.append(state._microbatches.agrees)
    new_size, same_size = [True, True, False, False], [False] * 4
    assert careful == [*new_size, *same_size] * 4 + same_size


@pytest.mark.parametrize("name", ["detection", "classification"])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_average_is_short_compared_with_the_decay_of_each_stage(stage: int, name: str) -> None:
    """A longer one would hold weights from before the decay."""
    settings = load_settings(f"stage{stage}")
    task, sampling = getattr(settings, name), settings.sampling
    assert sampling.num_photos is not None
    in_epoch = task.samples_per_epoch or sampling.num_photos * (1 - sampling.val_fraction)
    num_steps = task.epochs * int(in_epoch / task.batch_size)
    decay = training_state.moving_average(torch.nn.Linear(1, 1), settings.train).get_decay(num_steps)
    assert 0.01 < 1 / (1 - decay) / num_steps < settings.train.decay_share / 4  # share of the run that it covers


def test_non_finite_step_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state()
    batch = mock_batch(state._task, 4, CPU, 2)
    state.step(batch, 0.01, 4, 0)
    before = save(state, tmp_path / "before")
    losses = training_state._Losses.forward
    monkeypatch.setattr(
        training_state._Losses, "forward",
        lambda self, batch: {name: loss * float("nan") for name, loss in losses(self, batch).items()},
    )  # fmt: skip
    step = state.step(batch, 0.01, 4, 1)
    assert step.bad and not torch.isfinite(step.norm)
    assert same_state(before, save(state, tmp_path / "after")) == []


def test_split_batch_gives_the_losses_of_the_whole_one() -> None:
    """In eval mode, where batch normalisation does not depend on the split."""
    steps = []
    for size in (4, 1):
        state = new_state()
        state.model.eval()
        state._microbatches.size = size
        steps.append(state.step(mock_batch(state._task, 4, CPU, 2), 0.01, 4, 0))
    assert float(steps[0].losses["cross_entropy"]) == pytest.approx(float(steps[1].losses["cross_entropy"]), rel=1e-5)
    assert float(steps[0].norm) == pytest.approx(float(steps[1].norm), rel=1e-4)
