"""TODO docstring."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from pillsnap.config import TrainSettings


def prefer_speed() -> None:
    """Let a GPU compute in TF32, and find the fastest convolutions by trying. It does nothing without one."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def wants_compiling(train: TrainSettings, device: torch.device) -> bool:
    """Whether models are compiled if that works here; with `auto`, on a GPU."""
    return train.compile == "on" or (train.compile == "auto" and device.type == "cuda")


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work here (no compiler, no Triton), in one line; None when it does."""
    try:
        torch.compile(lambda values: values * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # dynamo, inductor and the compilers behind them raise whatever they do
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Mixed precision as asked for; with `auto`, bfloat16 where the hardware computes it."""
    enabled = amp in ("bfloat16", "float16") or (amp == "auto" and _native_bfloat16(device))
    dtype = torch.float16 if amp == "float16" else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype, enabled=enabled)


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # A CPU without the instructions emulates them, at a tenth of the speed of single precision.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
