"""TrainingState: layer decay, compilation, a step, and its round trip through a checkpoint."""

from __future__ import annotations

import pytest
import torch

from pillsnap.config import load_settings
from pillsnap.planner.measure import mock_batch
from pillsnap.tasks.registry import make_task
from pillsnap.train import training_state
from pillsnap.train.collectives import WorkerGroup
from pillsnap.train.microbatch import MicrobatchRunner
from pillsnap.train.training_state import TrainingState

CPU = torch.device("cpu")


def new_state(**changes: object) -> TrainingState:
    small = {"classification.image_size_px": 32, "train.amp": "off"}
    settings = load_settings("demo", small | {name.replace("__", "."): value for name, value in changes.items()})
    task = make_task("classification", settings, ["K-1", "K-2"])
    group = WorkerGroup(CPU)
    return TrainingState(task, settings.train, CPU, group, MicrobatchRunner(task.name, 4, group, None, print), None)


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
