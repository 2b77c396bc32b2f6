"""The compiled loops against their definitions, entry by entry, and against numbers that no encoder writes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.store.codebook import Codebook
from logit_cache.store.entry_kernels import curve_of_steps, read_bands, read_ids, scale_levels, spread
from logit_cache.store.levels import MASS_UNIT, TOP_ENTRIES

VOCAB = 60


def some_counts(rng: np.random.Generator, positions: int, most: int) -> tuple[np.ndarray, ...]:
    """Entries, those of the head and those with a level of each position; some have none."""
    counts = rng.integers(0, most + 1, positions)
    heads = rng.integers(0, counts + 1)
    return counts, heads, counts if rng.random() < 0.5 else heads


def some_book(rng: np.random.Generator) -> Codebook:
    ids = rng.integers(0, VOCAB, (200, 6)) // 3
    return Codebook.learn(ids, rng.integers(0, 8, 200), VOCAB, uses=100.0)


def bands_by_definition(
    book: Codebook,
    stored: list[int],
    top: list[int],
    rest: list[int],
    contexts: np.ndarray,
    counts: np.ndarray,
    heads: np.ndarray,
    leveled: np.ndarray,
    width: int,
) -> tuple[np.ndarray, list[int]]:
    """Ids and levels as the codec's docstring has them."""
    ids, levels = np.full((len(counts), width), -1), []
    stored, top, rest = list(stored), list(top), list(rest)
    for position, count in enumerate(counts):
        level = code = 0
        for rank in range(count):
            step = 0
            if rank < leveled[position]:
                step = (top if rank < TOP_ENTRIES else rest).pop(0)
                level += step
                levels.append(level)
            begins = step > 0 or rank == 0 or rank == heads[position] or (rank == 1 and heads[position] > 0)
            code = stored.pop(0) + (0 if begins else code)
            length = int(book.length[contexts[position]])
            inside = code < length
            place = book.start[contexts[position]] + code if inside else len(book.entries) + code - length
            ids[position, rank] = book.table[place]
    assert not stored and not top and not rest
    return ids, levels


