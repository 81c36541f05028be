"""Settings: presets load, mistakes are one clear line."""

from __future__ import annotations

import pytest

from pillsnap.config import load_settings, preset_names
from pillsnap.errors import UserError


def test_every_preset_loads_with_its_counts() -> None:
    assert preset_names() == ["demo", "stage1", "stage2", "stage3", "stage4"]
    stage3 = load_settings("stage3")
    assert (stage3.stage, stage3.sampling.num_photos, stage3.sampling.num_classes) == (3, 100_000, 1_000)
    assert (stage3.targets.top1, stage3.targets.map50, stage3.targets.total_time_s) == (0.85, 0.30, 7200)
    assert (stage3.classification.epochs, stage3.classification.batch_size, stage3.classification.lr) == (18, 32, 3e-4)
    assert stage3.detection.batch_size == 16
    assert load_settings("stage4").sampling.num_classes is None


def test_flags_and_assignments_lie_over_the_preset() -> None:
    settings = load_settings(
        "stage3",
        {"classification.epochs": 3, "detection.epochs": None},
        ("classification.lr=1e-4", "wandb.mode=offline"),
    )
    assert settings.classification.epochs == 3
    assert settings.detection.epochs == 18
    assert settings.classification.lr == 1e-4
    assert settings.wandb.mode == "offline"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("classification.lrr=1", ("classification.lrr", "lr,")),
        ("nothing.at.all=1", ("nothing",)),
        ("classification.lr=abc", ("classification.lr", "number", "abc")),
        ("classification.lr=-1", ("classification.lr", "greater than 0")),
        ("classification.lr=.nan", ("classification.lr",)),
        ("detection.image_size_px=333", ("detection.image_size_px", "32")),
        ("train.num_workers=0", ("train.num_workers", "auto")),
        ("train.num_workers='4:2'", ("train.num_workers", "MIN:MAX")),
        ("train.num_workers='0:2'", ("train.num_workers", "MIN:MAX")),
        ("train.num_workers=3", ("batch_size 16", "3 workers")),
        ("detection.warmup_epochs=99", ("warmup_epochs",)),
        ("name=../elsewhere", ("name", "letters")),
        ("train.task=segmentation", ("train.task", "detection")),
        ("lr", ("key=value",)),
        ("name.deeper=1", ("name.deeper", "not a group")),
    ],
)
def test_a_mistake_is_one_line_that_names_it(assignment: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load_settings("stage3", {}, (assignment,))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="stage1, stage2"):
        load_settings("stage9")


def test_settings_are_frozen() -> None:
    settings = load_settings("demo")
    with pytest.raises(ValueError, match="frozen"):
        settings.train.seed = 1  # type: ignore[misc]


def test_words_that_yaml_takes_for_booleans_stay_words() -> None:
    settings = load_settings("demo", assignments=("train.amp=off", "train.compile=on"))
    assert (settings.train.amp, settings.train.compile) == ("off", "on")


def test_elastic_workers_need_no_even_batch() -> None:
    assert load_settings("demo", {"train.num_workers": "1:3"}).train.num_workers == "1:3"
    assert load_settings("demo", None, ("train.num_workers=1:3",)).train.num_workers == "1:3"
    assert load_settings("demo", {"train.num_workers": "2"}).train.num_workers == 2
