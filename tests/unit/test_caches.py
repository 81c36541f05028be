"""Folders whose files are trusted: made for this user alone, refused when another could have written to them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pillsnap.caches import keep_compiled_code_private, private_folder
from pillsnap.errors import UserError
from tests.conftest import ROOT


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this user in an empty temporary folder, not made yet."""
    monkeypatch.delenv("PILLSNAP_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path / f"pillsnap-{os.getuid()}"


def test_a_private_folder_is_made_for_its_owner(root: Path) -> None:
    assert private_folder("weights") == root / "weights"
    assert [folder.stat().st_mode & 0o777 for folder in (root, root / "weights")] == [0o700, 0o700]
    assert private_folder("weights") == root / "weights"


@pytest.mark.parametrize("place", ["", "weights"])
@pytest.mark.parametrize("fault", ["others write", "link", "file", "other owner"])
def test_a_folder_that_another_user_made_or_may_write_to(
    place: str, fault: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / place
    folder.mkdir(parents=True, mode=0o700)
    root.chmod(0o700)
    if fault == "others write":
        folder.chmod(0o777)
    elif fault == "other owner":
        monkeypatch.setattr("os.getuid", lambda: 12345)
        folder.rename(root.with_name("pillsnap-12345")) if not place else root.rename(root.with_name("pillsnap-12345"))
    else:
        folder.rmdir()
        folder.symlink_to("/") if fault == "link" else folder.touch()
    with pytest.raises(UserError, match=r"set PILLSNAP_CACHE_DIR to another folder") as error:
        private_folder("weights")
    assert "\n" not in str(error.value)


def test_a_cache_folder_in_which_anybody_may_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match="Every user can replace the folders in"):
        private_folder("weights")
    tmp_path.chmod(0o1777)
    assert private_folder("weights").stat().st_mode & 0o777 == 0o700


def test_compiled_code_is_kept_in_private_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is removed again at the end
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(root / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/chosen"


def test_torch_compiles_where_neither_home_nor_working_directory_can_be_written(tmp_path: Path) -> None:
    """What torch compiled is in the private folder, and no code is in its default one beside it."""
    script = (
        "import torch\n"
        "from pillsnap.models.compiling import compile_problem\n"
        "print(compile_problem(torch.device('cpu')))\n"
    )
    ours = ("PILLSNAP_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"HOME": "/proc/nothing", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd="/proc", env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["None"], done.stdout + done.stderr[-1000:]
    assert list((tmp_path / f"pillsnap-{os.getuid()}" / "inductor").iterdir())
    assert not [path for path in tmp_path.glob("torchinductor_*/**/*") if path.suffix in (".py", ".so", ".cpp")]
