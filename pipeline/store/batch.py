"""Batches: rows with their targets as one dict of tensors, and the ways between rows and batches."""

from __future__ import annotations

from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..corpus.labels import Columns, labels_of
from ..targets.sparse_targets import SparseTargets
from .worker_batch import WorkerBatch


class Batch(TypedDict):
    """Rows with their targets; a single row has no axis B. Signals have their names as further keys (`signals`)."""

    input_ids: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64: the token that targets[b, t] predicts; -100: none
    segment_ids: Tensor  # [B, L] int64: the document of each token, numbered in its row; -1: padding
    targets: SparseTargets  # [B, L]; the MeanTargets of an Ensemble where all teachers' tails have a shape


def text_batch(columns: Columns) -> dict[str, Any]:
    """The part of a `Batch` that follows from the columns [B, L] of its rows: everything but the targets."""
    input_ids, segment_ids = (torch.from_numpy(columns[name]).long() for name in ("input_ids", "segment_ids"))
    return {"input_ids": input_ids, "labels": torch.from_numpy(labels_of(columns)), "segment_ids": segment_ids}


def unbatch(batch: Batch) -> list[Batch]:
    """The rows of a batch; the inverse of `collate`."""
    return [map_batch(batch, lambda value, row=row: value[row]) for row in range(len(batch["labels"]))]


def map_batch(batch: Batch, function: Any) -> Batch:
    """Apply `function` to every value of a batch: tensors, and targets, which are indexed like tensors."""
    return cast(Batch, {name: function(value) for name, value in batch.items()})


def collate(rows: list[Batch]) -> Batch:
    """Stack rows of a cache into a batch: the `collate_fn` of a DataLoader, the `data_collator` of a Trainer.

    Raises ValueError for rows without targets.
    """
    if rows and "targets" not in rows[0]:
        raise ValueError(
            "the rows have no 'targets': Trainer drops columns that the model does not name unless its arguments say "
            "remove_unused_columns=False"
        )
    parts = {name: [cast(dict[str, Any], row)[name] for row in rows] for name in rows[0]}
    batch = {name: _stack(values) for name, values in parts.items()}
    return cast(Batch, batch if get_worker_info() is None else WorkerBatch(batch))


def _stack(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else type(values[0]).stack(values)
