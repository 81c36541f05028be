"""Events of one task, and the count of photos that could not be used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pillsnap.errors import UserError

if TYPE_CHECKING:
    from pillsnap.data.loader import DeviceBatch
    from pillsnap.train.collectives import Peers
    from pillsnap.train.job import Job


class TaskLog:
    """Writes to the run's event log where this worker has one. Flushes must be called by every worker alike."""

    def __init__(self, job: Job, peers: Peers, remembered: dict[str, Any]) -> None:
        self._job, self._peers = job, peers
        self._pending: list[tuple[str, str]] = []
        self._quarantined: dict[str, str] = dict(remembered.get("quarantined", {}))
        self._seen_before = self._seen_by_all = remembered.get("num_seen", 0)
        self._num_seen = 0

    @property
    def remembered(self) -> dict[str, Any]:
        """What a checkpoint keeps: reasons by sample id, and the number of samples seen, over all workers."""
        return {"quarantined": dict(self._quarantined), "num_seen": self._seen_by_all}

    def write(self, kind: str, **fields: Any) -> None:
        if self._job.events is not None:
            self._job.events.write(kind, task=self._job.task.name, **fields)

    def warn(self, message: str) -> None:
        if self._job.events is not None:
            self._job.events.write("warning", message=message)

    def seen(self, batch: DeviceBatch) -> None:
        """Count a batch's samples, and keep what it could not use for the next flush."""
        self._num_seen += int((batch.index >= 0).sum())
        self._pending += batch.quarantine

    def flush_quarantine(self) -> None:
        """Record newly quarantined photos. Raises UserError with their list when they are more than the settings
        allow.
        """
        num_seen, num_pending = self._peers.sum(torch.tensor([self._num_seen, len(self._pending)], dtype=torch.float64))
        self._seen_by_all = self._seen_before + int(num_seen)
        if not num_pending:
            return
        for sample_id, reason in self._peers.gather(self._pending):
            if sample_id not in self._quarantined:
                self._quarantined[sample_id] = reason
                self.write("quarantine", sample_id=sample_id, reason=reason)
        self._pending = []
        total = min(self._seen_by_all, self._job.plan.num_train + self._job.plan.num_val)
        limits = self._job.data
        if total >= limits.quarantine_after and len(self._quarantined) > limits.quarantine_fraction * total:
            listed = "; ".join(f"{sample_id} ({reason})" for sample_id, reason in list(self._quarantined.items())[:20])
            raise UserError(
                f"{len(self._quarantined)} of {total} {self._job.task.name} samples cannot be read, more than the "
                f"{limits.quarantine_fraction:.1%} that data.quarantine_fraction allows. The first: {listed}. "
                "Run `pillsnap manifest validate --deep` for the whole list."
            )
