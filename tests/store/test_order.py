"""The order of rows: nothing but seed and step decides it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.store.order import Shuffle, permuted, rows_at
from logit_cache.store.samplers import StepBatches

sizes = st.integers(1, 60)


def steps_of(
    rows: int, step_rows: int, process_rows: int, world_size: int, steps: int, seed: int = 5
) -> list[list[int]]:
    """The rows of the first steps, over all processes, by walking the samplers as Trainer does."""
    samplers = [
        StepBatches(Shuffle(rows, seed), step_rows, process_rows, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    found: list[list[int]] = []
    for epoch in range(-(-steps // samplers[0].steps_per_epoch)):
        batches = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            batches.append(list(sampler))
            assert len(batches[-1]) == len(sampler)
        micro = samplers[0].micro_batches
        for step in range(samplers[0].steps_per_epoch):
            parts = [part for mine in batches for part in mine[step * micro : (step + 1) * micro]]
            assert all(1 <= len(part) <= process_rows for part in parts)
            found.append([row for part in parts for row in part])
    return found[:steps]


@settings(deadline=None)
@given(rows=sizes, share=st.integers(1, 12), process_rows=st.integers(1, 12), world_size=st.integers(1, 4))
def test_every_row_comes_once_per_epoch(rows: int, share: int, process_rows: int, world_size: int) -> None:
    step_rows = share * world_size
    seen = [row for step in steps_of(rows, step_rows, process_rows, world_size, 8) for row in step]
    for start in range(0, len(seen) - rows + 1, rows):
        assert sorted(seen[start : start + rows]) == list(range(rows))


@pytest.mark.slow
@settings(deadline=None)
@given(rows=sizes, factor=st.integers(1, 3), process_rows=st.integers(1, 12))
def test_the_number_of_processes_changes_no_step(rows: int, factor: int, process_rows: int) -> None:
    alone = steps_of(rows, 12 * factor, process_rows, 1, 7)
    for world_size in (2, 3, 4):
        shared = steps_of(rows, 12 * factor, process_rows, world_size, 7)
        assert [sorted(step) for step in shared] == [sorted(step) for step in alone]


@pytest.mark.slow
@settings(deadline=None)
@given(rows=sizes, before=st.integers(1, 4), after=st.integers(1, 4), at=st.integers(0, 9))
def test_resumed_on_other_processes_no_row_is_lost_or_repeated(rows: int, before: int, after: int, at: int) -> None:
    first, second = steps_of(rows, 12, 5, before, 10)[:at], steps_of(rows, 12, 5, after, 10)[at:]
    seen = [row for step in first + second for row in step]
    for start in range(0, len(seen) - rows + 1, rows):
        assert sorted(seen[start : start + rows]) == list(range(rows))


def test_seed_and_epoch_give_the_order() -> None:
    slots = np.arange(100)
    assert (rows_at(slots, 100, 1) == rows_at(slots, 100, 1)).all()
    assert (rows_at(slots, 100, 1) != rows_at(slots, 100, 2)).any()
    assert (rows_at(slots, 100, 1) != rows_at(slots + 100, 100, 1)).any()


@settings(deadline=None)
@given(rows=st.one_of(st.integers(1, 70), st.integers(1000, 5000)), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_row_has_exactly_one_place(rows: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(rows), rows, seed, epoch).tolist()) == list(range(rows))


@pytest.mark.parametrize("rows", [10**9, 2**40 + 1])
def test_places_of_a_billion_rows_are_found_without_an_array_of_them(rows: int) -> None:
    places = np.unique(np.random.default_rng(0).integers(0, rows, 100_000))
    found = permuted(places, rows, seed=3, epoch=1)
    assert len(np.unique(found)) == len(places) and found.min() >= 0 and found.max() < rows
    assert (found == np.concatenate([permuted(part, rows, 3, 1) for part in np.array_split(places, 7)])).all()
    # Spread evenly, and without memory of the place: sums of n uniform numbers have a deviation of 1 / sqrt(12 n), products
    # of independent ones of 1 / (12 sqrt(n)); six of them.
    x, y = found / rows - 0.5, places / rows - 0.5
    assert abs(x.mean()) < 6 / math.sqrt(12 * len(x))
    assert abs((x * y).mean()) < 6 / 12 / math.sqrt(len(x))


def test_small_orders_come_out_equally_often() -> None:
    """The 24 orders of 4 rows over 4,800 seeds: 200 each, chi-squared of 23 degrees below its 1 - 1e-6 quantile, 75."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(permuted(np.arange(4), 4, seed, 0).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 75


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="8 rows cannot be shared evenly by 3"):
        StepBatches(Shuffle(10, 0), 8, 8, world_size=3)
    with pytest.raises(ValueError, match="no rows"):
        StepBatches(Shuffle(0, 0), 8, 8)
