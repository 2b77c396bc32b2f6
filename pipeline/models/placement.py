"""Device, dtype and attention kernel of a model: "auto" resolved, with the reason for each choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..base import processes
from ..base.errors import RecipeError


@dataclass(frozen=True)
class Placement:
    """Device, dtype and attention kernel of a model."""

    device: torch.device
    dtype: torch.dtype
    attention: str
    reason: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"device {self.device}, dtype {self.dtype_name}, attention {self.attention} ({self.reason})"


def choose_placement(device: str = "auto", dtype: str = "auto", attention: str = "auto") -> Placement:
    """Replace "auto" by what runs best on this machine; transformers chooses the attention kernel when it loads the
    model. A GPU becomes the current one of this process: whatever names none goes there.

    Raises RecipeError for a device that does not exist.
    """
    why = {name: f"{name} as the recipe says" for name in ("device", "dtype", "attention")}
    if device == "auto":
        found = torch.cuda.is_available()
        device = "cuda" if found else "cpu"
        if found and processes.launched():
            device = f"cuda:{processes.local_rank() % torch.cuda.device_count()}"
        why["device"] = f"{torch.cuda.get_device_name()} found" if found else "no CUDA device found"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"device {device!r}: write auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device {device!r}: no CUDA device is available here: use device = 'auto'")
    if chosen.index is not None and chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dtype == "auto":
        # torch counts emulation as support, which is slower than float32.
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if chosen.type == "cuda" else _cpu_has_bf16()
        dtype = "bfloat16" if fast else "float32"
        why["dtype"] = "bf16 arithmetic in hardware" if fast else "no bf16 arithmetic in hardware"
    if attention == "auto":
        why["attention"] = "attention as transformers chooses for the architecture, document boundaries checked"
    return Placement(chosen, getattr(torch, dtype), attention, "; ".join(why.values()))


def _cpu_has_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16 "))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on another device; a GPU copies it asynchronously from page-locked memory."""
    if device.type == "cuda" != tensor.device.type:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def input_device(model: Any) -> torch.device:
    """The device that a model reads token ids from, also if its layers are spread over devices or offloaded."""
    used = [place for place in getattr(model, "hf_device_map", {}).values() if place not in ("cpu", "disk")]
    if used:
        return torch.device(used[0])
    device: torch.device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def has_local_weights(model: Any) -> bool:
    """Whether every weight is a plain local tensor, neither sharded over processes nor offloaded."""
    return not any(isinstance(p, DTensor) or p.is_meta for p in model.parameters())
