"""Distil students from a teacher that ran once.

    cache = LogitCache("runs/demo/cache")      rows and targets, written by `logit-cache cache`; a torch Dataset
    batch = cache.batch([3, 1, 2])             input_ids, labels, segment_ids, targets: SparseTargets
    row_logits(student, batch)                 logits of any model, each document of a packed row as if it were alone
    distillation_loss(logits, ...)             the loss, from a student's logits
    fused_distillation_loss(hidden, ...)       the same from hidden states, without all logits in memory
    DistillationTrainer(model, args, cache)    transformers' Trainer with that loss

Views of one or several caches, which go wherever a cache goes:

    Subset, ShorterRows, Mixture, Ensemble     fewer rows, shorter rows, caches in shares, the mean of several teachers
    ShardShuffle                               a sampler: the order for caches on an object store
    RowStream                                  an iterable dataset, shared out to ranks and DataLoader workers
    collate                                    rows -> batch, for DataLoader and Trainer

Each sub-package is one room; a module imports from its own room and from rooms further up this list:

    base        places, durable files, progress, processes, compiled kernels
    recipe      one TOML file per run: schema, loading, paths
    corpus      text -> packed rows
    models      teachers and students: loading, packed documents, output layer
    targets     full distribution -> sparse target
    store       sparse targets <-> bytes <-> torch Dataset
    capture     stage one: the teacher over the rows
    distill     stage two: losses and the trainer
    assess      evaluation, fidelity, audit, cost, report
    exchange, cluster, lab    formats in and out; Slurm; benchmarks, studies, known systems

Public names are imported on first use, so that `logit-cache --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distill.fused import fused_distillation_loss as fused_distillation_loss
    from .distill.loss import DistillationOutput as DistillationOutput
    from .distill.loss import distillation_loss as distillation_loss
    from .distill.trainer import DistillationTrainer as DistillationTrainer
    from .models.rows import model_inputs as model_inputs
    from .models.rows import row_logits as row_logits
    from .store.batch import collate as collate
    from .store.mixture import Ensemble as Ensemble
    from .store.mixture import Mixture as Mixture
    from .store.reader import LogitCache as LogitCache
    from .store.samplers import ShardShuffle as ShardShuffle
    from .store.stream import RowStream as RowStream
    from .store.views import ShorterRows as ShorterRows
    from .store.views import Subset as Subset
    from .targets.sparse_targets import SparseTargets as SparseTargets

_MODULES = {
    "DistillationOutput": "distill.loss",
    "DistillationTrainer": "distill.trainer",
    "Ensemble": "store.mixture",
    "LogitCache": "store.reader",
    "Mixture": "store.mixture",
    "RowStream": "store.stream",
    "ShardShuffle": "store.samplers",
    "ShorterRows": "store.views",
    "SparseTargets": "targets.sparse_targets",
    "Subset": "store.views",
    "collate": "store.batch",
    "distillation_loss": "distill.loss",
    "fused_distillation_loss": "distill.fused",
    "model_inputs": "models.rows",
    "row_logits": "models.rows",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
