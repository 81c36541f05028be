"""The environment of other tools, of other locales and of users without a home does not reach a command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pillsnap.cli import app
from pillsnap.cli.environment import clean_environment
from pillsnap.ray_compat.token import check_token, token_variables
from tests.conftest import ROOT

LEAKED = {
    "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "10.9.9.9", "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "RAY_RUNTIME_ENV_HOOK": "another.tool.hook", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1", "RAY_TRAIN_V2_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "lo,nowhere9", "NCCL_SOCKET_IFNAME": "=nowhere9",
    "OPENCV_IO_MAX_IMAGE_PIXELS": "1000", "OPENCV_IO_MAX_IMAGE_WIDTH": "x", "OPENCV_IO_MAX_IMAGE_HEIGHT": "",
    "TORCHINDUCTOR_CACHE_DIR": "/proc/x", "YOLO_CONFIG_DIR": "/dev/null", "MPLCONFIGDIR": "",
    "PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "PYTHONINSPECT": "1", "PYTHONDEVMODE": "1",
    "PYTHONMALLOC": "debug", "PYTHONASYNCIODEBUG": "1",
}  # fmt: skip
KEPT = {"PYTHONPATH": "/a", "PYTHONHASHSEED": "1", "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": "7", "TERM": "dumb"}


def test_variables_of_other_programs_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**LEAKED, **KEPT})
    clean_environment()
    assert os.environ == KEPT | {"PYTHONSAFEPATH": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


def test_an_interface_of_this_machine_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    clean_environment()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_folder_that_can_be_made_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "new" / "folder"))
    clean_environment()
    assert os.environ["YOLO_CONFIG_DIR"] == str(tmp_path / "new" / "folder")


def test_a_cluster_keeps_what_prepares_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_RUNTIME_ENV_HOOK": "a.hook", "GLOO_SOCKET_IFNAME": "nowhere9"}
    monkeypatch.setattr(os, "environ", dict(given))
    clean_environment()
    assert os.environ == given | {"PYTHONSAFEPATH": "1"}


@pytest.mark.parametrize("columns, kept", [("0", False), ("-3", False), ("", False), ("x", False), ("100", True)])
def test_a_width_in_which_nothing_can_be_printed_is_removed(
    columns: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "Usage" in CliRunner().invoke(app, ["config", "--help"]).output
    assert ("COLUMNS" in os.environ) == kept


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, None),
        ({"HTTP_PROXY": "p"}, "127.0.0.1,localhost,::1"),
        ({"grpc_proxy": "p", "NO_PROXY": "a,localhost"}, "a,localhost,127.0.0.1,::1"),
        ({"ALL_PROXY": "p", "no_proxy": "*"}, "*,127.0.0.1,localhost,::1"),
    ],
)
def test_a_proxy_does_not_get_what_is_for_this_machine(
    given: dict[str, str], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    clean_environment()
    assert (os.environ.get("NO_PROXY"), os.environ.get("no_proxy")) == (wanted, wanted)


@pytest.fixture(scope="module")
def euc_kr(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Korean locale from before UTF-8."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("no localedef")
    subprocess.run(["localedef", "-i", "ko_KR", "-f", "EUC-KR", folder / "ko_KR.EUC-KR"], check=False)
    if not (folder / "ko_KR.EUC-KR").exists():
        pytest.skip("no sources of the locale")
    return {"LOCPATH": str(folder), "LC_ALL": "ko_KR.EUC-KR"}


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", ["ascii", "euc_kr"])
def test_paths_in_utf8_are_found_in_every_locale(
    locale: str, toy_tree: Path, toy_manifest: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    environment = ASCII if locale == "ascii" else request.getfixturevalue("euc_kr")
    (tmp_path / "사진").symlink_to(toy_tree)
    (tmp_path / "목록").symlink_to(toy_manifest.parent)
    done = subprocess.run(
        [sys.executable, "-m", "pillsnap.cli", "manifest", "validate", tmp_path / "목록", "--data-root",
         tmp_path / "사진", "--json", tmp_path / "결과"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "결과").exists()


def test_a_command_is_started_again_with_docstrings_and_warnings() -> None:
    """Ray's modules cannot be imported without docstrings."""
    script = (
        "import sys; print(sys.flags.optimize, sys.warnoptions, sys.flags.dev_mode, flush=True)\n"
        "from pillsnap.cli import app; app(['--version'])"
    )
    given = {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, again, _ = done.stdout.splitlines()
    assert first.startswith("2 ") and first.endswith(" True") and again == "0 [] False"


@pytest.mark.parametrize("home", ["none", "a file", "not writable"])
def test_a_user_without_a_home_has_a_token(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    if home == "none":  # as `docker run --user 12345` without HOME

        def no_entry(uid: int) -> None:
            raise KeyError(f"getpwuid(): uid not found: {uid}")

        monkeypatch.setattr("pwd.getpwuid", no_entry)
    elif home == "a file":
        (tmp_path / "home").write_text("")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    else:
        monkeypatch.setenv("HOME", "/proc/none")
    check_token()
    path = tmp_path / "cache/ray/auth_token"
    assert token_variables() == {"RAY_AUTH_TOKEN_PATH": str(path)}
    assert len(path.read_text()) == 64
    assert not (tmp_path / "~").exists()
