"""What is predicted at each position of a packed row: labels, and the positions that carry a target."""

from __future__ import annotations

from typing import Any

import numpy as np

IGNORE = -100
"""Label of a position without a prediction; torch's cross-entropy ignores it."""
PADDING = -1
"""Segment id of padding, which belongs to no document."""

IntArray = np.ndarray[Any, np.dtype[np.int32]]
Columns = dict[str, IntArray]
"""Columns [B, L] of rows by name: `input_ids`, `segment_ids`, and `LOSS_MASK` or `LABELS` where the corpus has them."""
LOSS_MASK = "loss_mask"
LABELS = "labels"
COLUMNS = (
    ["input_ids", "segment_ids"],
    ["input_ids", "segment_ids", LOSS_MASK],
    ["input_ids", "segment_ids", LABELS],
)
"""The columns that a corpus may have, in their order."""


def next_token_labels(
    input_ids: IntArray, segment_ids: IntArray, loss_mask: IntArray | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """labels[..., t] = the token after t in the same document, -100 at row ends and document ends.

    input_ids, segment_ids and `loss_mask` are [..., L]; where the loss mask of the next token is 0, the label is -100
    too.
    """
    labels = np.full(input_ids.shape, IGNORE, np.int64)
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
    if loss_mask is not None:
        same &= loss_mask[..., 1:] != 0
    labels[..., :-1] = np.where(same, input_ids[..., 1:], IGNORE)
    return labels


def labels_of(columns: Columns) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The labels [B, L] of rows, -100 where nothing is predicted.

    Causal rows: the next token of the same document, unless the loss mask excludes it. Masked rows: the hidden token.
    """
    if LABELS in columns:
        return columns[LABELS].astype(np.int64)
    return next_token_labels(columns["input_ids"], columns["segment_ids"], columns.get(LOSS_MASK))


def row_bytes(columns: Columns) -> bytes:
    """Rows as bytes, what their digests and checksums are taken of: one row after another, each its columns as
    int32."""
    return np.stack(list(columns.values()), 1).astype("<i4", copy=False).tobytes()


def target_mask(labels: Any, segment_ids: Any, targets_on: str | None) -> Any:
    """Bool mask of the positions that carry a target, for arrays as for tensors [..., L].

    Causal rows (None) have targets at labels. Masked rows have them at every token that is not padding ("real") or at
    the hidden tokens ("masked"), which are those with a label.
    """
    return segment_ids != PADDING if targets_on == "real" else labels != IGNORE
