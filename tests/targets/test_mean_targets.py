"""The mean of several teachers: over the whole vocabulary where tails have shapes, else over heads and a bucket."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.targets.mean_targets import MeanTargets
from logit_cache.targets.sparse_targets import SparseTargets

from tests.helpers.shapes import TEMPERATURES, LinearTeacher

VOCAB, WIDTH = 50, 5


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), k=st.integers(1, 30), weight=st.floats(0.05, 0.95))
def test_the_mean_of_heads_and_buckets(seed: int, k: int, weight: float) -> None:
    """Against the mean of the full softmaxes, in float64: right where both teachers kept the token, never too high, and
    too low by at most what a teacher can have of a token that it did not keep."""
    generator = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(6, 40, generator=generator, dtype=torch.float64) for _ in range(2)]
    weights = [weight, 1 - weight]
    parts = [SparseTargets.from_logits(x, k=k) for x in logits]
    mean = MeanTargets.of(parts, weights).as_bucket()
    exact = sum(w * torch.softmax(x, -1) for w, x in zip(weights, logits, strict=True))
    log_p, log_tail = mean.at_temperature(1.0)
    used = mean.token_ids >= 0
    difference = torch.where(used, exact.gather(-1, mean.token_ids.clamp(min=0)) - log_p.exp().double(), 0.0)
    # float32 log-probabilities of up to about 20 nats.
    rounding = 20 * 2.0**-23
    bound = sum(w * part.log_probs[:, -1:].double().exp() for w, part in zip(weights, parts, strict=True))
    assert (difference > -rounding).all() and (difference < bound + rounding).all()
    assert torch.allclose(log_p.exp().sum(-1) + log_tail.exp(), torch.ones(()), atol=1e-5)
    for row in range(6):
        ids = [id for id in mean.token_ids[row].tolist() if id >= 0]
        assert sorted(ids) == sorted({*parts[0].token_ids[row].tolist(), *parts[1].token_ids[row].tolist()})
    values = log_p.clone()
    assert (values[:, :-1] >= values[:, 1:]).all(), "most probable first"


def two_teachers(positions: int = 6) -> tuple[list[LinearTeacher], list[torch.Tensor], list[SparseTargets]]:
    """Teachers of unequal vocabularies and soft-capping, one of whose targets have samples."""
    teachers = [LinearTeacher.random(VOCAB, WIDTH, 1), LinearTeacher.random(VOCAB + 4, WIDTH + 2, 2, softcap=4.0)]
    states = [teacher.states(positions, seed) for seed, teacher in enumerate(teachers)]
    supports = [{"k": 6}, {"support": "threshold", "tau": 0.05}]
    targets = [t.targets(s, **support) for t, s, support in zip(teachers, states, supports, strict=True)]
    return teachers, states, targets


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_mean_over_the_whole_vocabulary(temperature: float) -> None:
    """With all coordinates every member is its teacher, so the mean is that of the full softmaxes, at any T."""
    teachers, states, targets = two_teachers()
    mean = MeanTargets.of(targets, [0.3, 0.7])
    parts = [t.probabilities(s, temperature) for t, s in zip(teachers, states, strict=True)]
    exact = 0.7 * parts[1]
    exact[:, :VOCAB] += 0.3 * parts[0]
    assert mean.vocab_size == VOCAB + 4
    torch.testing.assert_close(mean.dense(temperature), exact, rtol=1e-11, atol=1e-14)
    # A mean of means is flat.
    nested = MeanTargets.of([mean, targets[0]], [0.5, 0.5])
    assert len(nested.members) == 3 and sum(nested.weights) == pytest.approx(1)
    expected = exact / 2
    expected[:, :VOCAB] += parts[0] / 2
    torch.testing.assert_close(nested.dense(temperature), expected, rtol=1e-11, atol=1e-14)


def test_few_coordinates_give_the_mean_of_the_members() -> None:
    teachers, states, _ = two_teachers()
    targets = [t.targets(s, t.basis(2), k=5) for t, s in zip(teachers, states, strict=True)]
    mean = MeanTargets.of(targets, [0.25, 0.75]).restrict_vocabulary(VOCAB - 3)
    for temperature in TEMPERATURES:
        parts = [part.restrict_vocabulary(VOCAB - 3).dense(temperature) for part in targets]
        torch.testing.assert_close(mean.dense(temperature), 0.25 * parts[0] + 0.75 * parts[1])
        torch.testing.assert_close(mean.dense(temperature).sum(-1), torch.ones(6, dtype=torch.float64))


def test_samples_count_to_the_bucket() -> None:
    _, _, targets = two_teachers()
    bucket = MeanTargets.of(targets, [0.0, 1.0]).as_bucket()
    head = targets[1].head_mask
    assert bucket.draws is None and int((bucket.token_ids >= 0).sum()) == int(head.sum())
    expected = targets[1].at_temperature(1.0)[1]
    torch.testing.assert_close(bucket.at_temperature(1.0)[1].double(), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="mean of several teachers"):
        bucket.at_temperature(2.0)


def test_a_member_without_a_shape_has_no_dense_mean() -> None:
    _, _, targets = two_teachers()
    bucket = SparseTargets.from_logits(torch.randn(6, VOCAB), k=3)
    with pytest.raises(ValueError, match="no tail shape"):
        MeanTargets.of([targets[0], bucket], [0.5, 0.5]).dense(1.0)
    with pytest.raises(ValueError, match="inverse temperature"):
        MeanTargets.of(targets, [0.5, 0.5]).dense(0.25)


def test_the_labels_probability_is_the_mean() -> None:
    _, _, targets = two_teachers()
    some = [
        replace(t, label_log_probs=torch.tensor([-1.0, -0.5, 0.0, -9.0, -30.0, -2.0]) * (n + 1))
        for n, t in enumerate(targets)
    ]
    found = MeanTargets.of(some, [0.3, 0.7]).as_bucket().label_log_probs
    exact = (0.3 * some[0].label_log_probs.double().exp() + 0.7 * some[1].label_log_probs.double().exp()).log()  # type: ignore[union-attr]
    torch.testing.assert_close(found, exact.float())
    assert MeanTargets.of([some[0], targets[1]], [0.3, 0.7]).as_bucket().label_log_probs is None


def test_a_mean_is_indexed_joined_and_moved_like_targets() -> None:
    _, _, targets = two_teachers()
    mean = MeanTargets.of(targets, [0.3, 0.7])
    whole = mean.dense(2.0)
    assert len(mean) == 6 and mean.mask.all()
    for index in (slice(1, 4), torch.tensor([5, 0, 5])):
        torch.testing.assert_close(mean[index].dense(2.0), whole[index])
    shaped = mean.unflatten((2, 3))
    assert shaped.mask.shape == (2, 3)
    torch.testing.assert_close(shaped.dense(2.0), whole.reshape(2, 3, -1))
    assert torch.equal(shaped.flatten().dense(2.0), whole)
    assert torch.equal(MeanTargets.stack([shaped[0], shaped[1]]).dense(2.0), shaped.dense(2.0))
    assert torch.equal(pickle.loads(pickle.dumps(mean)).dense(2.0), whole)
    moved = mean.to("meta")
    assert moved.mask.device.type == "meta"
    assert all(member.basis is not None and member.basis.offset.device.type == "meta" for member in moved.members)
    if torch.cuda.is_available():
        assert torch.equal(mean.pin_memory().dense(2.0), whole)
