"""What a task learns and remembers: model, moving average, optimizer, random state."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pillsnap.config import TrainSettings
from pillsnap.data.loader import DeviceBatch
from pillsnap.train.checkpoint import Checkpoint
from pillsnap.train.memory import MicroBatches
from pillsnap.train.peers import Peers, average_gradients, by_dtype, copy_from_first
from pillsnap.train.tasks import Task

_EMA_WARMUP_POWER = 0.75


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
        self.ema = ModelEmaV3(
            self.model,
            decay=train.ema_decay,
            use_warmup=True,
            warmup_gamma=train.ema_warmup_steps,
            warmup_power=_EMA_WARMUP_POWER,
        )
        self.ema.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, task.settings.weight_decay, getattr(task.settings, "layer_decay", 1.0)),
            lr=task.settings.lr,
            fused=device.type == "cuda",
        )
        self.best = float("-inf")
        self.notes: list[str] = []
        """What a user should know of how training was set up."""
        if train.compile == "on" or (train.compile == "auto" and device.type == "cuda"):
            problem = compile_problem(device)
            if problem is None:
                torch._dynamo.config.suppress_errors = (
                    True  # a part that cannot be compiled runs as it is, with a log line
                )
                self.model.compile(dynamic=False)
            else:
                self.notes.append(f"{task.name}: the model is not compiled, steps take longer: {problem}.")
        self._buffers = _Buffers(self.model)
        self._losses = _Losses(task, self.model)
        self._synced: DistributedDataParallel | None = None
        if peers.count > 1:
            self._synced = DistributedDataParallel(self._losses, device_ids=[device] if device.type == "cuda" else None)
        self._autocast = autocast(train.amp, device)
        if resume is not None:
            self._restore(resume)

    def step(
        self, batch: DeviceBatch, lr: float, samples_in_step: int, global_step: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One optimizer step. Returns this worker's share of the mean losses, and the gradient's norm before clipping.

        A loss or gradient that is not finite changes nothing.
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

        def compute(part: DeviceBatch, last: bool) -> dict[str, torch.Tensor]:
            with nullcontext() if synced is None or last else synced.no_sync():
                with self._autocast():
                    losses = (synced or self._losses)(part)
                shares = {name: loss / samples_in_step for name, loss in losses.items()}
                total = torch.stack(list(shares.values())).sum()
                # DistributedDataParallel averages over workers; times their number, the gradient is that of the mean
                # over all samples. The second factor is 1, or NaN where the loss is not finite: so its gradient is
                # not finite either, on every worker.
                (total * self._peers.count * (1 + 0 * total.detach())).backward()
            return {name: share.detach() for name, share in shares.items()}

        def undo() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            self._buffers.put_back()
            _set_random_state(random_state)

        shares = self._memory.run(batch, compute, undo)
        if self._peers.count > 1 and synced is None:
            average_gradients(self.model.parameters(), self._peers.count)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._train.grad_clip_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.ema.update(self.model, global_step + 1)
        else:
            self._buffers.put_back()  # the running statistics have seen what the weights must not
        self.optimizer.zero_grad(set_to_none=True)
        return shares, norm.detach()

    def evaluating(self) -> AbstractContextManager[Any]:
        """The precision that validation runs in."""
        return self._autocast()

    def trainer_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights; loads with weights_only=True."""
        return {"optimizer": self.optimizer.state_dict(), "best": self.best} | _random_state()

    def is_best(self, value: float) -> bool:
        """Whether this is the best validation figure so far; remembers it."""
        better = value > self.best
        self.best = max(self.best, value)
        return better

    def _restore(self, resume: Checkpoint) -> None:
        self.ema.module.load_state_dict(resume.weights("ema"))
        state = resume.trainer_state()
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state["best"]
        _set_random_state(state)


class _Buffers:
    """A model's running statistics, and what they were before the step."""

    def __init__(self, model: nn.Module) -> None:
        self._live = by_dtype([buffer for buffer in model.buffers() if buffer.numel()])
        self._kept = [[buffer.clone() for buffer in same] for same in self._live]

    def keep(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            torch._foreach_copy_(kept, live)

    def put_back(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            torch._foreach_copy_(live, kept)

    def copy_from_first(self) -> None:
        for live in self._live:
            copy_from_first(live)


class _Losses(nn.Module):
    """A task's losses as a forward pass, which is what DistributedDataParallel watches."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        return self.task.losses(self.model, batch)


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work here (no compiler, no Triton), in one line; None when it does."""
    try:
        torch.compile(lambda values: values * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # dynamo, inductor and the compilers behind them raise whatever they do
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Mixed precision in bfloat16, where asked for or, with `auto`, where the hardware computes it."""
    enabled = amp == "bfloat16" or (amp == "auto" and _native_bfloat16(device))
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # A CPU without the instructions emulates them, at a tenth of the speed of single precision.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Weights decay, biases and norms do not; with a layer decay below 1, timm's groups with an `lr_scale` each."""
    if layer_decay < 1:
        return param_groups_layer_decay(model, weight_decay=weight_decay, layer_decay=layer_decay)
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
