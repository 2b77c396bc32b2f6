"""The kernels of a GPU for logits: run by Triton's interpreter where there is no GPU, and compiled for an H100."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.recipe.choices import DEFAULT_KNOTS
from logit_cache.targets.draws import BLOCK, draw_tail
from logit_cache.targets.knots import common_base
from logit_cache.targets.reduction import head_and_rest
from logit_cache.targets.sparse_targets import SparseTargets
from torch import Tensor

from tests.helpers.triton_kernels import DEVICE, compiled_for_h100

pytest.importorskip("triton", reason="Triton is not installed: on Linux the extra `dev` brings it")

from logit_cache.targets.draws_triton import block_masses, places_inside
from logit_cache.targets.reduction_triton import fused_head_and_rest, launch_constants

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # of NumPy, which the interpreter calls
EPS32 = 2.0**-24  # half an ulp of 1
KNOTS = (*DEFAULT_KNOTS, 1.0)
BASE, MULTIPLES = common_base(KNOTS)


def normal(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(x_NV: Tensor, k: int, tile: int = 512) -> None:
    """The kernel against its definition in float64: values and ids exactly, sums to the roundings of float32."""
    size = x_NV.shape[-1]
    found = fused_head_and_rest(x_NV.to(DEVICE), k, BASE, MULTIPLES, tile=tile)
    values, ids, sums = (part.cpu() for part in found)
    exact = x_NV.double().sort(dim=-1, descending=True, stable=True)
    most = min(k + 1, size)
    assert ids.tolist() == exact.indices[:, :most].tolist()
    assert torch.equal(values.double(), exact.values[:, :most])
    left = x_NV.double().scatter(-1, ids[:, :k], -math.inf)
    shift = torch.where(values[:, k] == -math.inf, 0.0, values[:, k].double()) if k < size else torch.zeros(len(x_NV))
    expected = torch.stack([torch.logsumexp(knot * (left - shift[:, None]), -1) for knot in KNOTS], -1)
    # A term has the errors of its exponent, of exp2 (2 ulp on a GPU) and of 8 powers of it, once more for its block; a
    # lane's sum those of its terms.
    bound = EPS32 * (2 * (3 + 20 + 8 * 4) + size / tile + 64)
    torch.testing.assert_close(sums.double(), expected, rtol=EPS32, atol=bound)


@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 9, 511, 512, 1030]),
    values=st.sampled_from(["distinct", "few", "equal", "infinite", "zeros"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
@settings(max_examples=15, deadline=None)
@pytest.mark.slow
def test_the_kernel_is_its_definition(
    seed: int, size: int, values: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    x = normal(seed, 2, size)
    some = torch.rand(2, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    if values == "few":
        x = x.round()
    elif values == "equal":
        x = torch.full_like(x, -1.5)
    elif values == "infinite":
        x = torch.where(some, -math.inf, x)
    elif values == "zeros":
        x = torch.where(some, -0.0, 0.0)
    check(x.to(dtype), data.draw(st.integers(0, min(size, 70))))


@pytest.mark.parametrize(("size", "k"), [pytest.param(530, 512, marks=pytest.mark.slow), (70, 69), (70, 70), (70, 0)])
def test_heads_of_all_sizes(size: int, k: int) -> None:
    check(normal(size + k, 1, size), k)


def test_no_more_candidates_than_are_wanted() -> None:
    """The k + 1 largest lie in a block each, and one of the others holds the next."""
    x = normal(4, 1, 1030) - 50
    x[0, 3::96] = torch.arange(11.0)
    assert launch_constants(1030, 10, MULTIPLES)["W"] < 96
    check(x, 10)


def test_what_lies_between_rows_is_nothing() -> None:
    """Rows of an odd vocabulary are loaded to a multiple of 16, where the memory of the tensor has it."""
    room = torch.full((3, 80), math.nan)
    room[:, 3:73] = normal(0, 3, 70)
    check(room[:, 3:73], 9)
    room[:, 10:] = normal(0, 3, 70)
    check(room[:, 10:], 9)


def test_heads_of_the_usual_sizes_share_a_kernel() -> None:
    """Compiling one takes seconds."""
    assert launch_constants(128_256, 16, MULTIPLES) == launch_constants(128_256, 64, MULTIPLES)


@pytest.mark.slow
def test_more_candidates_than_there_is_room_for() -> None:
    """All equal; equal ones behind a few large ones, the last of them far back; neighbours in one block."""
    x = torch.full((3, 2100), -2.0)
    x[1, [3, 700, 2099]] = torch.tensor([5.0, 7.0, 5.0])
    x[2] = normal(0, 2100)
    x[2, 64:256] = 30 - torch.arange(192) / 7
    check(x, 20)


@contextmanager
def kernels() -> Iterator[None]:
    """Everything that has a kernel runs it, on this device."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("reduction", "draws"):
            patch.setattr(f"logit_cache.targets.{module}.has_kernels", lambda x: x.dtype != torch.float64)
        yield


