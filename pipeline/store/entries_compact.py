"""Entries in the fewest bytes: the profile `compact`.

    codes        codes of a codebook, ascending within a band and differenced
    top_steps    levels of the first 8 entries of a position, differenced along rank
    rest_steps   the same of the other entries, whose differences are mostly 0

Entries of one level form a *band*. Their order carries no information, so they are sorted by code: log2(n!) bits less
for a band of n, 12 bytes of 76 at k = 64. The first entry of a head is a band of its own: the first choice stays.

Shapes: N positions, F positions with an entry, E entries end to end, K kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..targets.sparse_targets import SparseTargets
from .arrays import Array, Rows
from .band_kernel import write_bands
from .codebook import Codebook
from .entries import EntryCounts, StoredEntries, words
from .entry_kernels import read_bands, scale_levels
from .levels import BOUNDS, LAST_LEVEL, LOG_PROBS, MASSES, TOP_ENTRIES


@dataclass(frozen=True)
class CompactEntries:
    """Bands of codes and steps of levels."""

    vocab_size: int
    codebook: Codebook | None
    """None: a code is the token's id."""

    def layout(self) -> dict[str, str]:
        limit = self.vocab_size if self.codebook is None else self.codebook.code_limit
        return {"codes": "uint16" if limit <= 2**16 else "uint32", "top_steps": "uint16", "rest_steps": "uint16"}

    def widths(self, entries: int, leveled: int) -> dict[str, int]:
        top = min(leveled, TOP_ENTRIES)
        return {"codes": entries, "top_steps": top, "rest_steps": leveled - top}

    def encode(
        self, targets: SparseTargets, contexts_N: Array, samples_have_levels: bool
    ) -> tuple[Rows, EntryCounts, Array | None]:
        token_ids_NK = np.ascontiguousarray(targets.token_ids.flatten(0, 1).cpu().numpy(), np.int64)
        log_probs_NK = np.ascontiguousarray(targets.log_probs.flatten(0, 1).cpu().numpy(), np.float32)
        draws_NK = np.empty((len(token_ids_NK), 0), np.int64)
        if targets.draws is not None:
            draws_NK = np.ascontiguousarray(targets.draws.flatten(0, 1).cpu().numpy(), np.int64)
        # Contexts of positions without entries may be any number.
        contexts_N = np.where(targets.mask.flatten().cpu().numpy(), contexts_N, 0).astype(np.int64)
        for ids in (contexts_N, token_ids_NK):
            if int(ids.max(initial=0)) >= self.vocab_size or int(contexts_N.min(initial=0)) < 0:
                raise ValueError("tokens outside the vocabulary")
        codes_E, draws_E = np.empty(token_ids_NK.size, np.int32), np.empty(draws_NK.size, np.uint16)
        top_steps_E, rest_steps_E = np.empty(token_ids_NK.size, np.uint16), np.empty(token_ids_NK.size, np.uint16)
        counts_3N = np.empty((3, len(token_ids_NK)), np.int64)
        book = self._book
        write_bands(
            token_ids_NK,
            log_probs_NK,
            draws_NK,
            samples_have_levels,
            contexts_N,
            book.rank,
            book.start,
            book.length,
            book.table,
            BOUNDS,
            codes_E,
            top_steps_E,
            rest_steps_E,
            draws_E,
            counts_3N,
        )
        counts = EntryCounts((targets.mask.shape[0], targets.mask.shape[1]), *counts_3N)
        top_N = np.minimum(counts.leveled_N, TOP_ENTRIES)
        rows = {
            "codes": counts.by_row(codes_E, counts.counts_N),
            "top_steps": counts.by_row(top_steps_E, top_N),
            "rest_steps": counts.by_row(rest_steps_E, counts.leveled_N - top_N),
        }
        return rows, counts, None if targets.draws is None else draws_E

    def decode(
        self, entries: StoredEntries, contexts_N: Array, log_head_N: Array, token_ids_NK: Array, log_probs_NK: Array
    ) -> None:
        # Contexts of positions without entries may be any number.
        contexts_N = np.where(entries.counts_N > 0, contexts_N, 0)
        if int(contexts_N.min(initial=0)) < 0 or int(contexts_N.max(initial=0)) >= self.vocab_size:
            raise ValueError("tokens outside the vocabulary")
        book, top_N = self._book, np.minimum(entries.leveled_N, TOP_ENTRIES)
        levels_E = np.empty(int(entries.leveled_N.sum()), np.uint8)
        highest_place, highest_level = read_bands(
            *words(entries.of_positions("codes", entries.counts_N)),
            entries.of_positions("top_steps", top_N),
            entries.of_positions("rest_steps", entries.leveled_N - top_N),
            entries.counts_N,
            entries.heads_N,
            entries.leveled_N,
            contexts_N.astype(np.int32),
            book.start,
            book.length,
            book.table,
            token_ids_NK,
            levels_E,
        )
        if highest_place >= len(book.table) or highest_level > LAST_LEVEL:
            raise ValueError("levels or codes outside the scale")
        scale_levels(levels_E, entries.heads_N, entries.leveled_N, log_head_N, LOG_PROBS, MASSES, log_probs_NK)

    @cached_property
    def _book(self) -> Codebook:
        return self.codebook or Codebook(self.vocab_size, *(np.empty(0, np.int64) for _ in range(4)))
