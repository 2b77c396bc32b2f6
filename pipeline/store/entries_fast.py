"""Entries for reading at memory speed: the profile `fast`.

    token_ids   the ids, in their order by probability
    levels      the level of each entry

Rows decode one at a time, straight from the bytes of the file, without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..targets.sparse_targets import SparseTargets
from .arrays import Array, Rows
from .entries import EntryCounts, StoredEntries, words
from .entry_kernels import read_ids
from .levels import LOG_PROBS, MASSES, level_of


@dataclass(frozen=True)
class FastEntries:
    """Ids and levels as they are."""

    vocab_size: int

    def layout(self) -> dict[str, str]:
        return {"token_ids": "uint16" if self.vocab_size <= 2**16 else "uint32", "levels": "uint8"}

    def widths(self, entries: int, leveled: int) -> dict[str, int]:
        return {"token_ids": entries, "levels": leveled}

    def encode(
        self, targets: SparseTargets, contexts_N: Array, samples_have_levels: bool
    ) -> tuple[Rows, EntryCounts, Array | None]:
        token_ids_NK = targets.token_ids.flatten(0, 1).cpu().numpy()
        used_NK = token_ids_NK >= 0
        log_probs_E = targets.log_probs.flatten(0, 1).cpu().numpy()[used_NK].astype(np.float64)
        draws_E = None if targets.draws is None else targets.draws.flatten(0, 1).cpu().numpy()[used_NK]
        counts_N = used_NK.sum(-1)
        heads_N = counts_N if draws_E is None else targets.head_mask.flatten(0, 1).sum(-1).cpu().numpy()
        counts = EntryCounts(
            (targets.mask.shape[0], targets.mask.shape[1]),
            counts_N,
            heads_N,
            counts_N if samples_have_levels else heads_N,
        )
        reference_N, starts_N = np.zeros(len(counts_N)), np.cumsum(counts_N) - counts_N
        reference_N[heads_N > 0] = log_probs_E[starts_N[heads_N > 0]]
        levels_E = level_of(np.repeat(reference_N, counts_N) - log_probs_E)
        if not samples_have_levels and draws_E is not None:
            levels_E = levels_E[draws_E == 0]
        rows = {
            "token_ids": counts.by_row(token_ids_NK[used_NK], counts_N),
            "levels": counts.by_row(levels_E, counts.leveled_N),
        }
        return rows, counts, None if draws_E is None else draws_E[draws_E > 0]

    def decode(
        self, entries: StoredEntries, contexts_N: Array, log_head_N: Array, token_ids_NK: Array, log_probs_NK: Array
    ) -> None:
        ids = entries.views_of_rows("token_ids", entries.counts_N)
        levels = entries.views_of_rows("levels", entries.leveled_N)
        rows, length = entries.shape
        for row in range(rows):
            here = slice(row * length, (row + 1) * length)
            highest_id = read_ids(
                *words(ids[row]),
                levels[row],
                entries.counts_N[here],
                entries.heads_N[here],
                entries.leveled_N[here],
                log_head_N[here],
                LOG_PROBS,
                MASSES,
                token_ids_NK[here],
                log_probs_NK[here],
            )
            if highest_id >= self.vocab_size:
                raise ValueError("token ids outside the vocabulary")
