"""Checkpoints and files of a run in remote storage: the published state is authoritative on every node."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import Position, save_checkpoint
from pillsnap.runs.mirror import RunMirror
from pillsnap.runs.remote_checkpoints import PublishedCheckpoints, find_run_checkpoint
from pillsnap.storage import Storage, StorageError, scratch

FILES = ("model.safetensors", "ema.safetensors", "trainer.pt", "meta.json")


@pytest.fixture
def run_uri(s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / "node0"))
    return f"{s3_environment}/runs/one"


def other_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "node1") -> None:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / name))


def save(store: PublishedCheckpoints, epoch: int, *, best: bool = False, keep: int = 2) -> Path:
    weights = {"w": torch.full((4, 3), float(epoch))}
    return save_checkpoint(
        store.folder, Position(epoch, 0, 10 * epoch), model=weights, ema=weights, trainer={"lr": epoch},
        meta={"elapsed_s": 5.0}, best=best, keep=keep,
    )  # fmt: skip


def save_and_publish(uri: str, epoch: int, *, best: bool = False) -> Path:
    store = PublishedCheckpoints(uri, "detection", "worker")
    path = save(store, epoch, best=best)
    store.publish(path, best=best, keep=2, before_pointers=lambda: None)
    return path


def test_published_checkpoints_are_found_on_another_node(
    run_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_run_checkpoint(run_uri, "detection") == (None, [])
    for epoch in range(1, 6):
        save_and_publish(run_uri, epoch, best=epoch == 2)
    published = {name.partition("/")[0] for name in Storage(f"{run_uri}/checkpoints/detection").files()}
    kept = {f"step-{10 * epoch:08d}-epoch-{epoch:04d}" for epoch in (2, 4, 5)}
    assert published == kept | {"last.json", "best.json"}
    other_node(monkeypatch, tmp_path)
    for pointer, epoch in (("last", 5), ("best", 2)):
        found, damaged = find_run_checkpoint(run_uri, "detection", pointer)
        assert found is not None and damaged == []
        assert found.path.is_relative_to(tmp_path / "node1")
        assert found.position == Position(epoch, 0, 10 * epoch)
        assert torch.equal(found.weights("model")["w"], torch.full((4, 3), float(epoch)))


def test_committed_but_unpublished_checkpoint_is_dropped(
    run_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rank 0 is killed between commit and publishing: all nodes continue from the previous checkpoint."""
    save_and_publish(run_uri, 1)
    store = PublishedCheckpoints(run_uri, "detection", "worker")
    local = save(store, 2)

    def fail() -> None:
        raise StorageError("no")

    with pytest.raises(StorageError):
        store.publish(local, best=True, keep=2, before_pointers=fail)
    assert f"{local.name}/meta.json" not in Storage(f"{run_uri}/checkpoints/detection").files()
    for node in ("node1", "node0"):
        other_node(monkeypatch, tmp_path, node)
        found, damaged = find_run_checkpoint(run_uri, "detection", role="worker")
        assert found is not None and found.position.epoch == 1 and damaged == []
    assert not local.exists()
    save_and_publish(run_uri, 3)  # publishing removes the leftovers
    names = {name.partition("/")[0] for name in Storage(f"{run_uri}/checkpoints/detection").files()}
    assert local.name not in names


