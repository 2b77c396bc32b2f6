"""Several tensors with the same leading axes, one entry for each position, that are indexed and moved like one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self, cast

import torch
from torch import Tensor


class Positions:
    """The base of dataclasses whose tensors have the leading axes of `mask`; other fields hold for all positions."""

    mask: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply `function` to every tensor."""
        own: Any = self
        parts = {field.name: getattr(own, field.name) for field in fields(own)}
        changed = {name: function(part) for name, part in parts.items() if isinstance(part, Tensor)}
        return cast(Self, replace(own, **changed))

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: Any) -> Self:
        """Index the leading axes, as in a tensor."""
        return self.map(lambda tensor: tensor[index])

    def flatten(self) -> Self:
        """Merge all leading axes into one."""
        lead = self.mask.dim()
        return self.map(lambda tensor: tensor.flatten(0, lead - 1) if lead > 1 else tensor)

    def unflatten(self, shape: tuple[int, ...]) -> Self:
        """Split the first axis into several."""
        return self.map(lambda tensor: tensor.reshape(*shape, *tensor.shape[1:]))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Page-locked copies; DataLoader calls this with pin_memory=True."""
        return self.map(lambda tensor: tensor.pin_memory())
