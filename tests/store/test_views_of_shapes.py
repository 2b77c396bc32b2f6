"""Views of caches whose tails have a shape: it stays right, in one basis or several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache import (
    Ensemble,
    LogitCache,
    Mixture,
    ShorterRows,
    Subset,
    collate,
    distillation_loss,
    fused_distillation_loss,
)
from logit_cache.base.errors import MismatchError
from logit_cache.targets.basis import TailBasis
from logit_cache.targets.mean_targets import MeanTargets
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.supports import Support
from torch.utils.data import DataLoader

from tests.helpers.shapes import LinearTeacher, Shaped
from tests.helpers.synthetic import VOCAB, make_cache

TEMPERATURES = (1.0, 1.5, 4.0)


def basis(seed: int, rank: int = 3, vocab_size: int = VOCAB, softcap: float | None = None) -> TailBasis:
    made = LinearTeacher.random(vocab_size, rank, seed, softcap)
    return TailBasis(made.offset.float(), made.directions.float(), softcap, f"basis {seed}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("views") / "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Other rows, a wider head, a larger output layer, no log-probabilities of labels, the same tokenizer."""
    others = {"rows": 7, "seed": 5, "k": 11, "vocab_size": VOCAB + 14, "label_log_probs": False}
    return make_cache(tmp_path_factory.mktemp("views") / "two", **others)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """The same rows by another teacher."""
    return make_cache(tmp_path_factory.mktemp("views") / "second", teacher=1, k=5)


def assert_equal(one: SparseTargets, two: SparseTargets) -> None:
    assert one.basis is two.basis is not None
    for name in ("token_ids", "tail_coordinates", "label_log_probs", "mask"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_parts_of_one_cache_keep_the_shape(cache: LogitCache) -> None:
    rows = Shaped(cache, basis(0))
    whole = rows.batch(np.arange(len(rows)))["targets"]
    assert_equal(Subset(rows, [7, 2]).batch([0, 1])["targets"], whole[[7, 2]])
    assert_equal(collate([rows[3], rows[1]])["targets"], whole[[3, 1]])
    short = ShorterRows(rows, 4)
    found = short.batch(np.arange(len(short)))["targets"]
    for piece, (row, start) in enumerate(zip(short._rows, short._starts, strict=True)):
        assert_equal(found[piece], whole[int(row), int(start) : int(start) + 4])


def test_a_mixture_of_one_basis_keeps_it(cache: LogitCache, second: LogitCache) -> None:
    shared, copy = basis(0), basis(0)
    sources = [Shaped(cache, shared), Shaped(second, copy, seed=9)]
    mixture = Mixture(sources, seed=1)
    targets = mixture.batch(np.arange(len(mixture)))["targets"]
    assert targets.basis is shared
    for slot, (which, row) in enumerate(zip(mixture._which, mixture._rows, strict=True)):
        expected = sources[which].batch([int(row)])["targets"][0]
        assert torch.equal(targets.tail_coordinates[slot], expected.tail_coordinates)  # type: ignore[index, arg-type]
        assert torch.equal(targets.label_log_probs[slot], expected.label_log_probs)  # type: ignore[index, arg-type]


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_a_mixture_of_several_bases(
    cache: LogitCache, other: LogitCache, second: LogitCache, softcap: float | None
) -> None:
    """Every row has the distribution that its own cache gives it."""
    sources = [Shaped(cache, basis(0, softcap=softcap)), Shaped(second, basis(1, rank=2, softcap=softcap), seed=9)]
    if softcap is None:
        sources.append(Shaped(other, basis(2, rank=4, vocab_size=VOCAB + 14), seed=5))
    mixture = Mixture(sources, seed=1)
    targets = mixture.batch(np.arange(len(mixture)))["targets"]
    assert targets.basis is mixture.batch([0])["targets"].basis
    for temperature in TEMPERATURES:
        dense = targets.dense(temperature)
        for slot, (which, row) in enumerate(zip(mixture._which, mixture._rows, strict=True)):
            own = replace(sources[which].batch([int(row)])["targets"][0], vocab_size=mixture.vocab_size)
            # Shape logits up to some 30 nats, whose sum over joint directions is rounded in another order.
            torch.testing.assert_close(dense[slot], own.dense(temperature), rtol=8 * 30 * 2.0**-23, atol=1e-9)


def test_a_mixture_has_buckets_where_shapes_have_nothing_in_common(
    cache: LogitCache, other: LogitCache, second: LogitCache
) -> None:
    shaped = Shaped(cache, basis(0))
    ensemble = Ensemble([shaped, Shaped(second, basis(1))])
    for sources in (
        [shaped, other],
        [other, shaped],
        [shaped, Shaped(second, basis(1, softcap=3.0))],
        [shaped, ensemble],
    ):
        mixture = Mixture(sources, seed=1)
        for rows in ([0], range(len(mixture))):
            targets = mixture.batch(list(rows))["targets"]
            assert targets.basis is None and targets.tail_coordinates is None
            assert (targets.label_log_probs is None) == (other in sources)
            log_p, log_tail = targets.at_temperature(1.0)
            total = (log_p.exp().sum(-1) + log_tail.exp())[targets.mask]
            torch.testing.assert_close(total, torch.ones_like(total))
    assert Mixture([shaped, ensemble]).knots == (1.0,)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_an_ensemble_is_the_mean_at_every_temperature(
    cache: LogitCache, second: LogitCache, temperature: float
) -> None:
    sources = [Shaped(cache, basis(0)), Shaped(second, basis(1, rank=2, softcap=6.0), seed=9)]
    ensemble = Ensemble(sources, [1, 3])
    batch = ensemble.batch([4, 0])
    targets = batch["targets"]
    assert isinstance(targets, MeanTargets)
    parts = [source.batch([4, 0])["targets"].dense(temperature).double() for source in sources]
    torch.testing.assert_close(
        targets.dense(temperature).double(), 0.25 * parts[0] + 0.75 * parts[1], rtol=4 * 2.0**-24, atol=1e-12
    )
    together = Ensemble([ensemble, sources[0]], [4, 1]).batch([4, 0])["targets"]
    torch.testing.assert_close(
        together.dense(temperature).double(), 0.4 * parts[0] + 0.6 * parts[1], rtol=8 * 2.0**-24, atol=1e-12
    )
    rows = Subset(ShorterRows(ensemble, 8), [1, 0])
    loader = DataLoader(rows, batch_size=2, collate_fn=collate, num_workers=1)
    found = next(iter(loader))["targets"]
    assert torch.equal(found.dense(temperature), rows.batch([0, 1])["targets"].dense(temperature))


def test_the_losses_of_an_ensemble(cache: LogitCache, second: LogitCache) -> None:
    """KL from the mean distribution, in float64; the fused loss, whose chunks do not divide, and its gradient too."""
    batch = Ensemble([Shaped(cache, basis(0)), Shaped(second, basis(1))], [1, 3]).batch([4, 0, 7])
    targets, labels, mask = batch["targets"], batch["labels"], batch["targets"].mask
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 16, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64)
    p = targets.dense(2.0).double()[mask]
    log_q = torch.log_softmax(hidden @ weight.T / 2, -1)[mask]
    exact = 4 * (torch.special.xlogy(p, p) - p * log_q).sum(-1).mean()
    (gradient,) = torch.autograd.grad(exact, hidden)
    plain = distillation_loss(hidden @ weight.T, targets, labels, temperature=2.0).loss
    fused = fused_distillation_loss(hidden, weight, targets, labels, temperature=2.0, chunk_size=7).loss
    for loss in (plain, fused):
        # The targets' probabilities are rounded to float32 in chunks of another size.
        torch.testing.assert_close(loss, exact, rtol=4 * 2.0**-24, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], gradient, rtol=0, atol=4 * 2.0**-24)


