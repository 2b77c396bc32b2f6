"""How many rows go through a teacher at once where the recipe leaves it open.

A GPU is fed by many tokens a pass: launching a pass's kernels takes the host as long for 30,000 tokens as for 300, and
products of a few hundred tokens leave most of the card idle. More than that gains nothing and takes memory. A CPU is
busy with a few rows.
"""

from __future__ import annotations

from typing import Literal

import torch

from .sizes import ModelSizes
from .teacher import Teacher

CPU_ROWS = 8
"""Also what a plan counts, for a GPU that is not here: on the GPU the rows follow its memory."""
GPU_TOKENS = 2**15
_CHUNK = 1024
"""Positions whose logits a GPU holds at once (`teacher.chunk_positions`)."""
_REDUCED_BYTES = 16
"""Of a position and token while logits are reduced: the logits themselves, and 14 in torch operations."""
_USED_SHARE = 0.5
"""Of the free memory: targets on their way to the encoding, fragmentation and other processes take some."""


def rows_per_pass(asked: int | Literal["auto"], teacher: Teacher, row_length: int) -> int:
    """The rows of one pass: what the recipe says, or as many as suit the teacher's device."""
    if asked != "auto":
        return asked
    device = teacher.placement.device
    if device.type != "cuda":
        return CPU_ROWS
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, and unused
    return fitting_rows(teacher, row_length, free + kept)


def fitting_rows(teacher: Teacher, row_length: int, free: int) -> int:
    """As many rows as `GPU_TOKENS` has, or as `free` bytes of a GPU hold; one at least."""
    sizes, dtype = ModelSizes.of(teacher.model.config), teacher.placement.dtype
    states = 8 * sizes.hidden_size + 3 * sizes.intermediate_size  # residual stream, attention, gate and product
    mask = row_length * (1 + dtype.itemsize)
    left = _USED_SHARE * free - _REDUCED_BYTES * _CHUNK * teacher.vocab_size
    tokens = min(left / (states * dtype.itemsize + mask), GPU_TOKENS)
    return max(int(tokens) // row_length, 1)
