"""TrainingState: model, moving average, optimizer, loss scale and random state of a task, and its optimizer step."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pillsnap.config import TrainSettings
from pillsnap.data.loader import DeviceBatch
from pillsnap.models.compiling import compile_problem, wants_compiling
from pillsnap.models.precision import autocast
from pillsnap.models.quiet_timm import timm
from pillsnap.runs.checkpoint import Checkpoint
from pillsnap.tasks.base import Task
from pillsnap.train.step.batch_statistics import BatchStatistics
from pillsnap.train.step.collectives import WorkerGroup, average_gradients
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.nonfinite import Buffers, LossScale, MovingAverage, clipped_step

_EMA_WARMUP_POWER = 0.75


class Step(NamedTuple):
    """Results of one step, all on the device."""

    losses: dict[str, torch.Tensor]
    """This worker's share of the mean losses, by name."""
    norm: torch.Tensor
    """Gradient norm before clipping."""
    bad: torch.Tensor
    """Whether loss or gradient is not finite, bool (); the same on every worker. A float16 overflow that a smaller loss
    scale can avoid is skipped as well, but not bad."""


class TrainingState:
    """Model, moving average and optimizer of one task on one worker."""

    def __init__(
        self,
        task: Task,
        train: TrainSettings,
        device: torch.device,
        group: WorkerGroup,
        microbatches: MicrobatchRunner,
        resume: Checkpoint | None,
    ) -> None:
        _seed_everything(train.seed)
        self._task, self._train, self._group, self._microbatches = task, train, group, microbatches
        self._device = device
        model = task.build()
        if resume is not None:
            model.load_state_dict(resume.weights("model"))
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        self.ema = moving_average(self.model, train)
        self._statistics = BatchStatistics(self.ema.module, group, microbatches)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, task.settings.weight_decay, getattr(task.settings, "layer_decay", 1.0)),
            lr=task.settings.lr,
            fused=True,  # required by clipped_step
        )
        self.loss_scale = LossScale(device) if train.amp == "float16" else None
        self.best, self.best_loss = -math.inf, math.inf
        self.notes: list[str] = []
        """Warnings about the set-up, for the user."""
        self._compiled = False
        if wants_compiling(train, device):
            problem = compile_problem(device)
            if problem is None:
                # A part that cannot be compiled runs eagerly, with a log line.
                torch._dynamo.config.suppress_errors = True
                self.model.compile(dynamic=False)
                self._compiled = True
            else:
                self.notes.append(f"{task.name}: the model is not compiled, steps take longer: {problem}.")
        self._buffers = Buffers(self.model)
        self._losses = _Losses(task, self.model)
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._synced: DistributedDataParallel | None = None
        if group.size > 1:
            self._synced = DistributedDataParallel(self._losses, device_ids=[device] if device.type == "cuda" else None)
            # `step` broadcasts them: on a retry, the workers would take part in different numbers of broadcasts.
            self._synced.broadcast_buffers = False
        self._size_px: int | None = None
        self.autocast = autocast(train.amp, device)
        if resume is not None:
            self._restore(resume)

    def step(self, batch: DeviceBatch, lr: float, samples_in_step: int, global_step: int) -> Step:
        """One optimizer step, without a host sync. With a non-finite loss or gradient it changes nothing
        (nonfinite.py).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        size_px = self._task.input_size_px(batch.epoch)
        if size_px != self._size_px:
            self._microbatches.expect_change()
            self._size_px = size_px
        # A worker that runs out of memory must not leave the others in a collective: as long as the workers agree on
        # whether the batch fitted, gradients are averaged after the backward pass instead of during it. The model runs
        # inside DistributedDataParallel all the same, since torch.compile splits the graph at its buckets only there.
        synced, careful = self._synced, self._microbatches.agrees
        self._group.wait_for_compilation(self._compiled and careful)
        if synced is not None:
            self._buffers.broadcast_from_first()
        self._buffers.keep()
        random_state = _random_state(self._device)
        scale = None if self.loss_scale is None else self.loss_scale.factor

        def compute(part: DeviceBatch, last: bool) -> dict[str, torch.Tensor]:
            with nullcontext() if synced is None or (last and not careful) else synced.no_sync():
                with self.autocast():
                    losses = (synced or self._losses)(part)
                shares = {name: loss / samples_in_step for name, loss in losses.items()}
                total = torch.stack(list(shares.values())).sum()
                # DistributedDataParallel averages over workers; times their number, the gradient is that of the mean
                # over all samples. The second factor is 1, or NaN when the loss is not finite, so that the gradient is
                # not finite on any worker.
                factor = self._group.size * (1 + 0 * total.detach())
                (total * (factor if scale is None else factor * scale)).backward()
            return {name: share.detach() for name, share in shares.items()}

        def undo() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            self._buffers.restore()
            _set_random_state(random_state, self._device)

        def weigh(parts: list[DeviceBatch]) -> list[DeviceBatch]:
            with nullcontext() if synced is None else synced.no_sync(), self.autocast():
                weighed = self._task.weigh(self.model, parts, synced or self._losses)
            undo()  # its forward passes leave no trace
            return weighed

        shares = self._microbatches.run(batch, compute, undo, weigh)
        if synced is not None and careful:
            average_gradients(self._trained, self._group.size)
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm, good = clipped_step(self.optimizer, gradients, self._train.grad_clip_norm, scale)
        self._buffers.restore_unless(good)
        self.ema.update_if(good, global_step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return Step(shares, norm, self._is_bad(good, shares))

    def prepare_validation(self, batch: DeviceBatch, step: int, num_steps: int) -> None:
        """Call after each of the last `num_steps` training steps before a validation: estimates the running statistics
        of the average on the last batches.
        """
        with self.autocast():
            self._statistics.add(batch, step, num_steps, partial(self._task.forward, self.ema.module))

    def _is_bad(self, good: torch.Tensor, shares: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.loss_scale is None:
            return ~good.bool()
        # A non-finite gradient is bad when the loss is not finite; else the loss scale may be too large.
        unrecoverable = ~torch.isfinite(torch.stack(list(shares.values()))).all() | self.loss_scale.exhausted
        bad = self._group.sum_on_device((unrecoverable & ~good.bool()).float()) > 0
        self.loss_scale.update(good)
        return bad

    def trainer_state(self) -> dict[str, Any]:
        """State for a checkpoint besides the weights; loads with weights_only=True."""
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state_dict()}
        best = {"best": self.best, "best_loss": self.best_loss}
        return {"optimizer": self.optimizer.state_dict()} | best | scale | _random_state(self._device)

    def is_best(self, score: float, loss: float = 0.0) -> bool:
        """Whether this validation is the best so far: higher score, or the same with a lower loss; never one that is
        not finite. Keeps the best.
        """
        better = math.isfinite(score + loss) and (score, -loss) > (self.best, -self.best_loss)
        if better:
            self.best, self.best_loss = score, loss
        return better

    def _restore(self, resume: Checkpoint) -> None:
        self.ema.module.load_state_dict(resume.weights("ema"))
        state = resume.trainer_state()
        if not state:  # a first checkpoint, from another run (from_run.py)
            return
        for group in state["optimizer"]["param_groups"]:
            group |= {"fused": True, "foreach": None}  # older checkpoints have other values
        self.optimizer.load_state_dict(state["optimizer"])
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load_state_dict(state["loss_scale"])
        self.best, self.best_loss = state["best"], state.get("best_loss", math.inf)  # older checkpoints have no loss
        _set_random_state(state, self._device)


def moving_average(model: nn.Module, train: TrainSettings) -> MovingAverage:
    """The moving average of `model`, with the decay and the warm-up of the settings."""
    average = MovingAverage(
        model,
        decay=train.ema_decay,
        use_warmup=True,
        warmup_gamma=train.ema_warmup_steps,
        warmup_power=_EMA_WARMUP_POWER,
    )
    average.requires_grad_(False)
    average.follow(model)
    return average


class _Losses(nn.Module):
    """A task's losses as a forward pass, which DistributedDataParallel needs."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        return self.task.losses(self.model, batch)


def _parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Weight decay for weights, none for biases and norms; with layer decay, timm's groups with an `lr_scale` each."""
    if layer_decay < 1:
        return timm.optim.param_groups_layer_decay(model, weight_decay=weight_decay, layer_decay=layer_decay)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _random_state(device: torch.device) -> dict[str, Any]:
    state = {"torch_rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch_rng"])
    if "cuda_rng" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
