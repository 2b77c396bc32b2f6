"""batch."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from ..targets.sparse_targets import SparseTargets

IndexArray = np.ndarray[Any, np.dtype[np.int64]]


class Batch(TypedDict):
    """Rows with their targets; one row has no batch axis B. Signals stand beside them under their names (`signals`)."""

    input_ids: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64: the token that targets[b, t] predicts, -100 where there is none
    segment_ids: Tensor  # [B, L] int64: which document of the row a token belongs to; -1: padding
    targets: SparseTargets  # [B, L]
    attention_mask: NotRequired[Tensor]  # [B, 1, L, L] bool, of masked rows: which tokens see each other


def split(batch: Batch) -> list[Batch]:
    """The rows of a batch, the inverse of `collate`."""
    return [each(batch, lambda value, row=row: value[row]) for row in range(len(batch["labels"]))]


def each(batch: Batch, function: Any) -> Batch:
    """A batch of what `function` makes of every part of this one: tensors, and targets, which are indexed like them."""
    return cast(Batch, {name: function(value) for name, value in batch.items()})


def collate(rows: list[Batch]) -> Batch:
    """Stack rows of a cache into a batch; the `collate_fn` for a DataLoader, the `data_collator` for a Trainer."""
    if rows and "targets" not in rows[0]:
        raise ValueError(
            "the rows have no 'targets': Trainer drops columns that the model does not name unless its arguments say "
            "remove_unused_columns=False"
        )
    parts = {name: [cast(dict[str, Any], row)[name] for row in rows] for name in rows[0]}
    return cast(
        Batch,
        {name: (SparseTargets if name == "targets" else torch).stack(values) for name, values in parts.items()},
    )
