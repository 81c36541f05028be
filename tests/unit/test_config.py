"""Settings: presets, configuration files, sources, and one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillsnap.config import groups, load_settings, preset_names, resolve_settings, setting_fields
from pillsnap.errors import UserError


def test_every_preset_loads_with_its_counts() -> None:
    assert preset_names() == ["demo", "stage1", "stage2", "stage3", "stage4"]
    stage3 = load_settings("stage3")
    assert (stage3.stage, stage3.sampling.num_photos, stage3.sampling.num_classes) == (3, 100_000, 1_000)
    assert (stage3.targets.top1, stage3.targets.map50, stage3.targets.total_time_s) == (0.85, 0.30, 7200)
    owners = load_settings("stage4").targets
    assert (owners.top1, owners.top5, owners.map50, owners.total_time_s) == (0.92, 0.99, 0.85, 72000)
    assert (stage3.classification.epochs, stage3.classification.batch_size, stage3.classification.lr) == (18, 128, 6e-4)
    assert stage3.detection.batch_size == 16
    assert load_settings("stage4").sampling.num_classes is None


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_time_budget_of_a_stage_is_its_target(stage: int) -> None:
    """Also in a smoke run of one epoch, and without a limit for somebody who has the time."""
    settings = load_settings(f"stage{stage}", {"detection.epochs": 1, "classification.epochs": 1})
    assert settings.train.schedule == "wsd"
    assert settings.train.time_budget_minutes == settings.targets.total_time_s / 60
    free = ("train.schedule=cosine", "train.time_budget_minutes=null")
    assert load_settings(f"stage{stage}", {}, free).train.schedule == "cosine"


@pytest.mark.parametrize("limit", ["train.patience=3", "train.time_budget_minutes=60"])
def test_limits_need_a_schedule_that_can_end(limit: str) -> None:
    with pytest.raises(UserError, match=r"need train\.schedule=wsd: set them to null"):
        load_settings("demo", {}, (limit,))


def test_short_epochs_of_the_presets_are_whole_steps_and_a_share_of_the_passes() -> None:
    for name in ("stage2", "stage3", "stage4"):
        settings = load_settings(name)
        for task in (settings.detection, settings.classification):
            assert task.samples_per_epoch is None or task.samples_per_epoch % task.batch_size == 0
            assert task.epochs % task.validate_every == 0
    stage3 = load_settings("stage3")
    photos = 81_475  # whose 5 % combinations show three pills on average
    detection, classification = (
        task.epochs * task.samples_per_epoch for task in (stage3.detection, stage3.classification)
    )
    assert detection == 49_824 and detection / (18 * photos) < 0.035
    assert classification == 539_136 and classification / (18 * photos * 1.1) == pytest.approx(1 / 3, abs=2e-3)


def test_flags_and_assignments_override_the_preset() -> None:
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
        ("train.schedule=cosine", ("train.patience", "train.time_budget_minutes", "train.schedule=wsd", "null")),
        ("train.decay_share=0", ("train.decay_share", "greater than 0")),
        ("name=../elsewhere", ("name", "letters")),
        ("detection.samples_per_epoch=0", ("detection.samples_per_epoch", "greater than or equal to 1")),
        ("classification.samples_per_epoch=-5", ("classification.samples_per_epoch", "greater than or equal to 1")),
        ("detection.validation_samples=0", ("detection.validation_samples", "greater than or equal to 1")),
        ("classification.validation_samples=2.5", ("classification.validation_samples", "integer")),
        ("detection.validate_every=0", ("detection.validate_every", "greater than or equal to 1")),
        ("classification.validate_every=null", ("classification.validate_every", "integer")),
        ("detection.combination_share=1.01", ("detection.combination_share", "less than or equal to 1")),
        ("detection.combination_share=-0.1", ("detection.combination_share", "greater than or equal to 0")),
        ("classification.combination_share=0.5", ("classification.combination_share",)),
        ("train.task=segmentation", ("train.task", "detection")),
        ("lr", ("key=value",)),
        ("name.deeper=1", ("name.deeper", "not a group")),
    ],
)
def test_mistake_is_one_line_that_names_it(assignment: str, words: tuple[str, ...]) -> None:
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
        settings.train.seed = 1


def test_on_and_off_are_text_not_booleans() -> None:
    settings = load_settings("demo", assignments=("train.amp=off", "train.compile=on"))
    assert (settings.train.amp, settings.train.compile) == ("off", "on")


def test_elastic_workers_do_not_have_to_divide_the_batch() -> None:
    assert load_settings("demo", {"train.num_workers": "1:3"}).train.num_workers == "1:3"
    assert load_settings("demo", None, ("train.num_workers=1:3",)).train.num_workers == "1:3"
    assert load_settings("demo", {"train.num_workers": "2"}).train.num_workers == 2


def test_every_setting_and_group_has_a_one_sentence_description() -> None:
    fields = {field.key: field for field in setting_fields()}
    for name, value in load_settings("demo").model_dump().items():
        assert {f"{name}.{key}" for key in value} <= set(fields) if isinstance(value, dict) else name in fields
    assert [key for key, field in fields.items() if len(field.description) < 10 or "\n" in field.description] == []
    assert set(groups()) == {key.split(".")[0] for key in fields if "." in key}
    assert all(groups().values())
    assert fields["train.seed"].default == 42
    assert fields["train.storage"].values == "text or null"
    assert fields["detection.scale"].values == "number, >= 0 and < 1"
    assert fields["train.amp"].values == "auto, bfloat16, float16, off"
    assert [key for key, field in fields.items() if field.required] == ["name"]


def _write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


def test_file_extends_a_preset_and_every_value_has_its_source(tmp_path: Path) -> None:
    mine = _write(tmp_path, mine="extends: stage3\ntrain: {amp: off, seed: 7}\ndetection: {lr: 1e-3, epochs: 5}\n")
    resolved = resolve_settings(
        config=mine, overrides={"detection.epochs": 4, "train.task": None}, assignments=("train.seed=8",)
    )
    settings = resolved.settings
    assert (settings.name, settings.stage, settings.sampling.num_photos) == ("mine", 3, 100_000)
    assert (settings.train.amp, settings.train.seed, settings.detection.lr, settings.detection.epochs) == (
        "off", 8, 1e-3, 4
    )  # fmt: skip
    assert resolved.sources == {
        "name": "mine.yaml",
        "stage": "stage3.yaml",
        "sampling.num_photos": "stage3.yaml",
        "sampling.num_classes": "stage3.yaml",
        "sampling.combination_fraction": "stage3.yaml",
        "sampling.val_fraction": "stage3.yaml",
        "data.store": "stage3.yaml",
        "targets.top1": "stage3.yaml",
        "targets.map50": "stage3.yaml",
        "targets.total_time_s": "stage3.yaml",
        "train.amp": "mine.yaml",
        "train.seed": "--set",
        "detection.lr": "mine.yaml",
        "detection.epochs": "option",
        **dict.fromkeys(
            ("detection.model", "detection.combination_share", "classification.batch_size", "classification.lr"),
            "stage3.yaml",
        ),
        **{
            f"{task}.{key}": "stage3.yaml"
            for task in ("detection", "classification")
            for key in ("samples_per_epoch", "validation_samples", "validate_every")
        },
        "train.schedule": "stage3.yaml",
        "train.time_budget_minutes": "stage3.yaml",
    }


def test_file_extends_another_file_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    _write(tmp_path / "base", lab="extends: demo\nname: lab\ntrain: {seed: 1, log_every_steps: 3}\n")
    mine = _write(tmp_path, mine="extends: base/lab.yaml\ntrain: {seed: 2}\n")
    settings = resolve_settings(config=mine).settings
    assert (settings.name, settings.train.seed, settings.train.log_every_steps) == ("mine", 2, 3)
    assert settings.detection.model == "yolo11n"


def test_file_without_extends_starts_from_the_defaults(tmp_path: Path) -> None:
    resolved = resolve_settings(config=_write(tmp_path, own="targets: {top1: 0.5}\n"))
    assert resolved.sources == {"name": "own.yaml", "targets.top1": "own.yaml"}
    assert resolved.settings.stage is None


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "extends: a.yaml"}, ("circle", "a.yaml -> a.yaml")),
        ({"a": "extends: b.yaml", "b": "extends: c.yaml", "c": "extends: b.yaml"}, ("b.yaml -> c.yaml -> b.yaml",)),
        ({"a": "extends: nowhere.yaml"}, ("nowhere.yaml", "neither a preset", "stage3")),
        ({"a": "extends: [demo]"}, ("neither a preset",)),
        ({"a": "extends: demo\ntrain: {sed: 1}"}, ("no setting 'train.sed'", "seed")),
        ({"a": "extends: demo\ntrains: {seed: 1}"}, ("no setting 'trains'", "train,")),
        ({"a": "extends: demo\ntrain: 5"}, ("Setting train:",)),
        ({"a": "train: {seed: 1"}, ("not valid YAML", "line")),
        ({"a": "- 1"}, ("must map",)),
    ],
)
def test_mistake_in_a_file_is_one_line(tmp_path: Path, files: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        resolve_settings(config=_write(tmp_path, **files))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        resolve_settings(config=tmp_path / "none.yaml")


def test_any_number_of_epochs_has_room_for_warm_up_and_decay() -> None:
    """`--epochs 1` with a schedule whose warm-up takes one: the warm-up is shortened."""
    wsd = {"train.schedule": "wsd", "train.decay_share": 0.5, "detection.warmup_epochs": 1}
    assert load_settings("demo", wsd | {"detection.epochs": 1}).detection.epochs == 1
    with pytest.raises(UserError, match=r"detection\.warmup_epochs 2\.0 is more than its 1 epochs"):
        load_settings("demo", wsd | {"detection.epochs": 1, "detection.warmup_epochs": 2})
