"""Entries for reading at memory speed: the profile `fast`.

    token_ids   the ids, in their order by probability
    levels      the level of each entry

Rows decode one at a time, straight from the bytes of the file, without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from .arrays import Array, Rows
from .entries import Entries, StoredEntries, words
from .entry_kernels import read_ids
from .levels import LOG_PROBS, MASSES


@dataclass(frozen=True)
class FastEntries:
    """Ids and levels as they are."""

    vocab_size: int

    def layout(self) -> dict[str, str]:
        return {"token_ids": "uint16" if self.vocab_size <= 2**16 else "uint32", "levels": "uint8"}

    def widths(self, entries: int, leveled: int) -> dict[str, int]:
        return {"token_ids": entries, "levels": leveled}

    def encode(self, entries: Entries, contexts_N: Array) -> tuple[Rows, Array | None]:
        arrays = {
            "token_ids": entries.by_row(entries.ids_E, entries.counts_N),
            "levels": entries.by_row(entries.leveled(entries.levels_E), entries.leveled_N),
        }
        return arrays, entries.draws_E

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
