"""The product of the output layer, which every chunk of positions needs: hidden states times a whole vocabulary.

Shape suffixes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 512
"""So many rows of the weights at once. Of 512 positions and 49,152 tokens in float32 the whole product takes a CPU 1.25 times as long
for D = 576, 1.4 times for D = 2048: what a library packs of that many columns no longer fits its caches. The bits are the same."""


def project(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """hidden [N, D], weight [V, D], bias [V] -> logits [N, V], written to `out`, all of one dtype. Without gradients."""
    size = len(weight_VD)
    width = _BLOCK if out_NV.device.type == "cpu" else max(size, 1)
    for start in range(0, size, width):
        block = slice(start, min(start + width, size))
        if bias_V is None:
            torch.mm(hidden_ND, weight_VD[block].T, out=out_NV[:, block])
        else:
            torch.addmm(bias_V[block], hidden_ND, weight_VD[block].T, out=out_NV[:, block])
    return out_NV
