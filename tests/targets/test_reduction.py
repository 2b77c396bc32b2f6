"""The passes over a distribution, compiled and of torch, against NumPy in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.targets.reduction import head_and_rest
from logit_cache.targets.reduction_cpu import count_and_sum, largest_bits, sums_of_exp2
from logit_cache.targets.sparse_targets import SparseTargets

EPS32 = 2.0**-24  # half an ulp of 1: the relative error of one float32 rounding
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def largest_by_definition(x: torch.Tensor, k: int) -> np.ndarray:
    """Places of the k largest, of equal ones the first; -0 equals 0."""
    return np.argsort(-x.double().numpy(), axis=-1, kind="stable")[:, :k]


@contextmanager
def way(compiled: bool) -> Iterator[None]:
    """The compiled kernels of a CPU, or the torch operations of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr("logit_cache.targets.reduction.runs_compiled", lambda x: False)
        yield


@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 2, 7, 64, 511, 1000, 5003]),
    values=st.sampled_from(["distinct", "few", "equal", "infinite", "zeros"]),
    dtype=st.sampled_from(DTYPES),
    compiled=st.booleans(),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_largest_are_found_and_ordered(
    seed: int, size: int, values: str, dtype: torch.dtype, compiled: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, size))
    generator = torch.Generator().manual_seed(seed)
    x = 5 * torch.randn(3, size, generator=generator)
    if values == "few":
        x = x.round()
    elif values == "equal":
        x = torch.full_like(x, -1.5)
    elif values == "infinite":
        x = torch.where(torch.rand(3, size, generator=generator) < 0.5, -math.inf, x)
    elif values == "zeros":
        x = torch.where(torch.rand(3, size, generator=generator) < 0.5, -0.0, 0.0)
    x = x.to(dtype)
    with way(compiled):
        found, ids, rest, _ = head_and_rest(x, k, (1.0,))
    by_size = x.double().sort(descending=True).values
    assert torch.equal(rest.double(), by_size[:, k] if k < size else torch.full((3,), -math.inf, dtype=torch.float64))
    assert ids.numpy().tolist() == largest_by_definition(x, k).tolist()
    assert torch.equal(found.double(), x.double().gather(-1, ids))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("size", "k"), [(1, 1), (7, 7), (50, 3), (1000, 5), (1003, 5), (4099, 64), (4099, 65)])
def test_the_largest_are_exact_and_equal_ones_come_by_place(
    size: int, k: int, dtype: torch.dtype, compiled: bool
) -> None:
    """Against a stable sort of everything, with many ties, both zeros, and rows that have fewer finite numbers than k."""
    generator = torch.Generator().manual_seed(size + k)
    x = (4 * torch.randn(6, size, generator=generator)).round().to(dtype)
    x[1] = -x[0].abs()
    x[2] = 0.0
    x[2, ::2] = -0.0
    x[3, k // 2 :] = -math.inf
    x[4] += 1e30  # all equal in float32
    with way(compiled):
        values, places, _, _ = head_and_rest(x, k, (1.0,))
    expected = x.double().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(places, expected.indices[:, :k])
    assert torch.equal(values.double(), expected.values[:, :k])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_no_number_is_not_passed_over(dtype: torch.dtype, sign: float) -> None:
    """A teacher that went wrong must show, also where its NaN sorts last: inf - inf has a sign on some machines."""
    x = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 1234] = torch.tensor(math.nan).copysign(torch.tensor(sign))
    targets = SparseTargets.from_logits(x, k=5)
    assert targets.tail_curve[1].isnan().all() and targets.log_probs[1].isnan().all()
    assert targets.tail_curve[0].isfinite().all() and targets.log_probs[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_more_than_there_are_is_refused(dtype: torch.dtype) -> None:
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"{k} largest of 3"):
            head_and_rest(torch.zeros(2, 3, dtype=dtype), k, (1.0,))


@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([2, 40, 513, 3000, 20_000]),
    scale=st.sampled_from([0.01, 2.0, 8.0]),
    knots=st.sampled_from([(0.25, 0.5, 0.75, 0.875, 1.0), (1.0,), (0.125, 1 / 3, 0.9, 1.0), (0.5, 1.0, 2.0)]),
    dtype=st.sampled_from(DTYPES),
    compiled=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_the_tail_is_summed_without_the_head(
    seed: int, size: int, scale: float, knots: tuple[float, ...], dtype: torch.dtype, compiled: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(5, size, generator=generator)).to(dtype)
    k = min(32, size - 1)
    with way(compiled):
        _, head, shift, found = head_and_rest(x, k, knots)
    assert found.dtype == shift.dtype
    left = x.double().scatter(-1, head, -math.inf) - shift.double().unsqueeze(-1)
    exact = torch.stack([torch.logsumexp(knot * left, -1) for knot in knots], -1)
    # Of the terms that weigh anything, within e^-20 of the largest: their exponent is rounded relative to its size, an n-th
    # power has n errors of its root, and a block's place is a sum of size / 512 terms; those of torch are about as many.
    errors = 3 + 20 * max(knots) + size / 512 if compiled else 16 * (3 + 20 * max(knots)) + size / 512
    bound = 1e-12 if dtype == torch.float64 else EPS32 * errors
    torch.testing.assert_close(found.double(), exact, rtol=EPS32, atol=bound)


def test_an_empty_tail_has_no_mass() -> None:
    x = torch.full((2, 600), -math.inf)
    x[:, :3] = torch.tensor([1.0, 0.5, 0.0])
    for dtype in DTYPES:
        _, _, rest, sums = head_and_rest(x.to(dtype), 3, (0.5, 1.0))
        assert torch.isneginf(rest).all() and torch.isneginf(sums).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(150, 5000, generator=torch.Generator().manual_seed(0))).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(head_and_rest(x, 16, (0.5, 1.0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_larger_tensors_are_read_as_they_are(dtype: torch.dtype) -> None:
    x = torch.randn(40, 900, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 100:700]
    found = [head_and_rest(rows, 8, (0.5, 1.0)) for rows in (x, x.contiguous())]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_loops_are_compiled_for_one_kind_of_arguments() -> None:
    """Of two, processes that compile at the same time could take each other's (`compiled`)."""
    for dtype in DTYPES:
        for shape in ((1, 7), (40, 600)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            head_and_rest(x, 4, (0.5, 1.0))
            head_and_rest(x, 0, (0.3, 1.0))
    for kernel in (count_and_sum, largest_bits, sums_of_exp2):
        assert len(kernel.dispatcher.signatures) == 1
