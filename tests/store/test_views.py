"""Views of caches: what they hold, that it is still right, and in which order it comes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cache import (
    Ensemble,
    LogitCache,
    Mixture,
    RowStream,
    ShardShuffle,
    ShorterRows,
    Subset,
    collate,
    distillation_loss,
)
from logit_cache.base.errors import MismatchError
from logit_cache.store.batch import Batch
from logit_cache.store.levels import LEVEL_STEP
from logit_cache.store.mixture import apportion
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.supports import Support
from torch.utils.data import DataLoader

from tests.helpers.synthetic import VOCAB, codec_error, make_cache, teacher_logits, word_tokenizer


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("views") / "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Other rows, a wider head, a larger output layer, the same tokenizer."""
    return make_cache(tmp_path_factory.mktemp("views") / "two", rows=7, seed=5, k=11, vocab_size=VOCAB + 14)


def assert_same(one: Batch, two: Batch) -> None:
    for name in ("input_ids", "labels", "segment_ids"):
        assert torch.equal(one[name], two[name]), name
    for name in ("token_ids", "log_probs", "tail_curve", "mask"):
        assert torch.equal(getattr(one["targets"], name), getattr(two["targets"], name)), name


def test_a_subset_is_those_rows(cache: LogitCache) -> None:
    subset = Subset(cache, [7, 2, 2, 11])
    assert len(subset) == 4 and subset.row_length == cache.row_length
    assert_same(subset.batch([0, 1, 2, 3]), cache.batch([7, 2, 2, 11]))
    assert_same(subset.batch([-1]), cache.batch([11]))
    assert_same(collate([subset[1], subset[3]]), cache.batch([2, 11]))
    with pytest.raises(IndexError, match=r"outside 0\.\.3"):
        subset.batch([4])
    with pytest.raises(IndexError, match=r"outside 0\.\.11"):
        Subset(cache, [12])
    assert Subset(cache, [1]).digest != Subset(cache, [2]).digest


@pytest.mark.parametrize("length", [2, 5, 8, 16])
def test_shorter_rows_hold_what_the_teacher_would_say_of_them(cache: LogitCache, length: int) -> None:
    """The teacher is run again over every piece alone: its distribution is the one that the piece carries."""
    short = ShorterRows(cache, length)
    batch = short.batch(np.arange(len(short)))
    assert batch["input_ids"].shape == (len(short), length)
    again = torch.log_softmax(teacher_logits(batch["input_ids"], batch["segment_ids"]), -1)
    targets = batch["targets"]
    assert targets.mask.any()
    expected = again.gather(-1, targets.token_ids.clamp(min=0)).float()
    error = (targets.log_probs - expected).abs()
    assert (error <= codec_error(expected))[targets.token_ids >= 0].all()
    assert torch.equal(targets.mask, batch["labels"] != -100)
    # Labels still are the next token, and the last one lies beyond the piece.
    inside = batch["labels"][:, :-1]
    assert torch.equal(torch.where(inside == -100, -100, batch["input_ids"][:, 1:]), inside)


def test_shorter_rows_use_each_token_once(cache: LogitCache) -> None:
    short = ShorterRows(cache, 4)
    assert len(short) > len(cache), "rows of several documents give several pieces"
    assert short.kept == len(short) * 4 / (len(cache) * 16) <= 1
    spans = sorted(zip(short._rows.tolist(), short._starts.tolist(), strict=True))
    for (row, start), (next_row, next_start) in itertools.pairwise(spans):
        assert row < next_row or start + 4 <= next_start
    whole = cache.batch(np.arange(len(cache)))["segment_ids"]
    for row, start in spans:
        assert start == 0 or whole[row, start] != whole[row, start - 1], "a piece starts inside a document"


def test_the_length_of_shorter_rows_is_checked(cache: LogitCache) -> None:
    for length in (1, 17):
        with pytest.raises(ValueError, match=r"outside 2\.\.16"):
            ShorterRows(cache, length)


