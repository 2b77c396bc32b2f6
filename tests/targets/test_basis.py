"""Tail bases: devices, fewer tokens, pickling without the tensors, several bases as one, and coordinates of states."""

from __future__ import annotations

import multiprocessing
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from logit_cache import collate
from logit_cache.targets.basis import TailBasis, TailProjection
from logit_cache.targets.joint_basis import can_join, distinct, join_bases, joint_coordinates
from logit_cache.targets.sparse_targets import SparseTargets
from torch.utils.data import DataLoader, Dataset

from tests.helpers.shapes import TEMPERATURES, LinearTeacher

VOCAB, WIDTH = 40, 5
LARGE = 5000
_made: dict[int, TailBasis] = {}


def known_basis(seed: int, vocab_size: int = LARGE) -> TailBasis:
    """The same object for the same seed, in any process: what a cache's basis has as its origin."""
    if seed not in _made:
        basis = LinearTeacher.random(vocab_size, WIDTH, seed).basis(digest=f"basis {seed}")
        _made[seed] = replace(basis, origin=(known_basis, (seed, vocab_size)))
    return _made[seed]


def assert_equal(one: TailBasis, other: TailBasis) -> None:
    assert torch.equal(one.offset, other.offset) and torch.equal(one.directions, other.directions)
    assert (one.softcap, one.digest) == (other.softcap, other.digest)


def test_a_device_gets_one_copy() -> None:
    basis = known_basis(0)
    assert basis.to("cpu") is basis
    moved = basis.to("meta")
    assert moved.offset.device.type == moved.directions.device.type == "meta"
    assert basis.to(torch.device("meta")) is moved
    targets = shaped(basis, 3)
    assert targets.to("meta").basis is moved and targets[:1].to("meta").basis is moved
    assert targets.to("meta").tail_coordinates.device.type == "meta"  # type: ignore[union-attr]


def test_fewer_tokens_are_a_basis_made_once() -> None:
    basis = known_basis(0)
    first = basis.first(30)
    assert first is basis.first(30) and first.vocab_size == 30 and basis.first(LARGE) is basis
    assert torch.equal(first.directions, basis.directions[:30]) and first.digest != basis.digest
    assert shaped(basis, 3).restrict_vocabulary(30).basis is first


def shaped(basis: TailBasis, positions: int, seed: int = 0) -> SparseTargets:
    generator = torch.Generator().manual_seed(seed)
    targets = SparseTargets.from_logits(torch.randn(positions, basis.vocab_size, generator=generator), k=3)
    return replace(
        targets,
        tail_coordinates=torch.randn(positions, basis.rank, generator=generator),
        label_log_probs=-torch.rand(positions, generator=generator),
        basis=basis,
    )


TENSORS = ("token_ids", "log_probs", "tail_curve", "mask", "tail_coordinates", "label_log_probs")


def assert_same(one: SparseTargets, other: SparseTargets) -> None:
    assert one.basis is other.basis
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_coordinates_and_labels_follow_the_positions() -> None:
    basis = known_basis(0)
    one, other = shaped(basis, 4, seed=1), shaped(basis, 4, seed=2)
    for index in (2, slice(1, 3), torch.tensor([3, 0]), one.token_ids[:, 0] > 100):
        for name in TENSORS:
            assert torch.equal(getattr(one[index], name), getattr(one, name)[index])
        assert one[index].basis is basis
    both = SparseTargets.stack([one, other])
    assert both.tail_coordinates is not None and both.tail_coordinates.shape == (2, 4, WIDTH)
    assert_same(both[1], other)
    assert_same(SparseTargets.cat([one, other])[4:], other)
    assert_same(both.flatten()[:4], one)
    assert_same(both.flatten().unflatten((2, 4))[0], one)
    assert_same(replace(one, token_ids=torch.nn.functional.pad(one.token_ids, (0, 2), value=-1)).trim(), one)
    if torch.cuda.is_available():
        assert_same(one.pin_memory(), one)


def test_targets_of_different_bases_are_not_joined() -> None:
    one, other = shaped(known_basis(0), 2), shaped(known_basis(1), 2)
    bucket = replace(one, basis=None, tail_coordinates=None)
    for pair in ([one, other], [one, bucket], [bucket, one]):
        with pytest.raises(ValueError, match="different tail bases"):
            SparseTargets.cat(pair)
    # A copy with the same digest is the same basis.
    copy = replace(known_basis(0), origin=None)
    assert SparseTargets.cat([one, replace(one, basis=copy)]).basis is one.basis
    nameless = [replace(one, basis=replace(copy, digest="")) for _ in range(2)]
    with pytest.raises(ValueError, match="different tail bases"):
        SparseTargets.cat(nameless)


def test_labels_that_only_some_have_are_dropped() -> None:
    one = shaped(known_basis(0), 2)
    for pair in ([one, replace(one, label_log_probs=None)], [replace(one, label_log_probs=None), one]):
        joined = SparseTargets.cat(pair)
        assert joined.label_log_probs is None and joined.tail_coordinates is not None


