"""Device, TF32 and mixed precision, as the settings and the hardware allow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


def this_device(wanted: str = "auto") -> torch.device:
    """The device of a single process under the setting `train.device`: the first GPU unless there is none or `wanted`
    is cpu.
    """
    return torch.device("cuda", 0) if wanted != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def prefer_speed() -> None:
    """Enable TF32 and cuDNN's search for the fastest convolutions, for this process. No effect without a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Factory of autocast contexts for the setting `amp`; `auto` means bfloat16 if the hardware supports it."""
    enabled = amp in ("bfloat16", "float16") or (amp == "auto" and _native_bfloat16(device))
    dtype = torch.float16 if amp == "float16" else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype, enabled=enabled)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disables autocast: bfloat16 would round coordinates of 64 cells or more to halves, and give scores ties."""
    # The meta device, on which only shapes are computed, has no autocast of its own.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def at_least_single(values: torch.Tensor) -> torch.Tensor:
    """float32 from half precision; float32 and float64 unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def compute_in_single(layer: nn.Module) -> None:
    """Make `layer` compute in float32 at least, even under autocast. Its parameters and their names stay the same."""
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (_Single, kind), {"built_as": kind})


def as_built(model: nn.Module) -> nn.Module:
    """`model` with every layer of the class that it had before `compute_in_single`, for files that others read."""
    for layer in model.modules():
        layer.__class__ = getattr(layer, "built_as", type(layer))
    return model


class _Single:
    def forward(self, values: torch.Tensor) -> Any:
        with without_autocast(values.device):
            return super().forward(at_least_single(values))  # type: ignore[misc]


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Emulated on other CPUs, at a tenth of the speed of float32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