def test_a_mixture_keeps_the_shares(cache: LogitCache, other: LogitCache) -> None:
    mixture = Mixture([cache, other], [0.25, 0.75], rows=40, seed=3)
    counts = np.bincount(mixture._which, minlength=2)
    assert counts.tolist() == [10, 30]
    # 30 of 7 rows: each 4 or 5 times; 10 of 12 rows: none twice.
    assert set(np.bincount(mixture._rows[mixture._which == 1])) == {4, 5}
    assert np.bincount(mixture._rows[mixture._which == 0]).max() == 1
    assert len(Mixture([cache, other])) == len(cache) + len(other)
    assert sorted(Mixture([cache, other])._rows.tolist()) == sorted([*range(12), *range(7)])


def test_a_mixture_is_a_function_of_its_seed(cache: LogitCache, other: LogitCache) -> None:
    def order(seed: int) -> list[int]:
        mixture = Mixture([cache, other], [1, 1], seed=seed)
        return (mixture._which * 100 + mixture._rows).tolist()

    assert order(1) == order(1) != order(2)
    assert Mixture([cache, other], seed=1).digest != Mixture([cache, other], seed=2).digest


def test_mixed_rows_are_their_sources_rows(cache: LogitCache, other: LogitCache) -> None:
    mixture = Mixture([cache, other], [1, 1], seed=1)
    batch = mixture.batch(np.arange(len(mixture)))
    assert mixture.vocab_size == VOCAB + 14 and mixture.knots == cache.knots
    for slot, (which, row) in enumerate(zip(mixture._which, mixture._rows, strict=True)):
        source = (cache, other)[which][int(row)]
        width = source["targets"].token_ids.shape[-1]
        assert torch.equal(batch["input_ids"][slot], source["input_ids"])
        assert torch.equal(batch["targets"].token_ids[slot, :, :width], source["targets"].token_ids)
        assert (batch["targets"].token_ids[slot, :, width:] == -1).all()
        assert torch.equal(batch["targets"].tail_curve[slot], source["targets"].tail_curve)


def test_the_loss_of_a_mixture_is_that_of_its_sources(cache: LogitCache, other: LogitCache) -> None:
    """Padding the narrower head changes nothing."""
    mixture = Mixture([cache, other], seed=1)
    batch = mixture.batch(np.arange(len(mixture)))
    logits = torch.randn(len(mixture), 16, VOCAB + 14, generator=torch.Generator().manual_seed(0))
    together = distillation_loss(logits, batch["targets"], batch["labels"], temperature=2.0)
    total, count = 0.0, 0
    for number, source in enumerate((cache, other)):
        slots = np.flatnonzero(mixture._which == number)
        part = source.batch(mixture._rows[slots])
        loss = distillation_loss(logits[slots], part["targets"], part["labels"], temperature=2.0)
        total += float(loss.kd) * int(loss.positions)
        count += int(loss.positions)
    # The vocabularies differ by a few ids, which enters log|R| at beta = 0 and so the tail between the knots' ends.
    assert float(together.kd) == pytest.approx(total / count, rel=1e-4)


def test_caches_that_do_not_belong_together_are_refused(cache: LogitCache, tmp_path: Path) -> None:
    stranger = make_cache(tmp_path / "stranger", tokenizer=word_tokenizer(VOCAB + 1))
    longer = make_cache(tmp_path / "longer", length=20)
    for view in (Mixture, Ensemble):
        with pytest.raises(MismatchError, match="different tokenizers"):
            view([cache, stranger])
        with pytest.raises(MismatchError, match="rows of 16 and 20 tokens"):
            view([cache, longer])
        with pytest.raises(ValueError, match="weights"):
            view([cache, cache], [1.0, -1.0])
    assert len(Mixture([cache, ShorterRows(longer, 16)])) > len(cache)


