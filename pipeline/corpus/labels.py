"""What is predicted at each position of a packed row."""

from __future__ import annotations

from typing import Any

import numpy as np

IGNORE = -100
"""Label of a position at which nothing is predicted; the value that torch's cross-entropy ignores."""
PADDING = -1
"""Segment id of padding: it belongs to no document and nothing is learned from it."""

IntArray = np.ndarray[Any, np.dtype[np.int32]]


def next_token_labels(
    input_ids: IntArray, segment_ids: IntArray, loss_mask: IntArray | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """labels[..., t] = the token after t in the same document, -100 at row ends and document ends.

    With `loss_mask`, also -100 where the next token is not one to be learned (0).
    """
    labels = np.full(input_ids.shape, IGNORE, np.int64)
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
    if loss_mask is not None:
        same &= loss_mask[..., 1:] != 0
    labels[..., :-1] = np.where(same, input_ids[..., 1:], IGNORE)
    return labels
