"""The order for slow storage: every row once an epoch, few shards at a time, nothing but seed and epoch decides it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache import Ensemble, LogitCache, Mixture, ShardShuffle, ShorterRows, Subset, collate
from logit_cache.store.order import Shuffle
from logit_cache.store.samplers import StepBatches
from logit_cache.store.shard_order import RowsByShard, ShardOrder
from torch.utils.data import BatchSampler, DataLoader

from tests.helpers.synthetic import make_cache


def uniform(shards: int, shard_rows: int, last: int | None = None) -> RowsByShard:
    """Shards of equal size, the last one perhaps shorter."""
    sizes = np.full(shards, shard_rows)
    sizes[-1] = last or shard_rows
    return RowsByShard(sizes, np.zeros(shards, np.int64))


shapes = st.builds(
    RowsByShard,
    st.lists(st.integers(1, 9), min_size=1, max_size=12).map(np.array),
    st.just(None),
).map(lambda found: RowsByShard(found.sizes, np.zeros_like(found.sizes)))


@settings(deadline=None)
@given(shards=shapes, window=st.integers(1, 14), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_every_row_comes_once_per_epoch_and_a_window_has_the_rows_of_its_shards(
    shards: RowsByShard, window: int, seed: int, epoch: int
) -> None:
    order = ShardOrder(shards, seed, window)
    begin = epoch * order.rows
    rows = order.rows_at(np.arange(begin, begin + order.rows))
    assert sorted(rows.tolist()) == list(range(order.rows))
    shard_of = np.repeat(np.arange(len(shards.sizes)), shards.sizes)
    seen: set[int] = set()
    for first, last in order.windows(begin):
        if first == begin + order.rows:
            break
        inside = set(shard_of[rows[first - begin : last - begin]].tolist())
        assert len(inside) <= window and not inside & seen
        assert len(inside) == window or last == begin + order.rows
        assert last - first == sum(shards.sizes[list(inside)])
        seen |= inside
    assert len(seen) == len(shards.sizes)
    # Place by place it is the same.
    mixed = np.random.default_rng(0).permutation(order.rows)
    assert np.array_equal(ShardOrder(shards, seed, window).rows_at(begin + mixed), rows[mixed])


def test_seed_and_epoch_give_the_order() -> None:
    slots = np.arange(200)
    one = ShardOrder(uniform(20, 10), 1, 4)
    assert np.array_equal(one.rows_at(slots), ShardOrder(uniform(20, 10), 1, 4).rows_at(slots))
    assert (one.rows_at(slots) != ShardOrder(uniform(20, 10), 2, 4).rows_at(slots)).any()
    assert (one.rows_at(slots) != one.rows_at(slots + 200)).any()
    with pytest.raises(ValueError, match="a window of 0 shards"):
        ShardOrder(uniform(20, 10), 1, 0)


def test_one_window_is_a_full_shuffle() -> None:
    slots = np.arange(450)
    assert np.array_equal(ShardOrder(uniform(20, 10), 1, 20).rows_at(slots), Shuffle(200, 1).rows_at(slots))
    assert np.array_equal(
        ShardOrder(uniform(20, 10), 1, 20).shares(9, 2, 20, 1, 4), Shuffle(200, 1).shares(9, 2, 20, 1, 4)
    )


def test_two_rows_of_a_batch_share_a_shard_as_often_as_the_window_says() -> None:
    """(n - 1) / (w n - 1) for shards of n rows; 4096 batches of 32: the deviation of the mean is below 0.001."""
    for window in (4, 16, 64):
        order = ShardOrder(uniform(512, 256), 3, window)
        shards = (order.rows_at(np.arange(order.rows)) // 256).reshape(-1, 32)
        pairs = (shards[:, :, None] == shards[:, None, :]).sum((1, 2)) - 32
        assert abs(pairs.mean() / (32 * 31) - 255 / (window * 256 - 1)) < 0.006


def test_a_billion_rows_need_memory_for_their_shards_only() -> None:
    shards = uniform(10**6, 1000, last=7)
    tracemalloc.start()
    order = ShardOrder(shards, 0, 16)
    places = np.concatenate([np.arange(10**9 - 5000, 10**9), np.arange(1000)])
    places = places[places < order.rows]
    rows = order.rows_at(places)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(rows)) == len(places) and len(np.unique(rows // 1000)) <= 32
    assert kept < 40 * 10**6 and peak < 200 * 10**6


def shared_out(sizes: RowsByShard, window: int, world_size: int, steps: int, step_rows: int) -> list[list[np.ndarray]]:
    samplers = [
        StepBatches(ShardOrder(sizes, 0, window), step_rows, step_rows, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return [[np.array(rows) for _, rows in zip(range(steps), sampler, strict=False)] for sampler in samplers]


@settings(deadline=None)
@given(shards=shapes, window=st.integers(1, 5), world_size=st.sampled_from([1, 2, 3, 4]))
def test_the_number_of_processes_changes_no_step(shards: RowsByShard, window: int, world_size: int) -> None:
    count = -(-int(shards.sizes.sum()) // 12)
    (alone,) = shared_out(shards, window, 1, count, 12)
    together = shared_out(shards, window, world_size, count, 12)
    for number, rows in enumerate(alone):
        parts = [own[number] for own in together]
        assert {len(part) for part in parts} == {12 // world_size}
        assert sorted(np.concatenate(parts).tolist()) == sorted(rows.tolist())


def test_processes_divide_the_shards_of_a_window() -> None:
    """Each of four needs about its quarter of 16 shards, and not all of them."""
    for own in shared_out(uniform(64, 256), 16, 4, 8, 512):
        assert len(np.unique(np.concatenate(own) // 256)) <= 7


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("order") / "cache", rows=23, shard_rows=3)


@settings(deadline=None)
@given(before=st.integers(1, 4), after=st.integers(1, 4), steps=st.integers(0, 9), data=st.data())
def test_resumed_in_the_middle_with_other_processes_nothing_is_lost_or_doubled(
    cache: LogitCache, before: int, after: int, steps: int, data: st.DataObject
) -> None:
    steps = min(steps, len(cache) // before)
    seen: list[int] = []
    states = []
    for rank in range(before):
        order = ShardShuffle(cache, seed=1, window=2, rank=rank, world_size=before)
        order.set_epoch(2)
        seen += [row for _, row in zip(range(steps), order, strict=False)]
        states.append(order.state_dict() if steps else order.state_dict(0))
    assert all(state == {"epoch": 2, "rows": steps * before} for state in states)
    assert states[0] == order.state_dict(steps * before)
    for rank in range(after):
        order = ShardShuffle(cache, seed=1, window=2, rank=rank, world_size=after)
        order.load_state_dict(states[0])
        order.set_epoch(2)
        left = list(order)
        assert len(left) == len(order)
        seen += left
    assert sorted(seen) == list(range(len(cache)))
    order.set_epoch(3)
    assert len(order) == len(range(after - 1, len(cache), after))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_takes_it_as_sampler_and_in_a_batch_sampler(cache: LogitCache, workers: int) -> None:
    order = ShardShuffle(cache, seed=4, window=3)
    order.set_epoch(1)
    rows = list(order)
    by_sampler = DataLoader(cache, batch_size=5, sampler=order, collate_fn=collate, num_workers=workers)
    by_batches = DataLoader(
        cache, batch_sampler=BatchSampler(order, 5, drop_last=False), collate_fn=collate, num_workers=workers
    )
    expected = cache.batch(rows)["input_ids"]
    for loader in (by_sampler, by_batches):
        assert len(loader) == 5
        assert np.array_equal(np.concatenate([batch["input_ids"].numpy() for batch in loader]), expected)


def test_accelerate_divides_it_among_processes(cache: LogitCache) -> None:
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    order = ShardShuffle(cache, seed=4, window=3)
    loader = DataLoader(cache, batch_size=2, sampler=order, collate_fn=collate)
    found = []
    for process in range(2):
        prepared = prepare_data_loader(loader, num_processes=2, process_index=process, even_batches=False)
        prepared.set_epoch(1)
        found += [row.tolist() for batch in prepared for row in batch["input_ids"]]
    whole = cache.batch(np.arange(len(cache)))["input_ids"].tolist()
    assert sorted(found) == sorted(whole)
    first = [batch["input_ids"].tolist() for batch in loader]
    assert [batch["input_ids"].tolist() for batch in skip_first_batches(loader, 3)] == first[3:]


def test_views_are_read_shard_by_shard_too(cache: LogitCache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", rows=11, shard_rows=2, seed=1)
    again = make_cache(tmp_path / "again", rows=23, shard_rows=4, teacher=1)
    views = [
        Subset(cache, np.random.default_rng(0).permutation(23)[:9]),
        ShorterRows(cache, 6),
        Mixture([cache, other], [0.5, 0.5], rows=40, seed=2),
        Ensemble([cache, again]),
        Subset(Mixture([Ensemble([cache, again]), cache, other]), range(5, 40)),
    ]
    for view in views:
        order = ShardOrder(view.by_shard(), 0, 2)
        slots = np.arange(len(view))
        rows = order.rows_at(slots)
        assert sorted(rows.tolist()) == slots.tolist()
        numbers, read = (part[:, 0].tolist() for part in view.origins(slots))
        sources = {id(one.readers[0]): one for one in (cache, other, again)}
        for number, origin, index in zip(numbers, read, slots.tolist(), strict=True):
            tokens = sources[id(view.readers[number])].columns([origin])["input_ids"][0].tolist()
            assert str(view[index]["input_ids"].tolist())[1:-1] in str(tokens)
        shards = [
            (number, row // view.readers[number].manifest.shard_rows) for number, row in zip(numbers, read, strict=True)
        ]
        for first, last in order.windows(0):
            if first == len(view):
                break
            assert len({shards[row] for row in rows[first:last].tolist()}) <= 2


def test_the_shards_of_several_caches_are_spread_evenly() -> None:
    caches = np.repeat([0, 1], [90, 30])
    order = ShardOrder(RowsByShard(np.full(120, 5), caches), 0, 8)
    for first, last in list(zip(range(15), order.windows(0), strict=False)):
        of_second = caches[order.rows_at(np.arange(*last)) // 5].sum() / 5
        assert of_second == pytest.approx(2, abs=1), first


def test_an_incomplete_cache_has_the_order_of_its_shards(tmp_path: Path) -> None:
    make_cache(tmp_path, rows=23, shard_rows=3)
    (tmp_path / "shards/00002.json").unlink()
    partial = LogitCache(tmp_path, partial=True)
    order = ShardShuffle(partial, window=2)
    assert sorted(order) == list(range(20))
