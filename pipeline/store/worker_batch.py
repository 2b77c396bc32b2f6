"""Batches on their way from a loader's worker to the process that trains: all tensors in one block of shared memory.

torch hands over each storage by a file descriptor of its own, and the process that trains fetches one after the other,
0.4 ms each: for the tensors of a batch that is as long as their decoding takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64


class WorkerBatch(dict[str, Any]):
    """A batch that a worker sends: a dict that is pickled as one block, and arrives as a dict of ordinary tensors and
    targets."""

    def __reduce__(self) -> tuple[Any, ...]:
        parts: list[_Part] = []

        def part_of(tensor: Tensor) -> Any:
            parts.append(_Part(tensor, start=parts[-1].end if parts else 0))
            return parts[-1]

        batch = {
            name: part_of(value) if isinstance(value, Tensor) else value.map(part_of) for name, value in self.items()
        }
        block = torch.empty(parts[-1].end if parts else 0, dtype=torch.uint8)
        for part in parts:
            part.move_to(block)
        return dict, (batch,)

    __copy__ = dict.copy


@dataclass
class _Part:
    """Stands for a tensor in a pickle."""

    tensor: Tensor
    start: int
    block: Tensor | None = None
    """What all parts of a batch lie in; a pickle has it once."""

    @property
    def end(self) -> int:
        """Where the next part begins: a multiple of the alignment."""
        return self.start + -(-self.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    def move_to(self, block: Tensor) -> None:
        room = block[self.start : self.start + self.tensor.nbytes]
        room.view(self.tensor.dtype).view(self.tensor.shape).copy_(self.tensor)
        self.block = block

    def __reduce__(self) -> tuple[Any, ...]:
        return _tensor, (self.block, self.start, self.tensor.dtype, tuple(self.tensor.shape))


def _tensor(block: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A part of the block as a storage of its own: torch.save refuses one storage in several dtypes."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(block.numpy(), dtype=dtype, count=count, offset=start).view(shape)
