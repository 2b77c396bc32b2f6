"""Distil students from a teacher that ran once.

    cache = LogitCache("runs/demo/cache")      rows and targets, written by `logit-cache cache`
    batch = cache.batch([3, 1, 2])             input_ids, labels, segment_ids, targets: SparseTargets
    distillation_loss(logits, ...)             the loss, from a student's logits
    fused_distillation_loss(hidden, head, ...) the same without holding the logits
    DistillationTrainer(model, args, cache)    transformers' Trainer with that loss

Names are imported on first use, so that `logit-cache --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cache import LogitCache, collate
    from pipeline.losses import DistillationOutput, distillation_loss, fused_distillation_loss
    from pipeline.targets import SparseTargets
    from pipeline.training import DistillationTrainer

__all__ = [
    "DistillationOutput",
    "DistillationTrainer",
    "LogitCache",
    "SparseTargets",
    "collate",
    "distillation_loss",
    "fused_distillation_loss",
]

_HOME = {
    "DistillationOutput": "losses",
    "DistillationTrainer": "training",
    "LogitCache": "cache",
    "SparseTargets": "targets",
    "collate": "cache",
    "distillation_loss": "losses",
    "fused_distillation_loss": "losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(f"pipeline.{_HOME[name]}"), name)
