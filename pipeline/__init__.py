"""Distil students from a teacher that ran once.

    cache = LogitCache("runs/demo/cache")      rows and targets, written by `logit-cache cache`; a torch Dataset
    batch = cache.batch([3, 1, 2])             input_ids, labels, segment_ids, targets: SparseTargets
    student(**model_inputs(batch)).logits      attention stays inside each document of a packed row
    distillation_loss(logits, ...)             the loss, from a student's logits
    fused_distillation_loss(hidden, head, ...) the same without holding the logits
    DistillationTrainer(model, args, cache)    transformers' Trainer with that loss

Views of one or several caches, which go wherever a cache goes:

    Subset, ShorterRows, Mixture, Ensemble     fewer rows, shorter rows, caches in shares, the mean of several teachers
    RowStream                                  an iterable dataset, shared out to ranks and DataLoader workers
    collate                                    rows -> batch, for DataLoader and Trainer

The modules, in the order in which data flows through them: `config` (recipes), `corpus` (text -> rows, from `documents` to
`rows`), `teacher`, `targets` (distribution -> sparse target), `codec` and `shards` (target -> bytes), `manifest` and `commit`
(what a cache consists of, and how it comes to), `capture` (stage one), `cache` and `views` (reading it), `losses` and
`divergences`, `training` (stage two), `evaluation`, `compare`, `report`; `exchange` exports and imports, `cost` estimates,
`bench` and `scale` measure. Every error that a user can mend is in `errors`, with its exit code.

Names are imported on first use, so that `logit-cache --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cache import LogitCache, collate
    from pipeline.losses import DistillationOutput, distillation_loss, fused_distillation_loss
    from pipeline.models import model_inputs
    from pipeline.targets import SparseTargets
    from pipeline.training import DistillationTrainer
    from pipeline.views import Ensemble, Mixture, RowStream, ShorterRows, Subset

__all__ = [
    "DistillationOutput",
    "DistillationTrainer",
    "Ensemble",
    "LogitCache",
    "Mixture",
    "RowStream",
    "ShorterRows",
    "SparseTargets",
    "Subset",
    "collate",
    "distillation_loss",
    "fused_distillation_loss",
    "model_inputs",
]

_HOME = {
    "DistillationOutput": "losses",
    "DistillationTrainer": "training",
    "Ensemble": "views",
    "LogitCache": "cache",
    "Mixture": "views",
    "RowStream": "views",
    "ShorterRows": "views",
    "SparseTargets": "targets",
    "Subset": "views",
    "collate": "cache",
    "distillation_loss": "losses",
    "fused_distillation_loss": "losses",
    "model_inputs": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(f"pipeline.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
