"""Targets with a tail shape as a distribution over the whole vocabulary, against its definition in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.targets.basis import TailBasis
from logit_cache.targets.sparse_targets import SparseTargets

from tests.helpers.shapes import KNOTS, TEMPERATURES, LinearTeacher

VOCAB, WIDTH = 60, 7
SUPPORTS: list[dict[str, Any]] = [
    {"k": 9},
    {"support": "topp", "k": 20, "p": 0.8},
    {"support": "threshold", "tau": 0.03, "seed": 5},
    {"support": "sampled", "draws": 6, "seed": 5},
]


def definition(
    logits: torch.Tensor, shape_logits: torch.Tensor, head: list[set[int]], temperature: float
) -> torch.Tensor:
    """p^_T [N, V]: p_T on the head, its mass outside in proportion to exp(t / T)."""
    p = torch.softmax(logits.double() / temperature, -1)
    for row, ids in enumerate(head):
        tail = [token for token in range(p.shape[-1]) if token not in ids]
        if tail:
            shape = torch.softmax(shape_logits[row, tail].double() / temperature, -1)
            p[row, tail] = p[row, tail].sum() * shape
    return p


def heads(targets: SparseTargets) -> list[set[int]]:
    found = []
    for row in range(len(targets)):
        drawn = [0] * targets.token_ids.shape[-1] if targets.draws is None else targets.draws[row].tolist()
        entries = zip(targets.token_ids[row].tolist(), drawn, strict=True)
        found.append({token for token, count in entries if token >= 0 and count == 0})
    return found


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda support: support.get("support", "topk"))
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_teachers_own_directions_give_its_softmax(
    support: dict[str, Any], softcap: float | None, temperature: float
) -> None:
    teacher = LinearTeacher.random(VOCAB, WIDTH, softcap=softcap)
    states = teacher.states(11)
    dense = teacher.targets(states, **support).dense(temperature)
    torch.testing.assert_close(dense, teacher.probabilities(states, temperature), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda support: support.get("support", "topk"))
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dense_is_its_definition(support: dict[str, Any], softcap: float | None, temperature: float) -> None:
    teacher = LinearTeacher.random(VOCAB, WIDTH, softcap=softcap)
    states, basis = teacher.states(11), teacher.basis(3)
    targets = teacher.targets(states, basis, **support)
    few = LinearTeacher(basis.offset, basis.directions, softcap)
    exact = definition(teacher.logits(states), few.logits(states[:, :3]), heads(targets), temperature)
    torch.testing.assert_close(targets.dense(temperature), exact, rtol=1e-11, atol=1e-14)
    if support.get("support") in ("topp", "threshold"):
        assert len({len(head) for head in heads(targets)}) > 1, "heads of several sizes"


def test_samples_are_no_part_of_the_shape() -> None:
    teacher = LinearTeacher.random(VOCAB, WIDTH)
    states, basis = teacher.states(11), teacher.basis(3)
    one, other = (teacher.targets(states, basis, support="threshold", tau=0.03, seed=seed) for seed in (1, 2))
    assert not torch.equal(one.token_ids, other.token_ids)
    assert torch.equal(one.dense(2.0), other.dense(2.0))


@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.integers(2, 40),
    rank=st.integers(0, 6),
    size=st.sampled_from([0.0, 0.3, 3.0, 30.0, 1e4]),
    temperature=st.sampled_from(TEMPERATURES),
    softcap=st.sampled_from([None, 2.0]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_head_and_masses_are_exact_whatever_the_coordinates(
    seed: int, vocab_size: int, rank: int, size: float, temperature: float, softcap: float | None, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocab_size))
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, vocab_size, generator=generator, dtype=torch.float64)
    basis = TailBasis(
        torch.randn(vocab_size, generator=generator), torch.randn(vocab_size, rank, generator=generator), softcap
    )
    targets = SparseTargets.from_logits(logits, k=k, knots=KNOTS)
    shaped = replace(targets, tail_coordinates=size * torch.randn(4, rank, generator=generator), basis=basis)
    dense = shaped.dense(temperature)
    exact = torch.softmax(logits / temperature, -1)
    assert (dense >= 0).all()
    torch.testing.assert_close(dense.sum(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        dense.gather(-1, targets.token_ids), exact.gather(-1, targets.token_ids), rtol=1e-9, atol=0
    )
    tail = dense.scatter(-1, targets.token_ids, 0.0).sum(-1)
    # Shape logits of up to some 1e5 nats are rounded in float64, and so is the logarithm of their sum.
    torch.testing.assert_close(tail, exact.scatter(-1, targets.token_ids, 0.0).sum(-1), rtol=1e-9, atol=0)


def test_positions_without_a_target_are_zero() -> None:
    teacher = LinearTeacher.random(VOCAB, WIDTH)
    mask = torch.tensor([True, False, True, False])
    targets = teacher.targets(teacher.states(4), mask=mask, k=5)
    for temperature in TEMPERATURES:
        dense = targets.dense(temperature)
        assert (dense[~mask] == 0).all() and (dense[mask] > 0).all()


def test_a_head_of_all_tokens_leaves_no_tail() -> None:
    teacher = LinearTeacher.random(VOCAB, WIDTH)
    states = teacher.states(4)
    dense = teacher.targets(states, teacher.basis(0), k=VOCAB).dense(2.0)
    torch.testing.assert_close(dense, teacher.probabilities(states, 2.0))


def test_a_broken_coordinate_is_not_hidden() -> None:
    targets = LinearTeacher.random(VOCAB, WIDTH).targets(torch.full((1, WIDTH), math.nan, dtype=torch.float64), k=5)
    good = LinearTeacher.random(VOCAB, WIDTH).targets(torch.zeros(1, WIDTH, dtype=torch.float64), k=5)
    broken = replace(good, tail_coordinates=targets.tail_coordinates)
    assert broken.dense(1.0).isnan().any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_smaller_vocabulary_keeps_head_and_mass(temperature: float) -> None:
    """The mass of ids that the student lacks goes to its tail, in the shape that its own tokens have."""
    teacher = LinearTeacher.random(VOCAB, WIDTH)
    states, basis = teacher.states(6), teacher.basis(3)
    targets = teacher.targets(states, basis, k=9)
    smaller = targets.restrict_vocabulary(50)
    assert any(token >= 50 for head in heads(targets) for token in head)
    dense = smaller.dense(temperature)
    exact = torch.softmax(teacher.logits(states) / temperature, -1)
    shape = LinearTeacher(basis.offset, basis.directions).logits(states[:, :3])[:, :50]
    assert dense.shape == (6, 50)
    for row, head in enumerate(heads(targets)):
        kept = [token for token in head if token < 50]
        tail = [token for token in range(50) if token not in head]
        torch.testing.assert_close(dense[row, kept], exact[row, kept], rtol=1e-11, atol=0)
        mass = 1 - exact[row, kept].sum()
        torch.testing.assert_close(dense[row, tail], mass * torch.softmax(shape[row, tail] / temperature, -1))
    assert smaller.restrict_vocabulary(50) is smaller


def test_tokens_beyond_the_basis_have_no_probability() -> None:
    teacher = LinearTeacher.random(VOCAB, WIDTH)
    states = teacher.states(4)
    larger = replace(teacher.targets(states, k=5), vocab_size=VOCAB + 3)
    dense = larger.dense(1.0)
    assert dense.shape == (4, VOCAB + 3) and (dense[:, VOCAB:] == 0).all()
    torch.testing.assert_close(dense[:, :VOCAB], teacher.probabilities(states, 1.0))


def test_without_a_shape_there_is_no_dense_target() -> None:
    targets = SparseTargets.from_logits(torch.randn(2, 9), k=3)
    with pytest.raises(ValueError, match=r"no tail shape: cache with cache\.tail_rank"):
        targets.dense(1.0)
    shaped = LinearTeacher.random(VOCAB, WIDTH).targets(torch.zeros(1, WIDTH, dtype=torch.float64), k=5)
    with pytest.raises(ValueError, match=r"inverse temperature 4"):
        shaped.dense(0.25)


def test_float32_targets_are_near_their_definition() -> None:
    teacher = LinearTeacher.random(VOCAB, WIDTH)
    states, basis = teacher.states(11), teacher.basis(3)
    single = TailBasis(basis.offset.float(), basis.directions.float())
    targets = SparseTargets.from_logits(teacher.logits(states).float(), k=9, knots=KNOTS)
    shaped = replace(targets, tail_coordinates=states[:, :3].float(), basis=single)
    exact = teacher.targets(states, basis, k=9)
    for temperature in TEMPERATURES:
        # Logits up to 20 nats, twice as large at T = 1/2, in a few float32 roundings of 2^-24 each.
        torch.testing.assert_close(
            shaped.dense(temperature).double(), exact.dense(temperature), rtol=8 * 40 * 2.0**-24, atol=1e-12
        )
