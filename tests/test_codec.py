"""The codec: what rounding to steps may change, and what it may not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.codec import TargetCodec
from pipeline.targets import SparseTargets

KNOTS = (0.25, 0.5, 0.75, 1.0)
# Log-probabilities are float32 of size up to 32: a few roundings of 2^-19 each on top of half a step.
FLOAT_SLACK = 4 * 2.0**-19


def zipf_targets(seed: int, *, vocab_size: int = 3000, k: int = 32, shape=(2, 6), mask=None):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float32)
    slope = 1.0 + 1.5 * torch.rand(*shape, 1, generator=generator)
    logits = -slope * ranks.log() + 0.7 * torch.randn(*shape, vocab_size, generator=generator)
    order = torch.randperm(vocab_size, generator=generator)
    logits = logits[..., order]
    return logits, SparseTargets.from_logits(logits, k=k, mask=mask)


def codec_of(targets: SparseTargets) -> TargetCodec:
    return TargetCodec(k=targets.token_ids.shape[-1], knots=targets.knots, vocab_size=targets.vocab_size)


def roundtrip(targets: SparseTargets) -> SparseTargets:
    codec = codec_of(targets)
    return codec.decode(codec.encode(targets), targets.mask.numpy())


def assert_within_half_a_step(targets: SparseTargets, decoded: SparseTargets) -> None:
    codec = codec_of(targets)
    assert torch.equal(decoded.token_ids, targets.token_ids)
    assert torch.equal(decoded.mask, targets.mask)
    assert (decoded.knots, decoded.vocab_size) == (targets.knots, targets.vocab_size)
    # The head's mass is set right by the tail's: the shift undoes a rounding of at most half a step, and carries over the
    # tail's own rounding, magnified by tail / head <= 33 where the head is smallest (3 %).
    shift = codec.log_prob_step / 2 + 33 * codec.tail_step / 2
    bounds = {"log_probs": codec.log_prob_step / 2 + shift, "tail_curve": codec.tail_step / 2}
    for name, bound in bounds.items():
        exact, rounded = getattr(targets, name), getattr(decoded, name)
        assert rounded.dtype == torch.float32
        assert torch.equal(torch.isneginf(rounded), torch.isneginf(exact)), name
        finite = torch.isfinite(exact)
        assert ((rounded[finite] - exact[finite]).abs() <= bound + FLOAT_SLACK).all(), name


@pytest.mark.parametrize("seed", range(3))
def test_roundtrip(seed: int) -> None:
    _, targets = zipf_targets(seed)
    assert_within_half_a_step(targets, roundtrip(targets))


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 0.1, 3.0]), data=st.data())
@settings(max_examples=40, deadline=None)
def test_roundtrip_of_any_distribution(seed: int, scale: float, data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, vocab_size))
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(1, 5, vocab_size, generator=generator)
    mask = torch.rand(1, 5, generator=generator) < 0.6
    mask[0, 0] = True
    targets = SparseTargets.from_logits(logits, k=k, mask=mask)
    assert_within_half_a_step(targets, roundtrip(targets))


def test_encoding_is_deterministic_and_stable() -> None:
    """What was decoded encodes to the same bytes: re-caching a cache does not drift."""
    _, targets = zipf_targets(5)
    codec = codec_of(targets)
    first = codec.encode(targets)
    second = codec.encode(codec.decode(first, targets.mask.numpy()))
    for name, (dtype, entries) in codec.layout().items():
        assert first[name].dtype == np.dtype(dtype) and first[name].shape == (2, 6, entries)
        assert np.array_equal(first[name], second[name])


@pytest.mark.parametrize("which", ["some", "none", "all"])
def test_positions_without_target(which: str) -> None:
    mask = {"some": torch.arange(12).reshape(2, 6) % 3 != 1, "none": torch.zeros(2, 6).bool()}.get(which)
    _, targets = zipf_targets(6, mask=mask)
    arrays = codec_of(targets).encode(targets)
    for values in arrays.values():
        assert (values[~targets.mask.numpy()] == 0).all()
    decoded = roundtrip(targets)
    empty = ~targets.mask
    assert torch.equal(decoded.mask, targets.mask)
    assert (decoded.token_ids[empty] == -1).all()
    assert torch.isneginf(decoded.log_probs[empty]).all() and torch.isneginf(decoded.tail_curve[empty]).all()
    assert torch.equal(decoded.token_ids, targets.token_ids)


def test_an_empty_tail_stays_empty() -> None:
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0))
    targets = SparseTargets.from_logits(logits, k=9)
    decoded = roundtrip(targets)
    assert torch.isneginf(decoded.tail_curve).all()
    assert_within_half_a_step(targets, decoded)
    log_p, log_tail = decoded.at_temperature(3.0)
    assert torch.isneginf(log_tail).all() and torch.isfinite(log_p).all()


@pytest.mark.parametrize("vocab_size", [2**16 - 1, 2**16, 2**16 + 1, 2**18])
def test_ids_of_large_vocabularies_are_not_aliased(vocab_size: int) -> None:
    logits = torch.randn(1, 2, vocab_size, generator=torch.Generator().manual_seed(0))
    # The last ids are the ones that a narrower integer would fold.
    logits[..., -3:] = torch.tensor([20.0, 21.0, 22.0])
    targets = SparseTargets.from_logits(logits, k=8)
    codec = codec_of(targets)
    assert codec.layout()["token_ids"][0] == ("uint16" if vocab_size <= 2**16 else "uint32")
    decoded = roundtrip(targets)
    assert decoded.token_ids[0, 0, :3].tolist() == [vocab_size - 1, vocab_size - 2, vocab_size - 3]
    assert torch.equal(decoded.token_ids, targets.token_ids)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_loss_of_rounding_is_small(temperature: float) -> None:
    """Mean KL(exact || decoded), both renormalised over the support; uniform rounding errors would make 2.9e-4."""
    _, targets = zipf_targets(7, k=64, shape=(4, 32))
    exact, decoded = (t.at_temperature(temperature)[0].double() for t in (targets, roundtrip(targets)))
    exact, decoded = exact.log_softmax(-1), decoded.log_softmax(-1)
    kl = (exact.exp() * (exact - decoded)).sum(-1)
    assert kl.mean() <= 5e-4
    assert kl.mean() > 0, "nothing was rounded: this test measures nothing"


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_tail_mass_survives_rounding(temperature: float) -> None:
    _, targets = zipf_targets(8, k=64, shape=(4, 32))
    exact, decoded = (t.at_temperature(temperature)[1].double().exp() for t in (targets, roundtrip(targets)))
    # d mass = mass (1 - mass) * (error of F - error of the head's log mass), at most 1/4 (1/1024 + beta/24).
    assert (exact - decoded).abs().max() <= 0.25 * (1 / 1024 + 1 / temperature / 24) + 1e-6


def test_very_unlikely_entries_and_tails_saturate_without_wrapping() -> None:
    logits = torch.tensor([[[0.0, -20.0, -3000.0, -9000.0, -9500.0]]])
    targets = SparseTargets.from_logits(logits, k=4)
    decoded = roundtrip(targets)
    assert decoded.log_probs[0, 0, :3].tolist() == pytest.approx([0.0, -20.0, -3000.0], abs=1 / 24 + 1e-3)
    # 65535 steps are 5461 nats; the tail ends at 64 nats. Both are probability 0 to every float.
    assert decoded.log_probs[0, 0, 3] == pytest.approx(-65535 / 12, abs=0.01)
    assert (decoded.tail_curve <= -63).all() and torch.isfinite(decoded.tail_curve).all()


def test_json_roundtrip() -> None:
    codec = TargetCodec(k=7, knots=(1 / 3, 1.0), vocab_size=100_000, log_prob_step=1 / 10, tail_step=1 / 64)
    value = json.loads(json.dumps(codec.to_json()))
    assert value == codec.to_json()
    assert TargetCodec.from_json(value) == codec
    # Steps and knots come back to the last bit, so that decoding elsewhere gives the same numbers.
    assert TargetCodec.from_json(value).log_prob_step == 1 / 10
    assert TargetCodec.from_json(value).knots == (1 / 3, 1.0)


@pytest.mark.parametrize("change", [{"name": "other"}, {"version": 2}, {"name": None}, {"version": None}], ids=str)
def test_an_unknown_codec_is_refused(change: dict[str, object]) -> None:
    value = {**TargetCodec(4, KNOTS, 50).to_json(), **change}
    with pytest.raises(ValueError, match="unknown target codec"):
        TargetCodec.from_json(value)


@pytest.mark.parametrize("change", [{"k": 5}, {"k": 3}, {"vocab_size": 51}, {"knots": (0.5, 1.0)}], ids=str)
def test_targets_of_another_kind_are_refused(change: dict[str, object]) -> None:
    targets = SparseTargets.from_logits(torch.randn(1, 2, 50), k=4)
    codec = TargetCodec(**{"k": 4, "knots": KNOTS, "vocab_size": 50, **change})
    with pytest.raises(ValueError, match="another kind"):
        codec.encode(targets)


def test_encoding_does_not_modify_the_targets() -> None:
    _, targets = zipf_targets(9, mask=torch.arange(12).reshape(2, 6) % 2 == 0)
    before = {name: getattr(targets, name).clone() for name in ("token_ids", "log_probs", "tail_curve", "mask")}
    codec = codec_of(targets)
    arrays = codec.encode(targets)
    kept = {name: values.copy() for name, values in arrays.items()}
    codec.decode(arrays, targets.mask.numpy())
    assert all(torch.equal(getattr(targets, name), values) for name, values in before.items())
    assert all(np.array_equal(arrays[name], values) for name, values in kept.items())


def test_a_nat_is_twelve_steps() -> None:
    """The numbers on disk are those of the manifest, for readers that are not this program."""
    targets = SparseTargets.from_logits(torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log(), k=2)
    arrays = TargetCodec(2, KNOTS, 4).encode(targets)
    steps = [round(-math.log(p) * 12) for p in (0.5, 0.25)]
    assert arrays["log_prob_steps"][0, 0].tolist() == [steps[0], steps[1] - steps[0]]
    assert arrays["tail_steps"][0, 0].tolist() == [round(math.log(2 * 0.125**beta) * 512) for beta in KNOTS]
    assert arrays["token_ids"][0, 0].tolist() == [0, 1]
