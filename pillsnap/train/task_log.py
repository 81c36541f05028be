"""TaskLog: events of one task, and the quarantine of unreadable photos with its budget."""

from __future__ import annotations

from typing import Any

import torch

from pillsnap.data.loader import DeviceBatch
from pillsnap.errors import UserError
from pillsnap.manifest.audit.quick import exceeds
from pillsnap.train.job import Job
from pillsnap.train.step.collectives import WorkerGroup


class TaskLog:
    """Writes to the run's event log on rank 0. Every worker must call `flush_quarantine` at the same steps."""

    def __init__(self, job: Job, group: WorkerGroup, progress: dict[str, Any]) -> None:
        """`progress` is that of the checkpoint."""
        self._job, self._group = job, group
        self._pending: list[tuple[str, str]] = []
        self._quarantined: dict[str, str] = dict(progress.get("quarantined", {}))
        self._num_seen_before = self._num_seen_by_all = progress.get("num_seen", 0)
        self._num_seen = 0

    @property
    def progress(self) -> dict[str, Any]:
        """Kept in checkpoints: reasons by sample id, and the number of samples seen by all workers."""
        return {"quarantined": dict(self._quarantined), "num_seen": self._num_seen_by_all}

    def write(self, kind: str, **fields: Any) -> None:
        """Append an event of this task."""
        if self._job.events is not None:
            self._job.events.write(kind, task=self._job.task.name, **fields)

    def warn(self, message: str) -> None:
        """Append a warning."""
        if self._job.events is not None:
            self._job.events.write("warning", message=message)

    def count(self, batch: DeviceBatch) -> None:
        """Count a batch's samples, and collect its unreadable photos for the next flush."""
        self._num_seen += int((batch.index >= 0).sum())
        self._pending += batch.quarantine

    def flush_quarantine(self) -> None:
        """Write events of newly quarantined photos. Raises UserError with their list when they exceed the budget."""
        num_seen, num_pending = self._group.sum(torch.tensor([self._num_seen, len(self._pending)], dtype=torch.float64))
        self._num_seen_by_all = self._num_seen_before + int(num_seen)
        if not num_pending:
            return
        for sample_id, reason in self._group.gather(self._pending):
            if sample_id not in self._quarantined:
                self._quarantined[sample_id] = reason
                self.write("quarantine", sample_id=sample_id, reason=reason)
        self._pending = []
        total = min(self._num_seen_by_all, self._job.plan.num_train + self._job.plan.num_val)
        limits = self._job.data
        count, fraction = len(self._quarantined), limits.quarantine_fraction
        if count > fraction * total if total >= limits.quarantine_after else exceeds(count, total, fraction):
            listed = "; ".join(f"{sample_id} ({reason})" for sample_id, reason in list(self._quarantined.items())[:20])
            raise UserError(
                f"{len(self._quarantined)} of {total} {self._job.task.name} samples cannot be read, more than the "
                f"{limits.quarantine_fraction:.1%} that data.quarantine_fraction allows. The first: {listed}. "
                "Run `pillsnap manifest validate --deep` for the whole list."
            )