def test_rows_that_are_no_distribution_have_nan_as_on_a_cpu() -> None:
    x = normal(1, 6, 900).bfloat16()
    x[0, 3] = math.nan
    x[1, 800] = torch.tensor(math.nan).copysign(torch.tensor(-1.0))
    x[2, 500] = math.inf
    x[3, [7, 90, 300, 640, 700, 800]] = math.inf  # more than the head
    x[4] = -math.inf
    expected = SparseTargets.from_logits(x, k=5)
    with kernels():
        found = SparseTargets.from_logits(x.to(DEVICE), k=5).to("cpu")
    no_numbers = [torch.cat([t.log_probs, t.tail_curve], -1).isnan() for t in (expected, found)]
    assert torch.equal(*no_numbers)
    assert no_numbers[0].any(-1).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize(
    "support",
    [
        {"support": "topk", "k": 12},
        {"support": "topp", "k": 12, "p": 0.6},
        {"support": "threshold", "tau": 0.02},
        {"support": "sampled", "draws": 40},
    ],
    ids=lambda support: str(support["support"]),
)
def test_targets_are_those_of_a_cpu(support: dict[str, object]) -> None:
    """Ids and draws too: no point of these lies within a rounding of the boundary of two tokens."""
    x = normal(2, 3, 777).bfloat16()
    x[0, :9] = -math.inf
    expected = SparseTargets.from_logits(x, seed=5, **support)  # type: ignore[arg-type]
    with kernels():
        found = SparseTargets.from_logits(x.to(DEVICE), seed=5, **support).to("cpu")  # type: ignore[arg-type]
    assert torch.equal(found.token_ids, expected.token_ids)
    assert (found.draws is None) == (expected.draws is None)
    assert found.draws is None or torch.equal(found.draws, expected.draws)
    for name in ("log_probs", "tail_curve"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=2e-6)


def test_rows_and_tokens_with_a_stride_and_knots_without_a_base() -> None:
    points = torch.rand(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apart = normal(6, 600, 2).T
    with kernels():
        found = draw_tail(apart.to(DEVICE), torch.full((2, 0), -1, device=DEVICE), points.to(DEVICE))
    assert torch.equal(found.cpu(), draw_tail(apart, torch.full((2, 0), -1), points))
    x = normal(3, 2, 700)[:, 50:650]
    for knots in ((0.5, 1.0), (0.123, 1.0)):
        expected = head_and_rest(x, 7, knots)
        with kernels():
            found = head_and_rest(x.to(DEVICE), 7, knots)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-6, atol=2e-6)


def launch(kernel: str, size: int, k: int = 0, dtype: str = "bfloat16") -> None:
    """A kernel for a row of logits in the room that stage one gives them."""
    x = torch.empty(2, -(-size // 64) * 64, dtype=getattr(torch, dtype))[:, :size]
    if kernel == "reduction":
        fused_head_and_rest(x, k, BASE, MULTIPLES)
    elif kernel == "masses of blocks":
        block_masses(x, torch.zeros(2, 3, dtype=torch.int64), BLOCK)
    else:
        cut, shift, blocks = torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 50, dtype=torch.int64)
        places_inside(x, cut, shift, blocks, blocks.double(), BLOCK)


@pytest.mark.slow
def test_kernels_compile_for_an_h100_without_spills(record_property: pytest.RecordProperty) -> None:
    """Of the usual sizes."""
    cases: list[tuple[Any, ...]] = [
        ("reduction", size, k) for size, k in ((49_152, 64), (50_257, 64), (49_152, 512), (262_144, 512))
    ]
    cases += [("masses of blocks", 128_256), ("places inside", 128_256)]
    for case, taken in zip(cases, compiled_for_h100(launch, *cases), strict=True):
        record_property(str(case), str(taken))
        assert taken.spilled_bytes == taken.stack_bytes == 0, (case, taken)
        assert taken.registers * taken.warps * 32 <= 65536 // 2, f"{case}: fewer than two programs on a multiprocessor"
        # The pass over the row: 16 bytes at a time, also where a row is no multiple of them.
        assert case[0] == "places inside" or taken.loads["v4.b32"] == 2, (case, taken)