def test_caches_with_and_without_samples_are_not_mixed(cache: LogitCache, tmp_path: Path) -> None:
    """Their tails enter the loss in different ways; two kinds of samples, or of heads, go together."""
    threshold = make_cache(tmp_path / "threshold", support=Support("threshold", tau=0.1), seed=2)
    sampled = make_cache(tmp_path / "sampled", support=Support("sampled", draws=9), seed=3)
    for sources in ([cache, threshold], [sampled, cache]):
        with pytest.raises(MismatchError, match="with samples"):
            Mixture(sources)
    mixture = Mixture([threshold, sampled], seed=1)
    targets = mixture.batch(np.arange(len(mixture)))["targets"]
    assert targets.draws is not None
    # Every sample counts as one, so that no mass is counted twice.
    torch.testing.assert_close(targets.weights.sum(-1)[targets.mask], torch.ones(int(targets.mask.sum())))
    Mixture([cache, make_cache(tmp_path / "topp", support=Support("topp", k=8, p=0.9))])


@pytest.mark.parametrize("view", ["subset", "shorter", "mixture", "ensemble"])
def test_document_boundaries_need_no_targets(
    cache: LogitCache, other: LogitCache, view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {
        "subset": lambda: Subset(cache, [3, 1]),
        "shorter": lambda: ShorterRows(cache, 5),
        "mixture": lambda: Mixture([cache, other], [1, 2], seed=2),
        "ensemble": lambda: Ensemble([cache, cache]),
    }[view]()
    some = np.arange(len(rows))[::-1]
    expected = rows.batch(some)["segment_ids"].numpy()
    short = ShorterRows(rows, 4)

    def batch(*_: object) -> Batch:
        raise AssertionError("targets were decoded")

    monkeypatch.setattr(LogitCache, "batch", batch)
    assert np.array_equal(rows.segment_ids(some), expected)
    again = ShorterRows(rows, 4)
    assert np.array_equal(again._rows, short._rows) and np.array_equal(again._starts, short._starts)


def test_different_knots_leave_temperature_one(cache: LogitCache, tmp_path: Path) -> None:
    coarse = make_cache(tmp_path / "coarse", knots=(0.5, 1.0), seed=9)
    mixture = Mixture([cache, coarse])
    assert mixture.knots == (1.0,)
    targets = mixture.batch([0, 1, 2])["targets"]
    log_p, log_tail = targets.at_temperature(1.0)
    total = log_p.exp().sum(-1) + log_tail.exp()
    assert torch.allclose(total[targets.mask], torch.ones(()), atol=1e-6)
    with pytest.raises(ValueError, match="at 1 only"):
        targets.at_temperature(2.0)


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda w: sum(w) > 0.01),
    total=st.integers(0, 10_000),
)
def test_shares_are_whole_and_near(weights: list[float], total: int) -> None:
    counts = apportion(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight * total / sum(weights)) < 1 + 1e-6


