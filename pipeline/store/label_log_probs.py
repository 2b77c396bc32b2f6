"""The teacher's log-probability of every label, and its loss on every row.

    label_levels   level of a label outside the entries, in nats below the tail's mass; 0 elsewhere
    teacher_loss   mean of -log p over the labels of a row that have a target, in nats, as the teacher gave them; 0
                   where there are none

Three labels of four are among the entries, which tell their log-probability: nothing is stored of them. The others are
at most as likely as the whole tail, also as decoded, so that the rest of the tail keeps a mass. On SmolLM2 (k = 16) a
position takes 0.35 bytes. `teacher_loss` is for those who choose rows: they decode nothing else.

Shapes: B rows, L positions, N = B L, K kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..base.kernels import compiled
from ..corpus.labels import IGNORE
from ..recipe.choices import Profile
from ..targets.sparse_targets import SparseTargets
from .arrays import Array, Arrays, RowLosses, RowShape, StoredRows, joined
from .levels import LAST_LEVEL, LOG_PROBS, level_of

LABEL_LEVELS, TEACHER_LOSS = "label_levels", "teacher_loss"


@dataclass(frozen=True)
class LabelCodec:
    """Encodes and decodes the log-probabilities of the labels of one cache."""

    profile: Profile

    def layout(self) -> dict[str, str]:
        """Name -> dtype of the stored arrays."""
        # PCodec has no bytes.
        return {LABEL_LEVELS: "uint8" if self.profile == "fast" else "uint16", TEACHER_LOSS: "float32"}

    def shapes(self, row_length: int) -> dict[str, RowShape]:
        """Name -> shape of a row of each of them."""
        return {LABEL_LEVELS: (row_length,), TEACHER_LOSS: (1,)}

    def encode(self, targets: SparseTargets, labels: Array, log_tail: Array, leveled: Array) -> Arrays:
        """Targets and labels [B, L] -> label_levels [B, L] and teacher_loss [B, 1].

        `log_tail` [B, L] is log p(R) as decoded, `leveled` [B, L] the number of entries with a log-probability of their
        own. Raises ValueError for targets without log-probabilities of labels.
        """
        if targets.label_log_probs is None:
            raise ValueError("targets of a cache with label_log_probs need those of their labels")
        exact = targets.label_log_probs.cpu().numpy().astype(np.float64)
        has_label = (labels != IGNORE) & targets.mask.cpu().numpy()
        ids_BLK = targets.token_ids.cpu().numpy()
        among = (ids_BLK == labels[..., None]) & (np.arange(ids_BLK.shape[-1]) < leveled[..., None])
        levels = level_of(np.where(has_label, _reference(log_tail) - exact, 0.0))
        sums, counts = np.where(has_label, -exact, 0.0).sum(-1), has_label.sum(-1)
        return {
            LABEL_LEVELS: np.where(among.any(-1), 0, levels),
            TEACHER_LOSS: (sums / np.maximum(counts, 1))[:, None],
        }

    def decode(
        self,
        levels_N: Array,
        labels_N: Array,
        log_tail_N: Array,
        token_ids_NK: Array,
        log_probs_NK: Array,
        leveled_N: Array,
    ) -> Array:
        """Stored levels and what else is decoded -> log p of each label [N] float32, 0 where `labels_N` is -100.

        Raises ValueError for levels that no encoder writes.
        """
        if int(levels_N.max(initial=0)) > LAST_LEVEL:
            raise ValueError("levels of labels outside the scale")
        log_probs_N = np.empty(len(labels_N), np.float32)
        read_labels(
            levels_N.astype(np.uint8, copy=False),
            labels_N,
            _reference(log_tail_N),
            token_ids_NK,
            log_probs_NK,
            leveled_N,
            LOG_PROBS,
            log_probs_N,
        )
        return log_probs_N


def leveled_counts(targets: SparseTargets, samples_have_levels: bool) -> Array:
    """[B, L] the number of entries of each position that have a log-probability of their own."""
    leveled = targets.token_ids >= 0 if samples_have_levels else targets.head_mask
    counts: Array = leveled.sum(-1).cpu().numpy()
    return counts


def teacher_losses(rows: StoredRows) -> RowLosses:
    """The stored teacher_loss. Raises ValueError where a row has no single number."""
    stored = rows[TEACHER_LOSS]
    return joined(TEACHER_LOSS, stored, "float32", [1] * len(stored), whole=True)


def _reference(log_tail: Array) -> Array:
    """What levels of labels are below. A tail whose mass is no float32 above 0 may still hold a label."""
    return np.where(np.isneginf(log_tail), 0.0, log_tail)


@compiled
def read_labels(
    levels_N: Array,
    labels_N: Array,
    reference_N: Array,
    token_ids_NK: Array,
    log_probs_NK: Array,
    leveled_N: Array,
    log_prob_by_level: Array,
    log_probs_N: Array,
) -> None:
    """That of the entry that is the label, among the first `leveled_N`, else a level below the reference."""
    for position in range(len(labels_N)):
        label, place, leveled = labels_N[position], 0, leveled_N[position]
        if label < 0:
            log_probs_N[position] = 0.0
            continue
        token_ids_K = token_ids_NK[position]
        while place < leveled and token_ids_K[place] != label:
            place += 1
        if place < leveled:
            log_probs_N[position] = log_probs_NK[position, place]
        else:
            log_probs_N[position] = reference_N[position] + log_prob_by_level[np.int64(levels_N[position])]