def test_a_pickle_names_the_basis() -> None:
    basis = known_basis(0)
    targets = shaped(basis, 1)
    data = pickle.dumps(targets)
    assert len(data) < 4000 < basis.directions.nbytes / 20
    assert_same(pickle.loads(data), targets)
    derived = (basis.first(1000), basis.to("meta"), basis.to("meta").first(10), join_bases(basis, known_basis(1)))
    for some in derived:
        data = pickle.dumps(some)
        assert len(data) < 1000 and pickle.loads(data) is some


def test_a_basis_without_origin_is_pickled_whole() -> None:
    basis = LinearTeacher.random(VOCAB, WIDTH, softcap=4.0).basis(digest="x")
    for some in (basis, basis.first(10)):
        assert_equal(pickle.loads(pickle.dumps(some)), some)


class Rows(Dataset[Any]):
    """Rows of targets that share one basis."""

    def __init__(self, basis: TailBasis) -> None:
        self.basis = basis

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return {"labels": torch.tensor([index]), "targets": shaped(self.basis, 1, seed=index)}


class Measured:
    """Collates, and measures what a worker would send of the targets."""

    def __call__(self, rows: list[Any]) -> Any:
        batch = collate(rows)
        return batch, len(pickle.dumps(batch["targets"].basis)), multiprocessing.current_process().name


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_loaders_workers_send_no_basis(start: str) -> None:
    basis = known_basis(0)
    loader = DataLoader(Rows(basis), batch_size=2, collate_fn=Measured(), num_workers=2, multiprocessing_context=start)
    found = list(loader)
    assert len(found) == 3
    for batch, size, process in found:
        assert process != multiprocessing.current_process().name
        assert size < 200 and batch["targets"].basis is basis
    expected = SparseTargets.stack([shaped(basis, 1, seed=index) for index in (2, 3)])
    assert_same(found[1][0]["targets"], expected)


def test_a_joint_basis_gives_every_position_its_own_logits() -> None:
    teachers = [LinearTeacher.random(VOCAB, width, seed, softcap=9.0) for seed, width in enumerate((5, 2, 4))]
    bases = [teacher.basis() for teacher in teachers]
    joint = join_bases(*bases)
    assert joint.rank == 5 + 2 + 4 + 3 and join_bases(*bases) is joint and join_bases(bases[0]) is bases[0]
    for teacher, basis in zip(teachers, bases, strict=True):
        states = teacher.states(7)
        logits = joint.logits(joint_coordinates(states, basis, bases))
        torch.testing.assert_close(logits, teacher.logits(states), rtol=1e-12, atol=1e-12)
    assert joint_coordinates(states, bases[2], [bases[2]]) is states


def test_a_joint_basis_of_unequal_vocabularies() -> None:
    teachers = [LinearTeacher.random(size, 3, seed=size) for size in (40, 50)]
    bases = [teacher.basis() for teacher in teachers]
    joint = join_bases(*bases)
    for teacher, basis in zip(teachers, bases, strict=True):
        states, size = teacher.states(7), basis.vocab_size
        own = teacher.targets(states, k=4)
        moved = replace(own, tail_coordinates=joint_coordinates(states, basis, bases), basis=joint, vocab_size=50)
        for temperature in TEMPERATURES:
            dense = moved.dense(temperature)
            torch.testing.assert_close(dense[:, :size], own.dense(temperature), rtol=1e-10, atol=1e-14)
            assert (dense[:, size:] == 0).all()


def test_which_bases_can_be_joined() -> None:
    plain, capped = LinearTeacher.random(VOCAB, 3), LinearTeacher.random(VOCAB, 3, softcap=5.0)
    larger = LinearTeacher.random(VOCAB + 1, 3, softcap=5.0)
    assert can_join([plain.basis(), plain.basis()]) and not can_join([plain.basis(), capped.basis()])
    # A capped logit of a token that a basis lacks would be no smaller than -5.
    assert not can_join([capped.basis(), larger.basis()])
    with pytest.raises(ValueError, match="cannot be joined"):
        join_bases(plain.basis(), capped.basis())
    one, copy, other = known_basis(0), replace(known_basis(0), origin=None), known_basis(1)
    assert distinct([one, copy, other, one]) == [one, other]
    assert join_bases(one, other).digest != join_bases(other, one).digest != ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coordinates_of_hidden_states(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    projection = TailProjection(torch.randn(8, generator=generator), torch.randn(3, 8, generator=generator))
    hidden = (10 * torch.randn(2, 5, 8, generator=generator)).to(dtype)
    found = projection.coordinates(hidden)
    exact = (hidden.double() - projection.center.double()) @ projection.matrix.double().T
    assert found.shape == (2, 5, 3) and found.dtype == torch.float32
    # Eight products of up to 40 times 3, each and their sums rounded.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=16 * 8 * 40 * 3 * 2.0**-24)