def test_publishing_a_position_again_always_leaves_a_complete_checkpoint(
    run_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each change of the storage is the last one in turn; each attempt is made on a node without copies."""

    class Death(BaseException):
        pass

    changes = {"left": 10**9}

    def dying(method: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            if changes["left"] == 0:
                raise Death
            changes["left"] -= 1
            return method(*args)

        return wrapper

    for name in ("upload", "write", "remove"):
        monkeypatch.setattr(Storage, name, dying(getattr(Storage, name)))
    found: Any = None
    for attempt in range(60):
        other_node(monkeypatch, tmp_path, f"node{attempt}")
        store = PublishedCheckpoints(run_uri, "detection", "worker")
        store.take_over()
        weights = {"w": torch.full((4, 3), float(attempt))}
        path = save_checkpoint(
            store.folder, Position(1, 0, 10), model=weights, ema=weights, trainer={}, meta={"elapsed_s": 5.0},
            best=True, keep=1,
        )  # fmt: skip
        changes["left"] = attempt - 1 if attempt else 10**9
        try:
            store.publish(path, best=True, keep=1, before_pointers=lambda: None)
            completed = True
        except Death:
            completed = False
        changes["left"] = 10**9
        other_node(monkeypatch, tmp_path, f"reader{attempt}")
        for pointer in ("last", "best"):
            found, damaged = find_run_checkpoint(run_uri, "detection", pointer)
            assert found is not None and damaged == [], (attempt, pointer, damaged)
        if attempt and completed:
            break
    assert completed and attempt >= 11
    assert float(found.weights("model")["w"][0, 0]) == attempt
    published = {name.partition("/")[0] for name in Storage(f"{run_uri}/checkpoints/detection").files()}
    assert published == {found.path.name, "last.json", "best.json"}


def test_outdated_node_takes_over_the_published_state(
    run_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_and_publish(run_uri, 1, best=True)
    other_node(monkeypatch, tmp_path)
    save_and_publish(run_uri, 2)
    save_and_publish(run_uri, 3, best=True)
    other_node(monkeypatch, tmp_path, "node0")
    store = PublishedCheckpoints(run_uri, "detection", "worker")
    store.take_over()
    for name in ("last", "best"):
        assert json.loads((store.folder / f"{name}.json").read_text()) == {"checkpoint": "step-00000030-epoch-0003"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_published_file_is_named_and_the_previous_checkpoint_used(
    run_uri: str, name: str, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_and_publish(run_uri, 1)
    path = save_and_publish(run_uri, 2)
    storage = Storage(f"{run_uri}/checkpoints/detection")
    data = bytearray(storage.read(f"{path.name}/{name}") or b"")
    if damage == "gone":
        storage.remove(f"{path.name}/{name}")
    else:
        data[len(data) // 2] ^= 1
        storage.write(f"{path.name}/{name}", bytes(data if damage == "flip" else data[: len(data) // 2]))
    other_node(monkeypatch, tmp_path)
    found, damaged = find_run_checkpoint(run_uri, "detection")
    assert found is not None and found.position.epoch == 1
    assert len(damaged) == 1 and f"{run_uri}/checkpoints/detection/{path.name}/{name}" in damaged[0]


def test_damaged_copy_is_fetched_again(run_uri: str) -> None:
    save_and_publish(run_uri, 1)
    found, _ = find_run_checkpoint(run_uri, "detection")
    assert found is not None
    (found.path / "trainer.pt").unlink()  # a link to the worker's copy
    (found.path / "trainer.pt").write_bytes(b"not this")
    again, damaged = find_run_checkpoint(run_uri, "detection")
    assert again is not None and damaged == []
    assert again.trainer_state() == {"lr": 1}


def test_copies_of_one_node_are_shared(run_uri: str) -> None:
    path = save_and_publish(run_uri, 1)
    found, _ = find_run_checkpoint(run_uri, "detection", role="driver")
    assert found is not None
    assert (found.path / "ema.safetensors").samefile(path / "ema.safetensors")


def test_pointer_outside_the_run_is_refused(run_uri: str) -> None:
    save_and_publish(run_uri, 1)
    Storage(f"{run_uri}/checkpoints/detection").write("last.json", b'{"checkpoint": "../../../../etc"}')
    found, damaged = find_run_checkpoint(run_uri, "detection")
    assert found is not None and found.position.epoch == 1
    assert "has no checkpoint" in damaged[0]


def test_fetch_makes_the_copy_equal_to_the_published_files(
    run_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mirror = RunMirror(run_uri, scratch(run_uri, "driver"))
    mirror.fetch()
    for name in ("config.json", "events.jsonl", "examples/a.png", "checkpoints/best.pt", "wandb/run/log",
                 "checkpoints/detection/elapsed.json", "checkpoints/detection/step-00000001/meta.json", ".driver.lock",
                 "stop-requested", "store/x/windows.arrow"):  # fmt: skip
        (mirror.local / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror.local / name).write_text(f"{name} 1\n")
    mirror.publish()
    published = ["checkpoints/best.pt", "checkpoints/detection/elapsed.json", "config.json", "events.jsonl",
                 "examples/a.png"]  # fmt: skip
    assert sorted(Storage(run_uri).files()) == published

    other_node(monkeypatch, tmp_path)
    second = RunMirror(run_uri, scratch(run_uri, "driver"))
    second.fetch()
    assert sorted(str(path.relative_to(second.local)) for path in second.local.rglob("*") if path.is_file()
                  and not path.name.startswith(".")) == published  # fmt: skip
    (second.local / "config.json").write_text("other\n")
    (second.local / "metrics.json").write_text("{}\n")
    (second.local / "examples" / "a.png").unlink()
    Storage(run_uri).remove("examples/a.png")
    second.publish()

    with (mirror.local / "events.jsonl").open(
        "a"
    ) as log:  # killed before publishing: the log continues the published one
        log.write("more\n")
    (mirror.local / "found_boxes.json").write_text("never published\n")
    mirror.fetch()
    assert (mirror.local / "config.json").read_text() == "other\n"
    assert (mirror.local / "metrics.json").read_text() == "{}\n"
    assert (mirror.local / "events.jsonl").read_text() == "events.jsonl 1\nmore\n"
    assert not (mirror.local / "examples" / "a.png").exists()
    assert not (mirror.local / "found_boxes.json").exists()
    assert (mirror.local / "wandb" / "run" / "log").exists()

    with (second.local / "events.jsonl").open("a") as log:  # continued elsewhere: this copy is outdated
        log.write("another\n")
    second.publish()
    mirror.fetch()
    assert (mirror.local / "events.jsonl").read_text() == "events.jsonl 1\nanother\n"


def test_unchanged_files_are_transferred_once(run_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = RunMirror(run_uri, scratch(run_uri, "driver"))
    mirror.fetch()
    (mirror.local / "config.json").write_text("1")
    mirror.publish()
    uploads: list[str] = []
    monkeypatch.setattr(Storage, "upload", lambda self, source, name: uploads.append(name))
    monkeypatch.setattr(Storage, "download", lambda self, name, target: pytest.fail("downloaded"))
    mirror.publish()
    RunMirror(run_uri, mirror.local).publish()
    RunMirror(run_uri, mirror.local).fetch()
    assert uploads == []


def test_fetch_removes_files_of_a_deleted_run(run_uri: str) -> None:
    mirror = RunMirror(run_uri, scratch(run_uri, "driver"))
    mirror.fetch()
    (mirror.local / "config.json").write_text("1")
    mirror.publish()
    Storage(run_uri).remove("config.json")
    mirror.fetch()
    assert not (mirror.local / "config.json").exists()
    shutil.rmtree(mirror.local)


def test_adopted_checkpoint_is_published(run_uri: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    from pillsnap.config import load_settings
    from pillsnap.runs.directory import open_run
    from pillsnap.runs.warm_start import adopt_checkpoint, named_checkpoint

    weights = {"w": torch.ones(2)}
    for epoch in (1, 2):
        path = save_checkpoint(
            tmp_path / "from", Position(epoch, 0, epoch), model=weights, ema=weights, trainer={},
            meta={"task": "detection", "elapsed_s": 1.0}, best=epoch == 1, keep=2,
        )  # fmt: skip
    run, _ = open_run(scratch(run_uri, "driver"), load_settings("demo"), toy_manifest, toy_tree, uri=run_uri)
    assert run.where == run_uri
    assert json.loads((run.run_dir / "config.json").read_text())["manifest"] == f"{run_uri}/manifest.parquet"
    adopt_checkpoint(run, named_checkpoint(path))
    for pointer, epoch in (("last", 2), ("best", 1)):
        found, damaged = find_run_checkpoint(run_uri, "detection", pointer)
        assert found is not None and found.position.epoch == epoch and damaged == []
    other = named_checkpoint(f"{run_uri}/checkpoints/detection/{path.name}")
    assert other.position == Position(2, 0, 2) and other.path.is_relative_to(scratch(run_uri, "reader"))
    assert (other.path.parent / "best.json").exists()
    for wrong in (f"{run_uri}/checkpoints/detection/step-00000099", f"{run_uri}/checkpoints"):
        with pytest.raises(UserError, match=r"is missing|is not a checkpoint"):
            named_checkpoint(wrong)
    with pytest.raises(UserError, match=f"{run_uri} already holds"):
        adopt_checkpoint(run, named_checkpoint(tmp_path / "from" / "step-00000001-epoch-0001"))
