"""1 to 2 to 1 workers with the same global batch: the same samples, and the same first step."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest

from pillsnap.observe.events import read_events
from pillsnap.runs.directory import STOP_FILE, Run, open_run
from pillsnap.train.driver import RunStopped, train_run
from tests.reliability.harness import FAULTS_FILE, NO_BATCH_NORM, raw_events, say, tiny, wait_for, worker_with_faults

STOPS = {1: 2, 2: 9}
"""Steps after which the first and the second start of the run are stopped."""


def stop_after(run: Run, step: int) -> None:
    def ask() -> None:
        wait_for(lambda: [e for e in raw_events(run.run_dir, "step") if e["step"] >= step], 240, f"step {step}")
        (run.run_dir / STOP_FILE).write_text("test")

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(RunStopped):
        train_run(run)


@pytest.mark.reliability
@pytest.mark.usefixtures("ray_local")
def test_workers_change_from_one_to_two_to_one(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pillsnap.train.trainer.run_worker", worker_with_faults)

    def opened(where: str, workers: str) -> Run:
        settings = tiny(
            train__task="classification", train__num_workers=workers, train__amp="off", classification__epochs=4,
            **{key.replace(".", "__"): value for key, value in NO_BATCH_NORM.items()},
        )  # fmt: skip
        run, notes = open_run(tmp_path / where, settings, toy_manifest, toy_tree)
        (run.run_dir / FAULTS_FILE).write_text(json.dumps({"record_ids": str(run.run_dir)}))
        assert len(notes) <= 2
        return run

    whole = opened("whole", "1")
    train_run(whole)
    stop_after(opened("changing", "1"), 2)
    stop_after(opened("changing", "1:2"), 9)
    changing = opened("changing", "1")
    train_run(changing)
    starts = [e["step"] for e in raw_events(changing.run_dir, "task") if e["status"] == "started"]
    assert len(starts) == 3
    assert (changing.run_dir / "ids-1.jsonl").exists()

    def ids(run: Run) -> dict[int, Counter]:
        steps: dict[int, Counter] = {}
        for path in run.run_dir.glob("ids-*.jsonl"):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                steps.setdefault(row["step"], Counter()).update(row["ids"])
        return steps

    assert ids(whole) == ids(changing)
    assert all(max(members.values()) == 1 for members in ids(changing).values())
    losses = [
        {e["step"]: e["loss"] for e in read_events(run.run_dir) if e["kind"] == "step"} for run in (whole, changing)
    ]
    first_of_two = starts[1] + 1
    difference = abs(losses[0][first_of_two] - losses[1][first_of_two])
    say(
        int(difference <= 1e-5) + int(ids(whole) == ids(changing)), 2,
        f"1 to 2 to 1 workers: same ids in every step, first step's loss with two workers differs by {difference:.1e}",
    )  # fmt: skip
