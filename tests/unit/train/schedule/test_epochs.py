"""Settings and samples of a task -> the plan of its epochs."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pillsnap.config import load_settings
from pillsnap.data.plan import StreamPlan
from pillsnap.data.samples import TaskSamples
from pillsnap.train.schedule.epochs import notes, stream_plan


def samples(num_train: int, num_combinations: int) -> TaskSamples:
    return TaskSamples(pa.table({"a": range(num_train)}), pa.table({"a": range(7)}), {}, num_combinations)


def test_defaults_plan_whole_epochs_that_are_all_validated() -> None:
    for name in ("detection", "classification"):
        own = getattr(load_settings("stage1", {f"{name}.samples_per_epoch": None, f"{name}.validate_every": 1}), name)
        own = own.model_copy(update={"combination_share": None})
        plan = stream_plan(own, 42, samples(100, 0))
        assert plan == StreamPlan(42, own.epochs, 100, 7, own.batch_size, 1)
        assert all(plan.validates(epoch) for epoch in range(plan.epochs))


@pytest.mark.parametrize(("share", "in_epoch"), [(0.5, 20), (0.0, 0), (1.0, 40), (0.26, 10)])
def test_share_of_combinations_is_a_count_per_epoch(share: float, in_epoch: int) -> None:
    settings = load_settings("demo", {"detection.combination_share": share, "detection.samples_per_epoch": 40})
    plan = stream_plan(settings.detection, 1, samples(100, 5))
    assert (plan.num_combinations, plan.combinations_per_epoch) == (5, in_epoch)
    assert notes("detection", settings.detection, samples(100, 5)) == []


@pytest.mark.parametrize(("num_combinations", "missing"), [(0, "combination"), (100, "single")])
def test_share_without_one_kind_of_photo_is_said_to_have_no_effect(num_combinations: int, missing: str) -> None:
    own = load_settings("demo", {"detection.combination_share": 0.5}).detection
    plan = stream_plan(own, 1, samples(100, num_combinations))
    assert plan.combinations_per_epoch is None and plan.epoch_samples == 100
    assert notes("detection", own, samples(100, num_combinations)) == [
        f"detection.combination_share 0.5 has no effect: there is no complete {missing} photo to train on."
    ]
