"""Entries of a target in the two forms between which a profile converts: unrounded, and stored.

All entries of a row stand end to end, position after position, head before samples. Three arrays are common to the
profiles:

    head_counts, sample_counts   entries of each position, where the support varies
    draws                        the count of each sample

Samples need levels for temperatures other than 1, where each has a weight of its own probability. A cache whose only
knot is 1 stores none: its samples are one band, and `threshold` takes 17 bytes instead of 26.

Each form, `CompactEntries` and `FastEntries`, has four methods:

    layout    name -> dtype of its arrays
    widths    name -> values of a position that has `entries` entries, `leveled` of them with a level
    encode    targets [B, L], and the token at each position [N] -> rows of its arrays, the counts, and the draws of
              samples as they are stored, None for supports without samples
    decode    writes ids, -1 where unused, and log-probabilities, -inf where unused, whose sum over a head is `log_head_N`;
              raises ValueError for numbers that no encoder writes

Shapes: B rows, L positions, N = B L, K kept entries, E entries of all positions end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..targets.supports import Support
from .arrays import Array, Rows, RowShape, StoredRows, check_length, joined
from .entry_kernels import spread


@dataclass(frozen=True)
class EntryCounts:
    """How many entries each position of B rows has, which stand end to end."""

    shape: tuple[int, int]
    counts_N: Array
    heads_N: Array
    """Head entries; the others are samples."""
    leveled_N: Array
    """Entries with a level."""

    def by_row(self, values: Array, counts_N: Array) -> list[Array]:
        """Values end to end, `counts_N` of each position -> those of each row."""
        ends_B = np.cumsum(counts_N.reshape(self.shape).sum(-1))
        return np.split(values[: int(ends_B[-1])], ends_B[:-1])

    def rows(self, support: Support, draws_E: Array | None) -> Rows:
        """The arrays of `counts_layout`; `draws_E` are those of all samples as they are stored."""
        arrays: Rows = {}
        if support.varies and support.has_head:
            arrays["head_counts"] = list(self.heads_N.reshape(self.shape))
        if draws_E is not None:
            samples_N = self.counts_N - self.heads_N
            arrays["sample_counts"] = list(samples_N.reshape(self.shape))
            arrays["draws"] = self.by_row(draws_E, samples_N)
        return arrays


def counts_layout(support: Support) -> dict[str, str]:
    """Name -> dtype of the arrays that are common to the profiles."""
    samples = {"sample_counts": "uint16", "draws": "uint16"} if support.has_samples else {}
    return ({"head_counts": "uint16"} if support.varies and support.has_head else {}) | samples


def counts_shapes(support: Support, row_length: int) -> dict[str, RowShape]:
    """Name -> shape of a row of these arrays."""
    return {name: None if name == "draws" else (row_length,) for name in counts_layout(support)}


@dataclass(frozen=True)
class StoredEntries:
    """The stored entries of B rows, and their number at each position."""

    rows: StoredRows
    dtypes: dict[str, str]
    shape: tuple[int, int]
    width: int
    """K, the largest number of entries of a position."""
    counts_N: Array
    heads_N: Array
    leveled_N: Array

    @classmethod
    def of(
        cls, rows: StoredRows, layout: dict[str, str], support: Support, mask: Array, samples_have_levels: bool
    ) -> StoredEntries:
        """`mask` [B, L] is True at positions with a target. Raises ValueError for counts that no encoder writes."""
        constant = 0 if support.varies else int(support.k or 0)
        counts_N = mask.reshape(-1) * np.int64(constant)
        entries = cls(rows, layout, mask.shape, constant, counts_N, counts_N, counts_N)
        if not support.varies:
            return entries
        if support.has_head:
            counts_N = counts_N + entries.fixed("head_counts")
        heads_N = counts_N
        if support.has_samples:
            counts_N = counts_N + entries.fixed("sample_counts")
        width = max(int(counts_N.max(initial=0)), 1)
        if width > 2 * support.entry_limit:  # before memory is allocated for them
            raise ValueError(f"{width} entries at a position, where the support keeps at most {support.entry_limit}")
        leveled_N = counts_N if samples_have_levels else heads_N
        return replace(entries, width=width, counts_N=counts_N, heads_N=heads_N, leveled_N=leveled_N)

    def fixed(self, name: str, values: int = 1) -> Array:
        """[N values] an array with `values` numbers per position. Raises ValueError where a row has another number."""
        lengths = [self.shape[1] * values] * self.shape[0]
        return joined(name, self.rows[name], self.dtypes[name], lengths, whole=True)

    def of_positions(self, name: str, counts_N: Array) -> Array:
        """[E] an array with `counts_N` numbers at each position. Raises ValueError where a row has fewer."""
        return joined(name, self.rows[name], self.dtypes[name], self._per_row(counts_N), whole=False)

    def views_of_rows(self, name: str, counts_N: Array) -> list[Array]:
        """The same of an uncompressed array, without a copy: a read-only view of each row."""
        views = []
        for stored, length in zip(self.rows[name], self._per_row(counts_N), strict=True):
            assert isinstance(stored, np.ndarray)  # arrays of this profile are not compressed
            check_length(name, len(stored), length)
            views.append(stored[:length])
            views[-1].flags.writeable = False
        return views

    def draws(self) -> Array:
        """[N, K] int64, the counts of samples, 0 elsewhere."""
        samples_N = self.counts_N - self.heads_N
        draws_NK = np.empty((len(samples_N), self.width), np.int64)
        spread(*words(self.of_positions("draws", samples_N)), self.heads_N, samples_N, 0, draws_NK)
        return draws_NK

    def _per_row(self, counts_N: Array) -> list[int]:
        sums: list[int] = counts_N.reshape(self.shape).sum(-1).tolist()
        return sums


def words(values: Array) -> tuple[Array, int]:
    """The uint16 words of stored values, and the number of words of each."""
    return values.view(np.uint16), values.itemsize // 2
