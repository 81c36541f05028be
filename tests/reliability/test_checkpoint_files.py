"""Kills during a save and damaged files: a complete checkpoint is always found, and damaged files are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pillsnap.runs.checkpoint import find_checkpoint
from tests.conftest import ROOT
from tests.reliability.die_saving import save
from tests.reliability.harness import say

FILES = ("model.safetensors", "ema.safetensors", "trainer.pt", "meta.json")


def test_kill_at_every_disk_operation_of_a_save(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.reliability.die_saving", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert not deaths[-1]["died"] and all(death["died"] for death in deaths[:-1])
    assert all(death["found"][0] in (death["saving"] - 1, death["saving"]) for death in deaths)
    whole = sum(death["whole"] for death in deaths[:-1])
    assert len(deaths) - 1 >= 50
    say(whole, len(deaths) - 1, "SIGKILL at each boundary of a save: the last and the best checkpoint load complete")


def test_kill_at_every_disk_operation_of_a_second_save_at_one_position(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.reliability.die_saving", str(tmp_path), "again"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *deaths, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert not end["died"] and len(deaths) >= 50
    assert (end["numbers"], end["kept"]) == ([end["boundary"]] * 2, 1)  # the last save replaced all before
    whole = sum(death["whole"] and death["found"] == [3, 3] for death in deaths)
    say(
        whole,
        len(deaths),
        "SIGKILL at each boundary of a second save at one position, one checkpoint kept: loads whole",
    )


def test_every_damaged_file_is_detected_and_named(tmp_path: Path) -> None:
    passed = tried = 0
    for name in FILES:
        for damage in ("first byte", "a byte within", "last byte", "cut", "cut by one", "empty", "gone"):
            folder = tmp_path / f"{name} {damage}"
            save(folder, 1)
            save(folder, 2)
            path = folder / "step-00000020-epoch-0002" / name
            data = bytearray(path.read_bytes())
            at = {"first byte": 0, "a byte within": len(data) // 3, "last byte": len(data) - 1}.get(damage)
            if at is not None:
                data[at] ^= 1
            elif damage.startswith("cut"):
                data = data[: len(data) - 1 if damage == "cut by one" else len(data) // 2]
            path.write_bytes(b"" if damage == "empty" else bytes(data))
            if damage == "gone":
                path.unlink()
            for pointer in ("last", "best"):
                found, damaged = find_checkpoint(folder, pointer)
                tried += 1
                passed += (
                    found is not None and found.position.epoch == 1 and len(damaged) == 1 and str(path) in damaged[0]
                )
    for pointer in ("last", "best"):
        for content in (b"", b"{", b'{"checkpoint": 7}', b"\x00" * 40, b'{"checkpoint": "step-00000099"}'):
            folder = tmp_path / f"{pointer} {content[:20]!r}".replace("/", "_")
            save(folder, 1)
            save(folder, 2)
            (folder / f"{pointer}.json").write_bytes(content)
            found, damaged = find_checkpoint(folder, pointer)
            tried += 1
            passed += found is not None and found.position.epoch == 2 and str(folder) in damaged[0]
    say(
        passed,
        tried,
        "a flipped byte, a cut, an empty or missing file, for every file and pointer: found, named, replaced",
    )