@given(seed=st.integers(0, 2**31), words=st.sampled_from([1, 2]))
@settings(max_examples=80, deadline=None)
def test_bands_are_read_as_defined(seed: int, words: int) -> None:
    rng = np.random.default_rng(seed)
    positions, most = int(rng.integers(1, 12)), int(rng.integers(1, 30))
    counts, heads, leveled = some_counts(rng, positions, most)
    book, contexts = some_book(rng), rng.integers(0, 10, positions).astype(np.int32)
    # Whatever the sums along a band come to, codes stay below the vocabulary.
    stored = rng.integers(0, max(VOCAB // most, 1), counts.sum()).astype(np.uint16 if words == 1 else np.uint32)
    in_top = np.minimum(leveled, TOP_ENTRIES)
    top, rest = (
        (rng.integers(0, 9, size) * (rng.random(size) < 0.4)).astype(np.uint16)
        for size in (in_top.sum(), (leveled - in_top).sum())
    )
    ids, levels = np.empty((positions, most), np.int64), np.empty(leveled.sum(), np.uint8)
    highest_place, highest_level = read_bands(
        stored.view(np.uint16), words, top, rest, counts, heads, leveled, contexts,
        book.start, book.length, book.table, ids, levels,
    )  # fmt: skip
    wanted_ids, wanted_levels = bands_by_definition(
        book, stored.tolist(), top.tolist(), rest.tolist(), contexts, counts, heads, leveled, most
    )
    assert np.array_equal(ids, wanted_ids)
    assert highest_place < len(book.table)
    assert highest_level == max(wanted_levels, default=0)
    assert levels.tolist() == wanted_levels


@pytest.mark.parametrize("words", [1, 2])
def test_codes_beyond_the_table_and_levels_beyond_the_scale_are_told(words: int) -> None:
    """Also such that a sum of them would wrap around to a small number."""
    rng = np.random.default_rng(0)
    book = some_book(rng)
    counts = np.full(3, 20)
    start = (book.start, book.length, book.table)
    for largest in (np.iinfo(np.uint16 if words == 1 else np.uint32).max, 2**15, 2**16 - 1):
        stored = np.full(60, largest, np.uint16 if words == 1 else np.uint32)
        steps = np.zeros(60, np.uint16)
        ids, levels = np.empty((3, 20), np.int64), np.empty(60, np.uint8)
        contexts = np.zeros(3, np.int32)
        split = 3 * TOP_ENTRIES
        place, _ = read_bands(
            stored.view(np.uint16), words, steps[:split], steps[split:], counts, counts, counts, contexts, *start, ids, levels
        )  # fmt: skip
        assert place >= len(book.table)
        assert ids.min() >= 0 and ids.max() < VOCAB
        steps[:] = min(int(largest), 2**16 - 1)
        _, level = read_bands(
            np.zeros(60 * words, np.uint16), words, steps[:split], steps[split:], counts, counts, counts, contexts, *start,
            ids, levels,
        )  # fmt: skip
        assert level > 255


@given(seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_levels_are_scaled_to_the_heads_mass(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions, most = int(rng.integers(1, 12)), int(rng.integers(1, 30))
    _, heads, leveled = some_counts(rng, positions, most)
    levels = rng.integers(0, 200, leveled.sum()).astype(np.uint8)
    log_head = -3 * rng.random(positions)
    by_level = -0.05 * np.arange(256)
    masses = np.rint(np.exp(by_level) / MASS_UNIT).astype(np.int64)
    found = np.empty((positions, most), np.float32)
    scale_levels(levels, heads, leveled, log_head, by_level.astype(np.float32), masses, found)
    entry = 0
    for position in range(positions):
        own = by_level[levels[entry : entry + leveled[position]]]
        entry += leveled[position]
        head = own[: heads[position]]
        offset = log_head[position] - math.log(np.exp(head).sum()) if len(head) else 0.0
        # Values up to 13, rounded to float32 thrice; the masses' own rounding is far below.
        np.testing.assert_allclose(found[position, : leveled[position]], own + offset, atol=3 * 2.0**-20)
        assert np.isneginf(found[position, leveled[position] :]).all()


@given(seed=st.integers(0, 2**31), words=st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_values_are_spread_to_their_ranks(seed: int, words: int) -> None:
    rng = np.random.default_rng(seed)
    positions = int(rng.integers(1, 9))
    firsts, counts = rng.integers(0, 4, positions), rng.integers(0, 5, positions)
    dtype = np.uint16 if words == 1 else np.uint32
    values = rng.integers(0, np.iinfo(dtype).max, counts.sum(), dtype, endpoint=True)
    out = np.empty((positions, 9), np.int64)
    spread(values.view(np.uint16), words, firsts, counts, -7, out)
    left = values.tolist()
    for position in range(positions):
        wanted = [-7] * 9
        for rank in range(firsts[position], firsts[position] + counts[position]):
            wanted[rank] = left.pop(0)
        assert out[position].tolist() == wanted


@given(seed=st.integers(0, 2**31), words=st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_ids_and_levels_are_read_in_one_pass(seed: int, words: int) -> None:
    """What `spread` and `scale_levels`, which have tests of their own, make of them in two; and the highest id is told."""
    rng = np.random.default_rng(seed)
    positions, most = int(rng.integers(1, 12)), int(rng.integers(1, 30))
    counts, heads, leveled = some_counts(rng, positions, most)
    dtype = np.uint16 if words == 1 else np.uint32
    ids = rng.integers(0, np.iinfo(dtype).max, counts.sum(), dtype, endpoint=True)
    levels = rng.integers(0, 256, leveled.sum()).astype(np.uint8)
    by_level = (-0.05 * np.arange(256)).astype(np.float32)
    masses = np.rint(np.exp(by_level.astype(np.float64)) / MASS_UNIT).astype(np.int64)
    log_head = -3 * rng.random(positions)
    shape = (positions, most)
    found, wanted = ((np.empty(shape, np.int64), np.empty(shape, np.float32)) for _ in range(2))
    spread(ids.view(np.uint16), words, np.zeros_like(counts), counts, -1, wanted[0])
    scale_levels(levels, heads, leveled, log_head, by_level, masses, wanted[1])
    values, levels = (read_only(stored) for stored in (ids.view(np.uint16), levels))
    highest = read_ids(values, words, levels, counts, heads, leveled, log_head, by_level, masses, *found)
    assert highest == max(ids.tolist(), default=0)
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one, other)


def read_only(stored: np.ndarray) -> np.ndarray:
    """As `fast` is read: loops are compiled for one kind of arguments."""
    stored.flags.writeable = False
    return stored


@pytest.mark.parametrize("positions", [3, 256, 1000])
def test_the_curve_is_its_prediction_and_a_step(positions: int) -> None:
    rng = np.random.default_rng(3)
    log_tail = -3 * rng.random(positions)
    nothing_left = rng.random(positions) < 0.2
    nothing_left[1] = True
    log_tail[nothing_left] = -math.inf
    steps = rng.integers(-50, 50, (positions, 2)).astype(np.int16)
    weights = np.array([[0.5, 0.75, 0.0], [0.1, -1.0, 2.0]])
    found = np.empty((positions, 3), np.float32)
    curve_of_steps(steps, 1 / 128, log_tail, weights, np.array([1, 0]), 2, found)
    nearest = 0.5 + 0.75 * log_tail + steps[:, 0] / 128
    with np.errstate(invalid="ignore"):
        other = 0.1 - log_tail + 2.0 * nearest + steps[:, 1] / 128
    wanted = np.stack([other, nearest, log_tail], -1)
    wanted[nothing_left] = -math.inf
    np.testing.assert_allclose(found, wanted, rtol=2.0**-23)
