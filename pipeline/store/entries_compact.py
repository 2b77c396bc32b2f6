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

from .arrays import Array, Rows
from .codebook import Codebook
from .entries import Entries, StoredEntries, words
from .entry_kernels import read_bands, scale_levels
from .levels import LAST_LEVEL, LOG_PROBS, MASSES, TOP_ENTRIES

_CODE_BITS = 24


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

    def encode(self, entries: Entries, contexts_N: Array) -> tuple[Rows, Array | None]:
        filled_N = entries.counts_N > 0
        counts_F, heads_F = entries.counts_N[filled_N], entries.heads_N[filled_N]
        starts_F = np.cumsum(counts_F) - counts_F
        steps_E = np.diff(entries.levels_E, prepend=0)
        steps_E[starts_F] = entries.levels_E[starts_F]
        if entries.has_level_E is not None:
            steps_E[~entries.has_level_E] = 0
        begins_E = _band_begins(steps_E, starts_F, counts_F, heads_F)
        codes_E, draws_E = entries.ids_E, entries.draws_E
        if self.codebook is not None:
            codes_E = self.codebook.encode(codes_E, contexts_N[filled_N], counts_F)
        key_E = (np.cumsum(begins_E) << _CODE_BITS) + codes_E
        if draws_E is None:
            codes_E = np.sort(key_E) & (2**_CODE_BITS - 1)
        else:
            order_E = np.argsort(key_E)
            codes_E, draws_E = codes_E[order_E], draws_E[order_E]
        in_top = entries.leveled(entries.rank_E) < TOP_ENTRIES
        steps = entries.leveled(steps_E)
        top_N = np.minimum(entries.leveled_N, TOP_ENTRIES)
        arrays = {
            "codes": entries.by_row(np.where(begins_E, codes_E, np.diff(codes_E, prepend=0)), entries.counts_N),
            "top_steps": entries.by_row(steps[in_top], top_N),
            "rest_steps": entries.by_row(steps[~in_top], entries.leveled_N - top_N),
        }
        return arrays, draws_E

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


def _band_begins(steps_E: Array, starts_F: Array, counts_F: Array, heads_F: Array) -> Array:
    """[E] bool: the first entry of a level, of a position, of its samples, and the second entry of its head."""
    begins_E: Array = steps_E > 0
    begins_E[starts_F] = True
    begins_E[starts_F[(counts_F > 1) & (heads_F > 0)] + 1] = True
    mixed_F = counts_F > heads_F
    begins_E[(starts_F + heads_F)[mixed_F]] = True
    return begins_E