def test_teachers_without_a_shape_have_a_mean_at_one(cache: LogitCache, second: LogitCache) -> None:
    plain = Ensemble([cache, second]).batch([0, 5])["targets"]
    some = Ensemble([Shaped(cache, basis(0)), second]).batch([0, 5])["targets"]
    shaped = Ensemble([Shaped(cache, basis(0)), Shaped(second, basis(1))]).batch([0, 5])["targets"]
    assert isinstance(shaped, MeanTargets)
    for targets in (some, shaped.as_bucket()):
        assert type(targets) is SparseTargets and targets.knots == (1.0,) and targets.basis is None
        for name in ("token_ids", "log_probs", "tail_curve", "mask"):
            assert torch.equal(getattr(plain, name), getattr(targets, name)), name


def test_caches_with_samples_have_a_mean_through_their_shapes(cache: LogitCache, tmp_path: Path) -> None:
    threshold = make_cache(tmp_path / "threshold", support=Support("threshold", tau=0.05))
    with pytest.raises(ValueError, match="unless all have a tail shape"):
        Ensemble([cache, threshold])
    with pytest.raises(ValueError, match="unless all have a tail shape"):
        Ensemble([Shaped(cache, basis(0)), threshold])
    sources = [Shaped(cache, basis(0)), Shaped(threshold, basis(1))]
    targets = Ensemble(sources).batch([2])["targets"]
    parts = [source.batch([2])["targets"].dense(2.0) for source in sources]
    torch.testing.assert_close(targets.dense(2.0), (parts[0] + parts[1]) / 2)


def test_teachers_of_one_row_have_targets_at_the_same_positions(cache: LogitCache) -> None:
    class Fewer(Shaped):
        def batch(self, indices):  # type: ignore[no-untyped-def]
            batch = super().batch(indices)
            mask = batch["targets"].mask.clone()
            mask[:, 0] = False
            return {**batch, "targets": replace(batch["targets"], mask=mask)}

    with pytest.raises(MismatchError, match="different positions"):
        Ensemble([Shaped(cache, basis(0)), Fewer(cache, basis(1))]).batch([0])
