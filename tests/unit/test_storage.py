"""Remote folders: atomic files, one-line errors, no credentials in URIs."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest

from pillsnap.config import load_settings, run_location
from pillsnap.errors import UserError
from pillsnap.storage import Storage, StorageError, cache_folder, drop_old_copies, is_uri, join, local_manifest, scratch


@pytest.fixture(params=["s3", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"{tmp_path.as_uri()}/folder"
    return f"{request.getfixturevalue('s3_environment')}/folder"


def test_files_round_trip(uri: str, tmp_path: Path) -> None:
    storage = Storage(uri)
    assert storage.files() == {}
    assert storage.read("a.txt") is None
    storage.write("a.txt", b"first")
    storage.write("a.txt", b"second, longer")
    big = tmp_path / "big"
    big.write_bytes(bytes(range(256)) * 100_000)  # 25 MB: in several parts
    storage.upload(big, "deep/er/big")
    assert storage.read("a.txt") == b"second, longer"
    assert storage.read("a.txt", 8) == b"longer"
    assert {name: stamp.size for name, stamp in storage.files().items()} == {"a.txt": 14, "deep/er/big": 25_600_000}
    assert storage.stamp("a.txt") == storage.files()["a.txt"]
    assert storage.download("deep/er/big", tmp_path / "copy" / "big")
    assert (tmp_path / "copy" / "big").read_bytes() == big.read_bytes()
    assert not storage.download("not there", tmp_path / "copy" / "none")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["big"]
    assert pickle.loads(pickle.dumps(storage)).read("a.txt") == b"second, longer"
    storage.remove("a.txt")
    storage.remove("a.txt")
    assert list(storage.files()) == ["deep/er/big"]


def test_missing_bucket_is_one_line(s3_environment: str) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/runs/a cannot be reached .*NO_SUCH_BUCKET") as error:
        Storage("s3://no-such-bucket/runs").write("a", b"1")
    assert "\n" not in str(error.value) and "Request ID" not in str(error.value)


def test_unreachable_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="NETWORK_CONNECTION"):
        Storage("s3://bucket/runs").read("a")


@pytest.mark.parametrize("uri", ["s3://key:secret@bucket/runs", "s3://bucket/runs?secret_key=secret"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match="contains credentials") as error:
        Storage(uri)
    assert "secret@" not in str(error.value) and "=secret" not in str(error.value)
    with pytest.raises(UserError, match="contains credentials"):
        run_location(load_settings("demo", {"train.storage": uri}), None)


def test_names() -> None:
    assert is_uri("s3://bucket/a") and not is_uri("/a/b") and not is_uri("C:/a") and not is_uri("a://b"[:1])
    assert join("s3://bucket/a/", "b") == "s3://bucket/a/b"
    assert join("s3://bucket/a?endpoint_override=x:1", "b") == "s3://bucket/a/b?endpoint_override=x:1"
    assert join("/a", "b") == "/a/b"


def test_run_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, remote = load_settings("demo"), load_settings("demo", {"train.storage": "s3://bucket/runs"})
    assert run_location(plain, None) == str(tmp_path / "artifacts" / "demo")
    assert run_location(plain, "here") == str(tmp_path / "here")
    assert run_location(plain, "s3://bucket/a/b") == "s3://bucket/a/b"
    assert run_location(remote, None) == "s3://bucket/runs/demo"
    assert run_location(remote, "artifacts/mine") == "s3://bucket/runs/mine"
    assert run_location(remote, "s3://bucket/runs/mine") == "s3://bucket/runs/mine"
    with pytest.raises(UserError, match="give one of them"):
        run_location(remote, "s3://other/mine")
    for local in (str(tmp_path / "shared"), (tmp_path / "shared").as_uri()):
        settings = load_settings("demo", {"train.storage": local})
        assert run_location(settings, "artifacts/mine") == str(tmp_path / "shared" / "mine")


def test_copies_are_separate_per_role_and_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PILLSNAP_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    assert scratch("s3://b/runs/x", "driver").name == scratch("s3://b/runs/x", "worker").name == "x"
    assert len({scratch(uri, role) for uri in ("s3://b/x", "s3://c/x") for role in ("driver", "worker")}) == 4
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (tmp_path / "pillsnap-12345").mkdir()
    with pytest.raises(UserError, match="belongs to another user"):
        cache_folder()


def test_copies_unused_for_two_weeks_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path))
    copies = {name: scratch(f"s3://bucket/{name}", "worker") for name in ("old", "used", "new")}
    for copy in copies.values():
        (copy / "deep").mkdir(parents=True)
        (copy / "deep" / "file").touch()
    fifteen_days_ago = time.time() - 15 * 86_400
    for name in ("old", "used"):
        for path in (copies[name].parent, *copies[name].parent.rglob("*")):
            os.utime(path, (fifteen_days_ago, fifteen_days_ago))
    os.utime(copies["used"] / "deep" / "file")
    drop_old_copies("worker")
    assert [name for name, copy in copies.items() if copy.exists()] == ["used", "new"]
    drop_old_copies("none")


def test_remote_manifest_is_downloaded(s3_environment: str, toy_manifest: Path, monkeypatch: pytest.MonkeyPatch,
                                    tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path))
    storage = Storage(f"{s3_environment}/manifests")
    for name in ("manifest.parquet", "classes.json"):
        storage.upload(toy_manifest.parent / name, name)
    for where in (storage.uri, f"{storage.uri}/manifest.parquet"):
        local = local_manifest(where)
        assert local.read_bytes() == toy_manifest.read_bytes()
        assert (local.parent / "classes.json").exists()
    with pytest.raises(UserError, match="no such manifest"):
        local_manifest(f"{s3_environment}/none")
