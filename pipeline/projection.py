"""The product of the output layer, which every chunk of positions needs: hidden states times a whole vocabulary.

Shape suffixes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = {torch.float32: 512, torch.float64: 512}
"""So many rows of the weights at once. Of 512 positions and 49,152 tokens in float32 the whole product takes a CPU without AMX
1.25 times as long for D = 576, 1.4 times for D = 2048: what a library packs of that many columns no longer fits its caches.
In bfloat16, with AMX, it is blocks that take twice as long. The bits are the same."""


def project(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """hidden [N, D], weight [V, D], bias [V] -> logits [N, V], written to `out`, all of one dtype. Without gradients."""
    size = len(weight_VD)
    width = _BLOCK.get(out_NV.dtype, size) if out_NV.device.type == "cpu" else size
    for start in range(0, size, max(width, 1)):
        block = slice(start, min(start + width, size))
        if bias_V is None:
            torch.mm(hidden_ND, weight_VD[block].T, out=out_NV[:, block])
        else:
            torch.addmm(bias_V[block], hidden_ND, weight_VD[block].T, out=out_NV[:, block])
    return out_NV
