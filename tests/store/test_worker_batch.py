"""Batches of a loader's workers: what arrives is what was sent, and all of it comes in one block."""

from __future__ import annotations

import io
import multiprocessing.reduction
import pickle
from copy import copy, deepcopy
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache import Ensemble, LogitCache, RowStream, ShardShuffle, collate
from logit_cache.store.row_source import RowSource
from logit_cache.store.worker_batch import WorkerBatch
from logit_cache.targets.supports import Support
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.pinning import pinning_without_a_gpu
from tests.helpers.synthetic import make_cache

DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
sizes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("batches") / "cache", rows=23, shard_rows=4, tail_rank=3)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    support = Support("sampled", draws=20)
    return make_cache(tmp_path_factory.mktemp("batches") / "sampled", support=support, label_log_probs=False)


def tensors_of(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def seen(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for value in batch.values():
        seen(value) if isinstance(value, Tensor) else value.map(seen)
    return found


def assert_same(one: Any, other: Any) -> None:
    """Every bit, dtype and shape, and what else belongs to the targets."""
    assert type(one) is dict and list(one) == list(other)
    assert [type(value) for value in one.values()] == [type(value) for value in other.values()]
    mine, theirs = tensors_of(one), tensors_of(other)
    assert [(part.dtype, part.shape) for part in mine] == [(part.dtype, part.shape) for part in theirs]
    for part, expected in zip(mine, theirs, strict=True):
        assert part.is_contiguous() and torch.equal(part.view(-1).view(torch.uint8), bits(expected))
    if "targets" in one:
        members = [getattr(batch["targets"], "members", (batch["targets"],)) for batch in (one, other)]
        for own, expected in zip(*members, strict=True):
            assert own.basis is expected.basis and (own.knots, own.vocab_size) == (expected.knots, expected.vocab_size)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def in_one_block(batch: Any) -> bool:
    parts = tensors_of(batch)
    begin, end = min(part.data_ptr() for part in parts), max(part.data_ptr() + part.nbytes for part in parts)
    return end - begin < sum(part.nbytes + 64 for part in parts)


@settings(deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(DTYPES), sizes), max_size=6), seed=st.integers(0, 9))
def test_tensors_of_any_dtype_and_shape_arrive(parts: list[tuple[torch.dtype, tuple[int, ...]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 100, shape, generator=generator).to(dtype) for dtype, shape in parts]
    batch = {str(number): part for number, part in enumerate(drawn)}
    assert_same(pickle.loads(pickle.dumps(WorkerBatch(batch))), batch)


def test_a_part_of_a_tensor_arrives_as_that_part() -> None:
    whole = torch.arange(24.0).view(4, 6)
    batch = {"columns": whole[:, 1::2], "rows": whole.T, "one": whole[2, 3]}
    assert_same(pickle.loads(pickle.dumps(WorkerBatch(batch))), batch)


@pytest.mark.parametrize("kind", ["shape", "samples", "mean"])
def test_a_batch_is_handed_over_as_one_storage(
    kind: str, cache: LogitCache, sampled: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: RowSource = {"shape": cache, "samples": sampled, "mean": Ensemble([cache, cache])}[kind]
    batch = source.batch([3, 1, 2])
    descriptors: list[Any] = []
    handed = multiprocessing.reduction.DupFd
    monkeypatch.setattr(multiprocessing.reduction, "DupFd", lambda fd: descriptors.append(fd) or handed(fd))
    arrived = pickle.loads(ForkingPickler.dumps(WorkerBatch(batch)))
    assert_same(arrived, batch)
    assert len(descriptors) == 1 and len(tensors_of(batch)) > 7
    # They are ordinary tensors, which may be written, copied, saved, and handed on.
    parts = tensors_of(arrived)
    parts[0].zero_()
    assert all(torch.equal(bits(part), bits(own)) for part, own in zip(parts[1:], tensors_of(batch)[1:], strict=True))
    torch.save(parts, saved := io.BytesIO())
    saved.seek(0)
    for again in (torch.load(saved), deepcopy(parts), pickle.loads(ForkingPickler.dumps(parts))):
        assert all(torch.equal(bits(part), bits(own)) for part, own in zip(again, parts, strict=True))


def test_in_its_worker_a_batch_is_a_dict(cache: LogitCache) -> None:
    batch = cache.batch([5])
    for sent in (WorkerBatch(batch), copy(WorkerBatch(batch)), deepcopy(WorkerBatch(batch))):
        assert isinstance(sent, dict) and torch.equal(sent["labels"], batch["labels"])
        assert torch.equal(sent["targets"].log_probs, batch["targets"].log_probs)


@pytest.mark.parametrize("pinned", [False, True])
def test_workers_give_the_batches_of_this_process(cache: LogitCache, pinned: bool) -> None:
    """Epoch by epoch, from the middle of one, with workers that stay."""
    alone, together = (ShardShuffle(cache, seed=2, window=2) for _ in range(2))
    expected = DataLoader(cache, batch_size=4, sampler=alone, collate_fn=collate)
    kept = {"num_workers": 2, "persistent_workers": True, "pin_memory": pinned}
    with pinning_without_a_gpu():
        loader: DataLoader[Any] = DataLoader(cache, batch_size=4, sampler=together, collate_fn=collate, **kept)
        for order in (alone, together):
            order.load_state_dict({"epoch": 1, "rows": 9})
        for epoch, batches in ((1, 4), (2, 6)):
            for order in (alone, together):
                order.set_epoch(epoch)
            found = list(loader)
            assert len(found) == batches
            for own, other in zip(found, expected, strict=True):
                assert_same(own, other)
                assert pinned or in_one_block(own)
        del loader


def test_workers_of_a_stream_give_its_rows(sampled: LogitCache) -> None:
    stream = RowStream(sampled, seed=3, epochs=2)
    expected = list(DataLoader(stream, batch_size=5, collate_fn=collate))
    for own, other in zip(DataLoader(stream, batch_size=5, collate_fn=collate, num_workers=1), expected, strict=True):
        assert_same(own, other)


@pytest.mark.slow
def test_spawned_workers_give_the_batches_of_this_process(cache: LogitCache) -> None:
    settings: dict[str, Any] = {"batch_size": 9, "collate_fn": collate}
    spawned = DataLoader(cache, num_workers=1, multiprocessing_context="spawn", **settings)
    for own, other in zip(spawned, DataLoader(cache, **settings), strict=True):
        assert_same(own, other)
