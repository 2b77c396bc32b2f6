"""Targets: what is kept of a full distribution, against a float64 computation that shares no code with it."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.recipe.choices import DEFAULT_KNOTS
from logit_cache.targets.knots import inverse_temperature
from logit_cache.targets.sparse_targets import SparseTargets

ALL_KNOTS = (0.25, 0.5, 0.75, 0.875, 1.0)
EPS32 = 2.0**-24  # half an ulp of 1.0: the relative error of one float32 rounding


def log_sum_exp(values: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf for an empty one."""
    if values.shape[-1] == 0:
        return np.full(values.shape[:-1], -np.inf)
    top = values.max(-1, keepdims=True)
    return np.log(np.exp(values - top).sum(-1)) + top[..., 0]


def reference(logits: torch.Tensor, k: int, betas: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Head ids, their log-probabilities, F(beta) [..., len(betas)], all from the definition, in float64."""
    x = logits.double().numpy()
    log_p = x - log_sum_exp(x)[..., None]
    order = np.argsort(-x, axis=-1, kind="stable")
    sorted_log_p = np.take_along_axis(log_p, order, -1)
    tail = sorted_log_p[..., k:]
    curve = np.stack([log_sum_exp(beta * tail) for beta in betas], -1)
    return order[..., :k], sorted_log_p[..., :k], curve


def full_softmax_split(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p_T on the head, p_T of all others) by a full softmax in float64."""
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    head = log_p.gather(-1, token_ids)
    outside = log_p.exp().scatter(-1, token_ids, 0.0)
    return head, outside.sum(-1)


def zipf_logits(positions: int, vocab_size: int, seed: int) -> torch.Tensor:
    """A peaked distribution with a long power-law tail, as language models give."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float64)
    slope = 1.0 + torch.rand(positions, 1, generator=generator, dtype=torch.float64)
    noise = 0.7 * torch.randn(positions, vocab_size, generator=generator, dtype=torch.float64)
    logits = -slope * ranks.log() + noise
    order = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(positions)])
    return logits.gather(-1, order)


def assert_equals_reference(targets: SparseTargets, logits: torch.Tensor, k: int, atol: float) -> None:
    ids, log_probs, curve = reference(logits, k, targets.knots)
    # Ties may be ordered either way, so it is the chosen logits that must agree; with distinct logits also the ids.
    chosen = logits.double().gather(-1, targets.token_ids)
    torch.testing.assert_close(chosen, logits.double().gather(-1, torch.from_numpy(ids)), rtol=0, atol=0)
    assert all(len(set(row)) == k for row in targets.token_ids.reshape(-1, k).tolist())
    np.testing.assert_allclose(targets.log_probs.double().numpy(), log_probs, rtol=1e-6, atol=atol)
    np.testing.assert_allclose(targets.tail_curve.double().numpy(), curve, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("k", [1, 5, 30, 31])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_head_and_tail_curve_are_those_of_the_full_distribution(k: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(2, 7, 31, generator=torch.Generator().manual_seed(k))).to(dtype)
    targets = SparseTargets.from_logits(logits, k=k)
    assert targets.knots == ALL_KNOTS
    assert targets.token_ids.dtype == torch.int64
    assert targets.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert targets.mask.shape == (2, 7) and targets.mask.all()
    # Logits below 16: a dozen float32 roundings of numbers of that size. bfloat16 logits are exact in float32.
    assert_equals_reference(targets, logits, k, atol=1e-12 if dtype == torch.float64 else 12 * 16 * EPS32)


def test_ids_are_in_rank_order() -> None:
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    targets = SparseTargets.from_logits(logits, k=12)
    assert torch.equal(targets.token_ids, logits.argsort(-1, descending=True)[:, :12])
    assert (targets.log_probs.diff(dim=-1) <= 0).all()


def test_equal_logits_are_in_order_of_their_ids() -> None:
    """Frequent in bfloat16; without an order of their own, equal runs would write different bytes."""
    logits = torch.randint(0, 4, (20, 200), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = SparseTargets.from_logits(logits, k=60)
    tied = targets.log_probs.diff(dim=-1) == 0
    assert tied.any()
    assert (targets.token_ids.diff(dim=-1)[tied] > 0).all()


@pytest.mark.parametrize("k", [1, 5, 30, 31])
def test_extreme_logits(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    logits = torch.where(torch.rand(8, 31, generator=generator) < 0.3, 1e4, -1e4)
    logits = logits + torch.randn(8, 31, generator=generator)
    logits[0] = -1e4 + torch.arange(31)
    logits[1] = 1e4 - torch.arange(31)
    targets = SparseTargets.from_logits(logits, k=k)
    # Numbers between 8192 and 16384 are 2^-10 apart in float32; a few such roundings.
    assert_equals_reference(targets, logits, k, atol=4 * 2.0**-10)
    for temperature in (1.0, 1.7, 2.0, 4.0, 8.0):
        log_p, log_tail = targets.at_temperature(temperature)
        assert not log_p.isnan().any() and not log_tail.isnan().any()
        torch.testing.assert_close(log_p.exp().sum(-1) + log_tail.exp(), torch.ones(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("logits_at", ["uniform", "one-hot"])
def test_limits_of_the_distribution(logits_at: str) -> None:
    logits = torch.zeros(1, 16, dtype=torch.float64)
    if logits_at == "one-hot":
        logits[0, 3] = 800.0
    targets = SparseTargets.from_logits(logits, k=4)
    for temperature in (1.0, 2.0, 4.0):
        log_p, log_tail = targets.at_temperature(temperature)
        if logits_at == "uniform":
            torch.testing.assert_close(log_p, torch.full((1, 4), -math.log(16), dtype=torch.float64))
            assert log_tail.item() == pytest.approx(math.log(12 / 16), abs=1e-12)
        else:
            # exp(-800 / 4) is left to the others: nothing that float64 could show beside 1.
            assert abs(log_p[0, 0].item()) < 1e-80 and targets.token_ids[0, 0] == 3
            assert log_tail.item() == pytest.approx(math.log(12) - 800 / temperature, abs=1e-9)


@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]),
    vocab_size=st.integers(2, 40),
    temperature=st.floats(1.0, 50.0),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_probabilities_sum_to_one_at_every_temperature(
    seed: int, scale: float, vocab_size: int, temperature: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocab_size))
    logits = scale * torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed))
    log_p, log_tail = SparseTargets.from_logits(logits, k=k).at_temperature(temperature)
    total = log_p.double().exp().sum(-1) + log_tail.double().exp()
    # Log-probabilities up to 30 * 12 in size are rounded to 360 * 2^-24 at worst, but only those near 0 weigh.
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=3e-5)
    assert torch.isneginf(log_tail).all() if k == vocab_size else torch.isfinite(log_tail).all()


@pytest.mark.parametrize("knots", [DEFAULT_KNOTS, (0.125, 1 / 3, 0.9), (0.5, 2.0), (0.25, 0.5, 0.75, 2.0)])
def test_at_a_knot_it_is_the_full_softmax(knots: tuple[float, ...]) -> None:
    logits = 4 * torch.randn(6, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = SparseTargets.from_logits(logits, k=20, knots=knots)
    assert targets.knots == tuple(sorted({*knots, 1.0}))
    for knot in targets.knots:
        log_p, log_tail = targets.at_temperature(1 / knot)
        head, outside = full_softmax_split(logits, targets.token_ids, 1 / knot)
        torch.testing.assert_close(log_p, head, rtol=0, atol=1e-10)
        torch.testing.assert_close(log_tail.exp(), outside, rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_between_the_knots_the_tail_mass_is_close(seed: int) -> None:
    logits = zipf_logits(8, 5000, seed)
    targets = SparseTargets.from_logits(logits.float(), k=64)
    for temperature in np.linspace(1.0, 8.0, 43):
        log_p, log_tail = targets.at_temperature(float(temperature))
        head, outside = full_softmax_split(logits.float(), targets.token_ids, float(temperature))
        assert (log_tail.double().exp() - outside).abs().max() <= 0.005, temperature
        # The normaliser is the only other thing that is interpolated: the head's masses are off by no more together.
        assert (log_p.double().exp().sum(-1) - head.exp().sum(-1)).abs().max() <= 0.005, temperature


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail_mass", [1e-9, 1e-20])
def test_a_tiny_tail_keeps_its_precision(dtype: torch.dtype, tail_mass: float) -> None:
    """One minus the head would be 0, or mostly rounding, here."""
    vocab_size, k = 1000, 3
    logits = torch.full((1, vocab_size), math.log(tail_mass / (vocab_size - k)), dtype=dtype)
    logits[0, :k] = torch.tensor([0.5, 0.3, 0.2], dtype=dtype).log()
    targets = SparseTargets.from_logits(logits, k=k)
    _, log_tail = targets.at_temperature(1.0)
    exact = full_softmax_split(logits, targets.token_ids, 1.0)[1].log()
    # Logits of size 55 are rounded to 55 * 2^-24 in float32, a few times.
    assert log_tail.item() == pytest.approx(exact.item(), abs=5 * 55 * EPS32)
    assert log_tail.item() == pytest.approx(math.log(tail_mass), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, -0.5, math.nan, math.inf, -math.inf])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    targets = SparseTargets.from_logits(torch.zeros(1, 5), k=2)
    with pytest.raises(ValueError, match="must be a positive number"):
        targets.at_temperature(temperature)


def test_below_one_needs_a_knot() -> None:
    logits = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for temperature in (0.5, 0.9, 0.99999):
        with pytest.raises(ValueError, match=r"cache\.knots"):
            SparseTargets.from_logits(logits, k=5).at_temperature(temperature)
    targets = SparseTargets.from_logits(logits, k=5, knots=(0.25, 0.5, 0.75, 2.0))
    log_p, log_tail = targets.at_temperature(0.5)
    head, outside = full_softmax_split(logits, targets.token_ids, 0.5)
    torch.testing.assert_close(log_p, head, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_tail, outside.log(), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"inverse temperature 2\.5"):
        targets.at_temperature(0.4)


def test_one_is_always_a_knot() -> None:
    targets = SparseTargets.from_logits(torch.randn(2, 9), k=3, knots=[0.5])
    assert targets.knots == (0.5, 1.0)
    assert SparseTargets.from_logits(torch.randn(2, 9), k=3, knots=[]).knots == (1.0,)


def test_rounding_of_the_temperature_does_not_miss_a_knot() -> None:
    knots = (1 / 3, 1.0)
    assert inverse_temperature(3.0000000000000004, knots) == 1 / 3
    assert inverse_temperature(0.9999999999999999, knots) == 1.0


@pytest.mark.parametrize("k", [0, -1, 8])
def test_k_outside_the_vocabulary_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.7"):
        SparseTargets.from_logits(torch.zeros(2, 7), k=k)


def test_an_unknown_support_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown support 'top'"):
        SparseTargets.from_logits(torch.zeros(2, 7), support="top", k=2)


def test_a_position_without_target_is_empty() -> None:
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    targets = SparseTargets.from_logits(logits, k=4, mask=mask)
    everywhere = SparseTargets.from_logits(logits, k=4)
    assert torch.equal(targets.mask, mask)
    assert (targets.token_ids[~mask] == -1).all()
    assert torch.isneginf(targets.log_probs[~mask]).all() and torch.isneginf(targets.tail_curve[~mask]).all()
    assert (targets.weights[~mask] == 0).all()
    for name in ("token_ids", "log_probs", "tail_curve"):
        assert torch.equal(getattr(targets, name)[mask], getattr(everywhere, name)[mask])
    for temperature in (1.0, 1.5, 2.0, 8.0):
        log_p, log_tail = targets.at_temperature(temperature)
        assert torch.isneginf(log_p[~mask]).all() and torch.isneginf(log_tail[~mask]).all()
        assert torch.isfinite(log_p[mask]).all() and torch.isfinite(log_tail[mask]).all()


def test_weights_are_the_probabilities() -> None:
    logits = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    targets = SparseTargets.from_logits(logits, k=6)
    torch.testing.assert_close(targets.weights, torch.softmax(logits, -1).gather(-1, targets.token_ids))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, 7])
def test_the_callers_logits_are_not_modified(dtype: torch.dtype, k: int) -> None:
    logits = torch.randn(4, 7).to(dtype)
    before = logits.clone()
    mask = torch.tensor([True, False, True, True])
    SparseTargets.from_logits(logits, k=k, mask=mask)
    assert torch.equal(logits, before)
    assert torch.equal(mask, torch.tensor([True, False, True, True]))


def some_targets(*shape: int, seed: int = 0) -> SparseTargets:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*shape, generator=generator) < 0.7
    return SparseTargets.from_logits(torch.randn(*shape, 9, generator=generator), k=3, mask=mask)


TENSORS = ("token_ids", "log_probs", "tail_curve", "mask")


def assert_same(one: SparseTargets, other: SparseTargets) -> None:
    assert (one.knots, one.vocab_size) == (other.knots, other.vocab_size)
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("vocab_size", [5_003, 300_000])
def test_positions_do_not_depend_on_those_beside_them(vocab_size: int) -> None:
    """With a vocabulary so large that few positions are passed over together, too. Numbers may differ by their last bits:
    vectorised logarithms round the last few of an array in another way than the others."""
    logits = torch.randn(23, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    for support in ({"support": "topk", "k": 16}, {"support": "threshold", "tau": 0.05, "seed": torch.arange(23)}):
        whole = SparseTargets.from_logits(logits, **support)
        for few in (slice(0, 2), slice(0, 7), slice(3, 20)):
            seed = {"seed": torch.arange(23)[few]} if "seed" in support else {}
            part = SparseTargets.from_logits(logits[few], **{**support, **seed})
            assert torch.equal(part.token_ids, whole.token_ids[few])
            for name in ("log_probs", "tail_curve"):
                torch.testing.assert_close(getattr(part, name), getattr(whole, name)[few], rtol=2**-21, atol=2**-21)


def test_logits_of_a_model_in_training_give_targets_without_gradient() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for support in ({"support": "topk", "k": 8}, {"support": "threshold", "tau": 0.1}):
        targets = SparseTargets.from_logits(logits.clone().requires_grad_(), **support)
        assert not targets.log_probs.requires_grad and not targets.tail_curve.requires_grad
        assert torch.equal(targets.log_probs, SparseTargets.from_logits(logits, **support).log_probs)


@pytest.mark.parametrize(
    "index", [0, -1, slice(1, 3), (slice(None), 2), [2, 0], torch.tensor([3, 3]), (1, slice(0, 2))], ids=str
)
def test_indexing_is_that_of_every_tensor(index: object) -> None:
    targets = some_targets(4, 5)
    part = targets[index]
    for name in TENSORS:
        assert torch.equal(getattr(part, name), getattr(targets, name)[index])
    assert (part.knots, part.vocab_size) == (targets.knots, targets.vocab_size)


def test_indexing_with_a_mask_keeps_the_marked_positions() -> None:
    targets = some_targets(4, 5)
    part = targets[targets.mask]
    assert part.mask.all() and len(part) == int(targets.mask.sum())
    assert (part.token_ids >= 0).all()


def test_flatten_stack_and_cat() -> None:
    one, other = some_targets(2, 5, seed=1), some_targets(2, 5, seed=2)
    stacked = SparseTargets.stack([one, other])
    assert stacked.mask.shape == (2, 2, 5) and stacked.token_ids.shape == (2, 2, 5, 3)
    assert_same(stacked[0], one)
    assert_same(stacked[1], other)
    joined = SparseTargets.cat([one, other])
    assert len(joined) == 4
    assert_same(joined[:2], one)
    assert_same(joined[2:], other)
    flat = stacked.flatten()
    assert len(flat) == 20
    assert_same(flat[10:], other.flatten())
    assert_same(flat.flatten(), flat)
    # Reducing first and flattening last is the same as the other way round.
    logits = torch.randn(2, 3, 9)
    assert_same(SparseTargets.from_logits(logits, k=3).flatten(), SparseTargets.from_logits(logits.reshape(6, 9), k=3))


def test_samples_are_never_dropped() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    without = SparseTargets.from_logits(logits, k=3)
    sampled = SparseTargets.from_logits(logits, support="threshold", tau=0.2)
    for together in ([without, sampled], [sampled, without]):
        for join in (SparseTargets.stack, SparseTargets.cat):
            with pytest.raises(ValueError, match="with samples and targets without"):
                join(together)
    assert torch.equal(SparseTargets.cat([sampled, sampled])[2:].draws, sampled.draws)


def test_to_moves_every_tensor() -> None:
    moved = some_targets(2, 3).to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in TENSORS)


@pytest.mark.slow
def test_students_do_not_load_the_kernels_of_the_reduction() -> None:
    code = "import sys, logit_cache.distill.stage_two; print(*(m for m in sys.modules if 'targets.red' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
