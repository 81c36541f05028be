"""StepMonitor: reads the results of training steps, logs them, and ends the run after three non-finite steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import Position
from pillsnap.train.job import Job
from pillsnap.train.meters import RunningMean, Throughput
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.device_readback import DeviceReadback
from pillsnap.train.step.training_state import Step
from pillsnap.train.task_log import TaskLog

_MAX_BAD_STEPS = 3
_MAX_IDS_LISTED = 40


@dataclass(frozen=True)
class _Launched:
    """A training step whose results are still on the device."""

    position: Position
    lr: float
    index: np.ndarray
    """Sample numbers of this worker's batch, -1 in empty rows."""
    losses: tuple[str, ...]
    """Names of the losses to log; empty at steps without an event."""


class StepMonitor:
    """Results are read some steps after the launch, by every worker at the same step (step/device_readback.py)."""

    def __init__(self, job: Job, group: WorkerGroup, log: TaskLog, meter: Throughput, epoch_loss: RunningMean) -> None:
        self._job, self._group, self._log, self._meter, self._epoch_loss = job, group, log, meter, epoch_loss
        self._readback: DeviceReadback[_Launched] = DeviceReadback(job.device)
        self._bad: list[str] = []
        """The run of consecutive non-finite steps that ends at the last step read, with their samples."""

    def add(self, position: Position, lr: float, index: np.ndarray, step: Step) -> None:
        """Queue a step's results and handle those that have arrived. Raises UserError after too many bad steps."""
        log_losses = (
            position.global_step % self._job.train.log_every_steps == 0
            or position.epoch_step == self._job.plan.train_steps
        )
        launched = _Launched(position, lr, index, tuple(step.losses) if log_losses else ())
        values = step.bad[None].float()
        if log_losses:
            shares = self._group.sum_on_device(torch.stack(list(step.losses.values())))
            values = torch.cat([values.to(shares.dtype), shares])
        self._readback.send(values, launched)
        for earlier, read in self._readback.due():
            self._handle(earlier, read)

    def last_step_is_bad(self) -> bool:
        """Whether the last step made no update; waits for the device."""
        for launched, values in self._readback.all():
            self._handle(launched, values)
        return bool(self._bad)

    def _handle(self, step: _Launched, values: list[float]) -> None:
        if values[0]:
            self._handle_bad(step)
        else:
            self._bad = []
        if step.losses:
            losses = dict(zip(step.losses, values[1:], strict=True))
            self._epoch_loss.add(sum(losses.values()))
            cuda = self._job.device.type == "cuda"
            self._log.write(
                "step", epoch=step.position.epoch + 1, step=step.position.global_step, loss=sum(losses.values()),
                losses=losses, lr=step.lr, gpu_memory_bytes=torch.cuda.max_memory_allocated() if cuda else None,
                **self._meter.recent(),
            )  # fmt: skip
            self._log.flush_quarantine()

    def _handle_bad(self, step: _Launched) -> None:
        name, number = self._job.task.name, step.position.global_step
        ids = self._group.gather(self._job.sample_ids([int(i) for i in step.index if i >= 0]))
        more = f" and {len(ids) - _MAX_IDS_LISTED} more" if len(ids) > _MAX_IDS_LISTED else ""
        self._bad.append(f"step {number}: {', '.join(ids[:_MAX_IDS_LISTED])}{more}")
        self._log.warn(f"{name}: the loss or its gradient is not finite; no update was made at {self._bad[-1]}.")
        if len(self._bad) >= _MAX_BAD_STEPS:
            raise UserError(
                f"{name} stopped at step {number}: {len(self._bad)} steps in a row had a loss or gradient that is not "
                f"finite. Lower {name}.lr or look at these samples. {'; '.join(self._bad)}."
            )
