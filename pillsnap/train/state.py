"""What a task learns and remembers: model, moving average, optimizer, random state."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pillsnap.config import TrainSettings
from pillsnap.data.loader import DeviceBatch
from pillsnap.models.precision import autocast, compile_problem, wants_compiling
from pillsnap.models.quiet_timm import timm
from pillsnap.runs.checkpoint import Checkpoint
from pillsnap.tasks.base import Task
from pillsnap.train.collectives import Peers, average_gradients
from pillsnap.train.microbatch import MicroBatches
from pillsnap.train.nonfinite import Buffers, LossScale, MovingAverage, clipped_step

_EMA_WARMUP_POWER = 0.75


class Step(NamedTuple):
    """What one step gave, all of it on the device."""

    losses: dict[str, torch.Tensor]
    """This worker's share of the mean losses."""
    norm: torch.Tensor
    """Of the gradient, before clipping."""
    bad: torch.Tensor
    """Whether loss or gradient were not finite, bool (); the same on every worker. A float16 gradient that only a
    smaller loss scale can mend is left out, too, but not called bad."""


class TrainingState:
    """Model, moving average and optimizer of one task on one worker."""

    def __init__(
        self,
        task: Task,
        train: TrainSettings,
        device: torch.device,
        peers: Peers,
        memory: MicroBatches,
        resume: Checkpoint | None,
    ) -> None:
        _seed_everything(train.seed)
        self._task, self._train, self._peers, self._memory = task, train, peers, memory
        model = task.build()
        if resume is not None:
            model.load_state_dict(resume.weights("model"))
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        self.ema = MovingAverage(
            self.model,
            decay=train.ema_decay,
            use_warmup=True,
            warmup_gamma=train.ema_warmup_steps,
            warmup_power=_EMA_WARMUP_POWER,
        )
        self.ema.requires_grad_(False)
        self.ema.follow(self.model)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, task.settings.weight_decay, getattr(task.settings, "layer_decay", 1.0)),
            lr=task.settings.lr,
            fused=True,  # it alone can leave a step out without asking the host
        )
        self.loss_scale = LossScale(device) if train.amp == "float16" else None
        self.best = float("-inf")
        self.notes: list[str] = []
        """What a user should know of how training was set up."""
        if wants_compiling(train, device):
            problem = compile_problem(device)
            if problem is None:
                torch._dynamo.config.suppress_errors = (
                    True  # a part that cannot be compiled runs as it is, with a log line
                )
                self.model.compile(dynamic=False)
            else:
                self.notes.append(f"{task.name}: the model is not compiled, steps take longer: {problem}.")
        self._buffers = Buffers(self.model)
        self._losses = _Losses(task, self.model)
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._synced: DistributedDataParallel | None = None
        if peers.count > 1:
            self._synced = DistributedDataParallel(self._losses, device_ids=[device] if device.type == "cuda" else None)
        self._autocast = autocast(train.amp, device)
        if resume is not None:
            self._restore(resume)

    def step(self, batch: DeviceBatch, lr: float, samples_in_step: int, global_step: int) -> Step:
        """One optimizer step. A loss or gradient that is not finite changes nothing; nothing here waits for the device
        to know.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        # While it is open whether the batch fits, no worker may wait for another in the middle of a pass: gradients are
        # then averaged after it instead of during it.
        synced = None if self._memory.careful else self._synced
        if self._peers.count > 1 and synced is None:
            self._buffers.copy_from_first()
        self._buffers.keep()
        random_state = _random_state()
        scale = None if self.loss_scale is None else self.loss_scale.factor

        def compute(part: DeviceBatch, last: bool) -> dict[str, torch.Tensor]:
            with nullcontext() if synced is None or last else synced.no_sync():
                with self._autocast():
                    losses = (synced or self._losses)(part)
                shares = {name: loss / samples_in_step for name, loss in losses.items()}
                total = torch.stack(list(shares.values())).sum()
                # DistributedDataParallel averages over workers; times their number, the gradient is that of the mean
                # over all samples. The second factor is 1, or NaN where the loss is not finite: so its gradient is
                # not finite either, on every worker.
                factor = self._peers.count * (1 + 0 * total.detach())
                (total * (factor if scale is None else factor * scale)).backward()
            return {name: share.detach() for name, share in shares.items()}

        def undo() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            self._buffers.put_back()
            _set_random_state(random_state)

        shares = self._memory.run(batch, compute, undo)
        if self._peers.count > 1 and synced is None:
            average_gradients(self._trained, self._peers.count)
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm, good = clipped_step(self.optimizer, gradients, self._train.grad_clip_norm, scale)
        self._buffers.put_back_unless(good)
        self.ema.update_if(good, global_step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return Step(shares, norm, self._is_bad(good, shares))

    def _is_bad(self, good: torch.Tensor, shares: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.loss_scale is None:
            return ~good.bool()
        # Gradients do not tell a loss that is not finite from a scale that is too large.
        hopeless = ~torch.isfinite(torch.stack(list(shares.values()))).all() | self.loss_scale.exhausted
        bad = self._peers.sum_on_device((hopeless & ~good.bool()).float()) > 0
        self.loss_scale.update(good)
        return bad

    def evaluating(self) -> AbstractContextManager[Any]:
        """The precision that validation runs in."""
        return self._autocast()

    def trainer_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights; loads with weights_only=True."""
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state_dict()}
        return {"optimizer": self.optimizer.state_dict(), "best": self.best} | scale | _random_state()

    def is_best(self, value: float) -> bool:
        """Whether this is the best validation figure so far; remembers it."""
        better = value > self.best
        self.best = max(self.best, value)
        return better

    def _restore(self, resume: Checkpoint) -> None:
        self.ema.module.load_state_dict(resume.weights("ema"))
        state = resume.trainer_state()
        for group in state["optimizer"]["param_groups"]:
            group |= {"fused": True, "foreach": None}  # whatever the optimizer of the checkpoint was
        self.optimizer.load_state_dict(state["optimizer"])
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load_state_dict(state["loss_scale"])
        self.best = state["best"]
        _set_random_state(state)


class _Losses(nn.Module):
    """A task's losses as a forward pass, which is what DistributedDataParallel watches."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        return self.task.losses(self.model, batch)


def _parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Weights decay, biases and norms do not; with a layer decay below 1, timm's groups with an `lr_scale` each."""
    if layer_decay < 1:
        return timm.optim.param_groups_layer_decay(model, weight_decay=weight_decay, layer_decay=layer_decay)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},  # biases and norms
    ]


def _random_state() -> dict[str, Any]:
    state = {"torch_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch_rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
