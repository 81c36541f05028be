"""The log file names the writer of each line, is shared by processes, rotates, and masks secrets."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillsnap.errors import UserError
from pillsnap.observe.events import EventLog
from pillsnap.observe.logs import SharedRotatingHandler, current_level, setup_logging, tail_log


@pytest.fixture(autouse=True)
def package_logger() -> Iterator[None]:
    logger = logging.getLogger("pillsnap")
    yield
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)


def test_file_and_console_name_the_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path, "INFO")
    logging.getLogger("pillsnap.train.driver").info("starts with 알약")
    logging.getLogger("pillsnap.train.driver").debug("not at this level")
    setup_logging(tmp_path, "debug", rank=3)
    logging.getLogger("pillsnap.train.loop").debug("step 1")
    first, second = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert first.endswith("INFO    driver   pillsnap.train.driver: starts with 알약")
    assert second.endswith("DEBUG   rank 3   pillsnap.train.loop: step 1")
    assert capsys.readouterr().err == "INFO starts with 알약\nDEBUG rank 3: step 1\n"


def test_file_only_records_stay_off_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path)
    logging.getLogger("pillsnap.cluster.session").info("all adapters work", extra={"file_only": True})
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith("all adapters work\n")
    assert capsys.readouterr().err == ""


def test_unknown_level_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LOUD.*DEBUG"):
        setup_logging(tmp_path, "LOUD")


def test_keys_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    setup_logging(tmp_path)
    try:
        raise RuntimeError("refused 0123456789abcdef")
    except RuntimeError:
        logging.getLogger("pillsnap").exception("with key %s", "0123456789abcdef")
    text = (tmp_path / "train.log").read_text()
    assert "0123456789abcdef" not in text + capsys.readouterr().err
    assert "with key ***" in text and "refused ***" in text


def test_rotation_keeps_five_and_loses_nothing_recent(tmp_path: Path) -> None:
    handler = SharedRotatingHandler(tmp_path / "train.log", max_bytes=1000, num_old=5)
    for number in range(900):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, f"line {number:03}", None, None))
    handler.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.log", *(f"train.log.{n}" for n in range(1, 6))]
    names = [f"train.log.{n}" for n in range(5, 0, -1)] + ["train.log"]
    lines = [line for name in names for line in (tmp_path / name).read_text().splitlines()]
    assert lines == [f"line {number:03}" for number in range(900)][-len(lines) :] and len(lines) > 500


def test_processes_share_a_rotating_file_without_losing_a_line(tmp_path: Path) -> None:
    code = (
        "import logging, sys; from pathlib import Path\n"
        "from pillsnap.observe.logs import SharedRotatingHandler\n"
        "handler = SharedRotatingHandler(Path(sys.argv[1]) / 'train.log', max_bytes=500, num_old=50)\n"
        "for i in range(400):\n"
        "    handler.emit(logging.LogRecord('x', 20, '', 0, f'{sys.argv[2]} {i}', None, None))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    lines = [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    assert sorted(lines) == sorted(f"{name} {i}" for name in "abc" for i in range(400))
    assert len(list(tmp_path.iterdir())) >= 3


def test_tail_and_follow_across_a_rotation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.log does not exist"):
        list(tail_log(tmp_path))
    path = tmp_path / "train.log"
    path.write_text("".join(f"{n}\n" for n in range(10)))
    assert list(tail_log(tmp_path, num_lines=3)) == ["7", "8", "9"]
    stop = threading.Event()
    lines = tail_log(tmp_path, num_lines=1, follow=True, stop=stop)
    assert next(lines) == "9"
    with path.open("a") as file:
        file.write("10\n")
    assert next(lines) == "10"
    path.rename(tmp_path / "train.log.1")
    path.write_text("11\n")
    assert next(lines) == "11"
    stop.set()
    assert list(lines) == []


def test_events_are_logged_to_the_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EventLog(tmp_path) as log:
        log.write("warning", message="before setup")
        assert capsys.readouterr() == ("", "")
        setup_logging(tmp_path, "INFO", rank=1)
        log.write("step", task="detection", epoch=1, step=1, loss=2.0)
        log.write("epoch", task="detection", epoch=1, step=9, loss=1.23456789, images_per_s=30.5)
        log.write("warning", message="two\nlines")
        setup_logging(tmp_path, "DEBUG", rank=1)
        log.write("step", task="detection", epoch=2, step=10, loss=float("nan"), losses={"box": 0.5})
    assert current_level() == "DEBUG"
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert lines == [
        "INFO    rank 1   pillsnap.events: epoch task=detection epoch=1 step=9 loss=1.23457 images_per_s=30.5",
        "WARNING rank 1   pillsnap.events: warning message=two lines",
        "DEBUG   rank 1   pillsnap.events: step task=detection epoch=2 step=10 loss=nan losses=box:0.5",
    ]
    assert capsys.readouterr() == ("", "")
