"""More epochs, time or patience for a run: it goes back to before its decay, or the refusal names the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pillsnap.config import Settings, load_settings
from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import Checkpoint, Position, find_checkpoint, save_checkpoint
from pillsnap.runs.directory import CONFIG_FILE, open_run
from pillsnap.runs.extension import awaits_validation, extend, is_trained, last_epoch
from pillsnap.runs.remote_checkpoints import PublishedCheckpoints, find_run_checkpoint
from pillsnap.storage import Storage

BRANCH = 40


def settings(epochs: int = 5, **train: Any) -> Settings:
    given = {"schedule": "wsd", "task": "detection"} | train
    return load_settings(
        "demo",
        {f"train.{key}": value for key, value in given.items()}
        | {"detection.epochs": epochs, "detection.mosaic_off_epochs": 1},
    )


def save(folder: Path, epoch: int, *, best: bool = False, keep: int = 1, **schedule: Any) -> Path:
    """The checkpoint at the end of an epoch of ten steps; the decay of the last of five takes ten steps."""
    weights = {"w": torch.full((2,), float(epoch))}
    planned = {"branch_step": BRANCH, "first_step": BRANCH, "end_epoch": 5, "reason": "planned", "peak": 1.0}
    return save_checkpoint(
        folder, Position(epoch, 0, 10 * epoch), model=weights, ema=weights, trainer={}, best=best, keep=keep,
        branch=10 * epoch == (planned | schedule)["branch_step"],
        meta={"elapsed_s": 5.0, "schedule": planned | schedule},
    )  # fmt: skip


def trained(run_dir: Path, **schedule: Any) -> Path:
    """A run of five epochs whose best was first the second and then the last one."""
    folder = run_dir / "checkpoints" / "detection"
    for epoch in range(1, 6):
        save(folder, epoch, best=epoch in (2, 5), **schedule)
    return folder


def epochs_of(folder: Path) -> list[int]:
    return sorted(int(path.name[-1]) for path in folder.iterdir() if path.is_dir())


def pointed(folder: Path, pointer: str) -> int:
    found, damaged = find_checkpoint(folder, pointer)
    assert found is not None and damaged == []
    return found.position.epoch


def test_checkpoint_before_the_decay_and_the_best_of_its_time_are_kept(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    assert epochs_of(folder) == [2, 4, 5]
    assert [pointed(folder, name) for name in ("last", "best", "branch", "branch-best")] == [5, 5, 4, 2]


def test_more_epochs_go_on_from_before_the_decay(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    notes = extend(str(tmp_path), settings(5), settings(9))
    assert notes == ["detection goes on from step-00000040-epoch-0004, before its decay"]
    assert [pointed(folder, name) for name in ("last", "best")] == [4, 2] and epochs_of(folder) == [2, 4]
    assert extend(str(tmp_path), settings(5), settings(9)) == []  # killed before the settings were written
    save(folder, 5, branch_step=70, first_step=70, end_epoch=9)
    save(folder, 6, branch_step=70, first_step=70, end_epoch=9)
    assert epochs_of(folder) == [2, 4, 6] and pointed(folder, "last") == 6


def test_run_extended_before_its_first_best_has_none(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "detection"
    for epoch in (4, 5):
        save(folder, epoch, best=epoch == 5)
    extend(str(tmp_path), settings(5), settings(9))
    assert pointed(folder, "last") == 4 and not (folder / "best.json").exists()


def test_before_the_decay_nothing_is_set_back(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "detection"
    for epoch in (1, 2, 3):
        save(folder, epoch)
    assert extend(str(tmp_path), settings(5), settings(9)) == [] and pointed(folder, "last") == 3
    with pytest.raises(UserError, match=r"cannot become 4: give detection\.epochs=5; a smaller train\.time_budget"):
        extend(str(tmp_path), settings(5), settings(4))


@pytest.mark.parametrize(
    ("reason", "before", "now", "goes_back"),
    [
        ("patience", {"patience": 2}, {"patience": 3}, True),
        ("patience", {"patience": 2}, {}, True),
        ("patience", {"patience": 3}, {"patience": 2}, False),
        ("patience", {"patience": 2}, {"patience": 2, "time_budget_minutes": 9}, False),
        ("budget", {"time_budget_minutes": 60}, {"time_budget_minutes": 90}, True),
        ("planned", {"time_budget_minutes": 60}, {}, False),
    ],
)
def test_what_ended_the_run_is_raised(
    reason: str, before: dict[str, Any], now: dict[str, Any], goes_back: bool, tmp_path: Path
) -> None:
    folder = trained(tmp_path, reason=reason)
    notes = extend(str(tmp_path), settings(5, **before), settings(5, **now))
    assert (len(notes), pointed(folder, "last")) == ((1, 4) if goes_back else (0, 5))


def test_more_epochs_alone_do_not_extend_what_patience_ended(tmp_path: Path) -> None:
    folder = trained(tmp_path, reason="patience")
    with pytest.raises(
        UserError, match=r"train\.patience, not of its 5 epochs: .* set train\.patience higher or to null"
    ):
        extend(str(tmp_path), settings(5, patience=2), settings(9, patience=2))
    assert pointed(folder, "last") == 5


def test_run_without_such_a_checkpoint_names_the_way(tmp_path: Path) -> None:
    """Its samples or its model depended on the number of epochs from the start."""
    trained(tmp_path, branch_step=0)
    way = f"--run OTHER --set detection.weights={tmp_path}/checkpoints/demo_detection_best.pt"
    with pytest.raises(UserError, match=way) as caught:
        extend(str(tmp_path), settings(5), settings(9))
    assert "\n" not in str(caught.value)


def test_early_end_counts_as_the_end(tmp_path: Path) -> None:
    def checkpoint(epoch: int, reason: str) -> Checkpoint:
        early = {"reason": reason, "first_step": BRANCH, "end_epoch": 5}
        return Checkpoint(tmp_path, {"position": {"epoch": epoch, "global_step": 10 * epoch}, "schedule": early})

    assert [last_epoch(checkpoint(epoch, "budget"), 9) for epoch in (4, 5)] == [9, 5]
    assert is_trained(checkpoint(5, "budget"), 9) and not is_trained(checkpoint(5, "planned"), 9)
    assert not is_trained(checkpoint(4, "budget"), 9) and not is_trained(None, 9)
    older = Checkpoint(tmp_path, {"position": {"epoch": 9, "global_step": 90}})
    assert is_trained(older, 9) and not is_trained(older, 10)


def test_end_between_validations_awaits_one(tmp_path: Path) -> None:
    def found(position: dict[str, int], between: bool = True) -> tuple[bool, bool]:
        early = {"reason": "budget", "first_step": 42, "end_step": 45 if between else 60, "end_epoch": 6}
        schedule = early | {"ends_between_validations": between}
        checkpoint = Checkpoint(tmp_path, {"position": position, "schedule": schedule})
        return awaits_validation(checkpoint, 9), is_trained(checkpoint, 9)

    assert found({"epoch": 4, "epoch_step": 4, "global_step": 44}) == (False, False)
    assert found({"epoch": 5, "epoch_step": 10, "global_step": 45}) == (True, False)
    assert found({"epoch": 6, "epoch_step": 0, "global_step": 45}) == (False, True)
    assert found({"epoch": 5, "epoch_step": 10, "global_step": 60}, between=False) == (False, False)
    assert not awaits_validation(None, 9)
    no_schedule = Checkpoint(tmp_path, {"position": {"epoch": 9, "global_step": 90}})
    assert not awaits_validation(no_schedule, 10)


def test_early_end_without_a_step_left_counts_as_the_end(tmp_path: Path) -> None:
    early = {"reason": "budget", "first_step": 50, "end_step": 50, "end_epoch": 5}
    assert is_trained(Checkpoint(tmp_path, {"position": {"epoch": 5, "global_step": 50}, "schedule": early}), 9)


def test_published_run_is_set_back_likewise(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path))
    uri = f"{s3_environment}/runs/extended"
    store = PublishedCheckpoints(uri, "detection", "worker")
    for epoch in range(1, 6):
        path = save(store.folder, epoch, best=epoch in (2, 5))
        branch = 10 * epoch == BRANCH
        store.publish(path, best=epoch in (2, 5), branch=branch, keep=1, before_pointers=lambda: None)
    files = Storage(store.uri).files
    assert {name.partition("/")[0][-1] for name in files() if "/" in name} == {"2", "4", "5"}
    assert extend(uri, settings(5), settings(9)) == [
        "detection goes on from step-00000040-epoch-0004, before its decay"
    ]
    assert {name.partition("/")[0][-1] for name in files() if "/" in name} == {"2", "4"}
    found = [find_run_checkpoint(uri, "detection", pointer)[0] for pointer in ("last", "best")]
    assert [each.position.epoch for each in found if each] == [4, 2]


def test_same_command_with_more_epochs_extends_the_run(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    open_run(tmp_path, settings(5), toy_manifest, toy_tree)
    folder = trained(tmp_path)
    run, notes = open_run(tmp_path, settings(9), toy_manifest, toy_tree)
    assert notes[1:] == [
        "detection.epochs is now 9 (it was 5)", "detection goes on from step-00000040-epoch-0004, before its decay",
    ]  # fmt: skip
    assert run.settings.detection.epochs == 9 and pointed(folder, "last") == 4
    with pytest.raises(UserError, match=r"train\.schedule was 'wsd' and is 'cosine'"):
        open_run(tmp_path, settings(9, schedule="cosine"), toy_manifest, toy_tree)


def test_run_with_the_cosine_cannot_be_extended(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    open_run(tmp_path, settings(5, schedule="cosine"), toy_manifest, toy_tree)
    with pytest.raises(UserError, match=r"detection\.epochs was 5 and is 9.*--run OTHER --set detection\.weights="):
        open_run(tmp_path, settings(9, schedule="cosine"), toy_manifest, toy_tree)


def test_older_run_keeps_the_cosine(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    open_run(tmp_path, settings(5, schedule="cosine"), toy_manifest, toy_tree)
    path = tmp_path / CONFIG_FILE
    config = json.loads(path.read_text())
    for key in ("schedule", "decay_share", "patience", "time_budget_minutes"):
        del config["settings"]["train"][key]
    path.write_text(json.dumps(config))
    for _ in range(2):
        run, notes = open_run(tmp_path, settings(5, time_budget_minutes=60, patience=2), toy_manifest, toy_tree)
        train = run.settings.train
        assert (train.schedule, train.patience, train.time_budget_minutes) == ("cosine", None, None)
        assert notes[1:] == ["train.schedule stays 'cosine', with which the run began"]