def test_a_single_teachers_mean_is_that_teacher(cache: LogitCache) -> None:
    ensemble = Ensemble([cache, cache], [1, 3])
    one, two = ensemble.batch([0, 5]), cache.batch([0, 5])
    assert ensemble.knots == (1.0,)
    # Sets, as entries that the codec rounded to the same step may stand in either order.
    assert torch.equal(one["targets"].token_ids.sort(-1).values, two["targets"].token_ids.sort(-1).values)
    logits = torch.randn(2, 16, VOCAB, generator=torch.Generator().manual_seed(0))
    losses = [distillation_loss(logits, batch["targets"], batch["labels"]).loss for batch in (one, two)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_an_ensemble_of_two_teachers(cache: LogitCache, other: LogitCache, tmp_path: Path) -> None:
    second = make_cache(tmp_path / "second", teacher=1)
    ensemble = Ensemble([cache, second])
    batch = ensemble.batch(np.arange(len(ensemble)))
    exact = (
        sum(
            torch.softmax(teacher_logits(batch["input_ids"], batch["segment_ids"], seed=teacher), -1)
            for teacher in (0, 1)
        )
        / 2
    )
    targets = batch["targets"]
    p = targets.at_temperature(1.0)[0].exp()
    used = (targets.token_ids >= 0) & targets.mask.unsqueeze(-1)
    error = (exact.gather(-1, targets.token_ids.clamp(min=0)) - p)[used]
    # The codec's relative error of half a step, plus the share of a token that one of the two did not keep.
    assert float(error.abs().max()) < 0.5 * LEVEL_STEP + 0.05
    with pytest.raises(MismatchError, match="different numbers of rows"):
        Ensemble([cache, other])
    with pytest.raises(MismatchError, match="different rows"):
        Ensemble([cache, make_cache(tmp_path / "rows", seed=8)]).batch([0])


@pytest.mark.parametrize(("workers", "window"), [(0, None), (2, None), (0, 2), (2, 1)])
def test_a_stream_gives_every_row_once_per_epoch(cache: LogitCache, workers: int, window: int | None) -> None:
    seen: list[torch.Tensor] = []
    for rank in range(2):
        stream = RowStream(cache, seed=4, epochs=2, rank=rank, world_size=2, block=3, window=window)
        loader = DataLoader(stream, batch_size=2, collate_fn=collate, num_workers=workers)
        seen += [row for batch in loader for row in batch["input_ids"]]
    expected = cache.batch(np.arange(len(cache)))["input_ids"]
    counts = [sum(torch.equal(row, other) for other in seen) for row in expected]
    assert counts == [2] * len(cache)


def test_the_order_of_a_stream_is_a_function_of_seed_and_epoch(cache: LogitCache) -> None:
    stream = RowStream(cache, seed=4)
    assert stream.order(0).tolist() == RowStream(cache, seed=4).order(0).tolist()
    assert stream.order(0).tolist() != stream.order(1).tolist() != RowStream(cache, seed=5).order(1).tolist()
    assert RowStream(cache, shuffle=False).order(3).tolist() == list(range(12))
    later = RowStream(cache, seed=4, first_epoch=1)
    assert torch.equal(next(iter(later))["input_ids"], cache[int(stream.order(1)[0])]["input_ids"])
    assert len(RowStream(cache, world_size=5, drop_last=True).order(0)) == 10


def test_the_order_of_a_stream_with_a_window_is_that_of_the_sampler(cache: LogitCache) -> None:
    stream, order = RowStream(cache, seed=4, epochs=2, window=2, block=3), ShardShuffle(cache, seed=4, window=2)
    for epoch, rows in enumerate(torch.stack([row["input_ids"] for row in stream]).split(len(cache))):
        order.set_epoch(epoch)
        assert stream.order(epoch).tolist() == list(order)
        assert torch.equal(rows, cache.batch(stream.order(epoch))["input_ids"])
    few = RowStream(Subset(cache, [1, 2]), epochs=None, window=1, rank=1, world_size=2)
    assert len([row for row, _ in zip(few, range(5), strict=False)]) == 5
    assert not list(RowStream(Subset(cache, [1]), window=1, rank=1, world_size=2))


def test_an_endless_stream_does_not_end(cache: LogitCache) -> None:
    stream = iter(RowStream(Subset(cache, [1, 2]), epochs=None))
    assert len([next(stream) for _ in range(9)]) == 9


def test_targets_beyond_a_smaller_output_layer_move_to_the_tail() -> None:
    """Exactly, at every knot: against a float64 sum over what is outside."""
    logits = 3 * torch.randn(5, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[:, 55] = 6.0  # so that a padding id is in the head
    targets = SparseTargets.from_logits(logits, k=12)
    smaller = targets.restrict_vocabulary(50)
    assert smaller.vocab_size == 50 and int(smaller.token_ids.max()) < 50
    log_p = torch.log_softmax(logits, -1)
    for row in range(5):
        kept = [id for id in smaller.token_ids[row].tolist() if id >= 0]
        assert kept == [id for id in targets.token_ids[row].tolist() if id < 50]
        rest = [v for v in range(60) if v not in kept]
        for column, knot in enumerate(smaller.knots):
            exact = float(torch.logsumexp(knot * log_p[row, rest], 0))
            assert float(smaller.tail_curve[row, column]) == pytest.approx(exact, abs=1e-6)
    assert smaller.restrict_vocabulary(70) is smaller
    student = torch.randn(5, 50)
    with pytest.raises(ValueError, match="50 logits"):
        distillation_loss(student, targets, torch.zeros(5, dtype=torch.long))
    assert math.isfinite(float(distillation_loss(student, smaller, torch.zeros(5, dtype=torch.long)).loss))
