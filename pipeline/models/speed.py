"""Speed of a model, for the result table."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from ..corpus.labels import Columns
from .output_layer import OutputLayer
from .placement import input_device
from .rows import body_hidden

CHUNK_POSITIONS = 256


@torch.inference_mode()
def forward_speed(model: Any, columns: Columns) -> float:
    """Tokens per second of body and output layer on up to four rows: the median of three passes after a warm-up."""
    device = input_device(model)
    names = "input_ids", "segment_ids"
    input_ids, segment_ids = (torch.from_numpy(columns[name][:4]).long().to(device) for name in names)
    output_layer = OutputLayer.of(model)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        hidden_ND = body_hidden(model, input_ids, segment_ids).flatten(0, 1)
        for start in range(0, len(hidden_ND), CHUNK_POSITIONS):
            output_layer.logits(hidden_ND[start : start + CHUNK_POSITIONS])
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return float(input_ids.numel() / statistics.median(seconds[1:]))
