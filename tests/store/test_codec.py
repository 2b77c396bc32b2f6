"""The codec: what rounding to levels may change, and what it may not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.recipe.choices import DEFAULT_KNOTS
from logit_cache.store.arrays import Rows, StoredRows
from logit_cache.store.codec import TargetCodec
from logit_cache.store.entry_kernels import curve_of_steps, read_bands, read_ids, scale_levels, spread
from logit_cache.store.levels import LEVEL_GROWTH, LEVEL_STEP, TOP_ENTRIES
from logit_cache.store.masses import HEAD_MASS_STEP, TAIL_STEP
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.supports import Support

KNOTS = (0.25, 0.5, 0.75, 1.0)
FLOAT_SLACK = 1e-4  # log-probabilities are float32 of size up to 32: a dozen roundings of 2^-20
SUPPORTS = [
    Support("topk", k=1),
    Support("topk", k=32),
    Support("topp", k=32, p=0.8),
    Support("threshold", tau=0.05),
    Support("threshold", tau=1.0),
    Support("sampled", draws=20),
]


def zipf_logits(seed: int, shape: tuple[int, ...], vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float32)
    slope = 1.0 + 1.5 * torch.rand(*shape, 1, generator=generator)
    logits = -slope * ranks.log() + 0.7 * torch.randn(*shape, vocab_size, generator=generator)
    return logits[..., torch.randperm(vocab_size, generator=generator)]


def targets_of(
    logits: torch.Tensor, support: Support, mask: torch.Tensor | None = None, knots: tuple[float, ...] = DEFAULT_KNOTS
) -> SparseTargets:
    rule = {**support.to_json()}
    return SparseTargets.from_logits(logits, support=rule.pop("name"), mask=mask, knots=knots, **rule)


def contexts_of(targets: SparseTargets) -> np.ndarray:
    """A token for every position; few kinds, so that codebooks have something to learn."""
    return (np.arange(targets.mask.numel()) % min(5, targets.vocab_size)).reshape(targets.mask.shape)


def codec_of(targets: SparseTargets, support: Support, profile: str = "compact", learn: bool = True) -> TargetCodec:
    codec = TargetCodec(support, targets.knots, targets.vocab_size, profile)
    return codec.learn(targets, contexts_of(targets), 100 * targets.mask.numel()) if learn else codec


def rows_of(rows: Rows) -> StoredRows:
    return {name: list(values) for name, values in rows.items()}


def same_rows(one: Rows, other: Rows) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


def roundtrip(targets: SparseTargets, codec: TargetCodec) -> SparseTargets:
    arrays = codec.encode(targets, contexts_of(targets))
    return codec.decode(rows_of(arrays), contexts_of(targets), targets.mask.numpy())


def by_id(targets: SparseTargets) -> tuple[torch.Tensor, ...]:
    """Entries in the order of their ids, head apart from samples: the order inside a band is not kept."""
    width = targets.token_ids.shape[-1]
    draws = torch.zeros_like(targets.token_ids) if targets.draws is None else targets.draws
    key = torch.where(targets.token_ids < 0, 2**40, targets.token_ids + (draws > 0) * 2**32)
    order = key.argsort(-1)
    assert width == order.shape[-1]
    return tuple(t.gather(-1, order) for t in (targets.token_ids, targets.log_probs, draws))


def same_width(one: SparseTargets, other: SparseTargets) -> tuple[SparseTargets, SparseTargets]:
    both = SparseTargets.cat([one, other])
    return both[: len(one)], both[len(one) :]


def assert_close(targets: SparseTargets, decoded: SparseTargets) -> None:
    """All that rounding may do, from the definitions in the codec's docstring."""
    targets, decoded = same_width(targets, decoded)
    if targets.knots == (1.0,) and targets.draws is not None:
        # Samples are worth what they stand for, and nothing else is kept of them.
        targets = replace(targets, log_probs=torch.where(targets.draws > 0, targets.weights.log(), targets.log_probs))
    assert torch.equal(decoded.mask, targets.mask)
    assert (decoded.knots, decoded.vocab_size) == (targets.knots, targets.vocab_size)
    (ids, exact, drawn), (decoded_ids, rounded, decoded_drawn) = by_id(targets), by_id(decoded)
    assert torch.equal(ids, decoded_ids)
    assert torch.equal(drawn, decoded_drawn)
    assert torch.equal(decoded.head_mask.sum(-1), targets.head_mask.sum(-1))
    used = ids >= 0
    assert rounded.dtype == torch.float32
    assert torch.isneginf(rounded[~used]).all() and torch.isfinite(rounded[used]).all()
    # The teacher's first choice stays first.
    has_head = targets.head_mask.any(-1)
    assert torch.equal(decoded.token_ids[has_head][..., 0], targets.token_ids[has_head][..., 0])
    # Half a step at x nats below the first, b / a x wide in relation; the sum is then set right, which moves all by no
    # more than the largest rounding, and by the head mass's own rounding.
    reference = torch.where(has_head, targets.log_probs[..., 0], 0.0).unsqueeze(-1)
    below = torch.where(used, reference - exact, 0.0).clamp(max=1e4)
    step = LEVEL_STEP + LEVEL_GROWTH * below
    half = torch.where(used, step / 2 * math.exp(LEVEL_GROWTH / 2), 0.0)
    shift = half.amax(-1, keepdim=True) + HEAD_MASS_STEP / 2
    within = torch.where(used, (rounded - exact).abs(), 0.0) <= half + shift + FLOAT_SLACK
    saturated = below > 5000
    assert (within | saturated).all()
    # F(1) moves by at most half a step of the log-odds; at the other knots by half a step.
    for place, knot in enumerate(targets.knots):
        f, g = targets.tail_curve[..., place], decoded.tail_curve[..., place]
        assert torch.equal(torch.isneginf(f), torch.isneginf(g))
        bound = HEAD_MASS_STEP / 2 if knot == 1.0 else TAIL_STEP / 2
        ok = torch.isneginf(f) | ((f - g).abs() <= bound + FLOAT_SLACK) | (f < -200)
        assert ok.all(), knot


@pytest.mark.parametrize("knots", [DEFAULT_KNOTS, (1.0,)], ids=["any T", "T = 1"])
@pytest.mark.parametrize("profile", ["compact", "fast"])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_roundtrip(support: Support, profile: str, knots: tuple[float, ...]) -> None:
    mask = torch.arange(4 * 16).reshape(4, 16) % 7 != 3
    for this_mask in (None, mask, torch.zeros(4, 16).bool()):
        targets = targets_of(zipf_logits(1, (4, 16), 3000), support, this_mask, knots)
        for learn in (True, False):
            assert_close(targets, roundtrip(targets, codec_of(targets, support, profile, learn)))


@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.1, 3.0, 300.0]),
    profile=st.sampled_from(["compact", "fast"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_roundtrip_of_any_distribution(seed: int, scale: float, profile: str, data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, vocab_size))
    support = data.draw(
        st.sampled_from(
            [
                Support("topk", k=k),
                Support("topp", k=k, p=0.7),
                Support("threshold", tau=data.draw(st.sampled_from([0.02, 0.3, 1.0]))),
                Support("sampled", draws=data.draw(st.integers(1, 30))),
            ]
        )
    )
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, 5, vocab_size, generator=generator)
    mask = torch.rand(2, 5, generator=generator) < 0.6
    targets = targets_of(logits, support, mask, data.draw(st.sampled_from([DEFAULT_KNOTS, (1.0,)])))
    assert_close(targets, roundtrip(targets, codec_of(targets, support, profile)))


@pytest.mark.parametrize("knots", [DEFAULT_KNOTS, (1.0,)], ids=["any T", "T = 1"])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_what_was_decoded_encodes_to_the_same_bytes(support: Support, knots: tuple[float, ...]) -> None:
    """Re-caching a cache does not drift."""
    targets = targets_of(zipf_logits(5, (3, 8), 500), support, knots=knots)
    codec = codec_of(targets, support)
    first = codec.encode(targets, contexts_of(targets))
    assert {name: rows[0].dtype.name for name, rows in first.items()} == codec.layout()
    for name, shape in codec.shapes(8).items():
        # Those of fixed length may still have to be filled up.
        assert shape is None or all(len(row) <= math.prod(shape) for row in first[name]), name
    decoded = codec.decode(rows_of(first), contexts_of(targets), targets.mask.numpy())
    second = codec.encode(decoded, contexts_of(targets))
    assert same_rows(first, second)


@pytest.mark.parametrize("knots", [DEFAULT_KNOTS, (1.0,)], ids=["any T", "T = 1"])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_both_profiles_store_the_same_levels(support: Support, knots: tuple[float, ...]) -> None:
    """`compact` as steps by a compiled loop, `fast` by array operations: the nearest level of every entry."""
    targets = targets_of(zipf_logits(8, (3, 9), 900), support, torch.rand(3, 9) < 0.8, knots)
    compact, fast = (
        codec_of(targets, support, profile).encode(targets, contexts_of(targets)) for profile in ("compact", "fast")
    )
    used = (targets.token_ids >= 0) if len(knots) > 1 else targets.head_mask
    for row, leveled_L in enumerate(used.sum(-1).tolist()):
        top, rest, levels = compact["top_steps"][row], compact["rest_steps"][row], fast["levels"][row].astype(int)
        for leveled in leveled_L:
            in_top = min(leveled, TOP_ENTRIES)
            steps = [*top[:in_top].tolist(), *rest[: leveled - in_top].tolist()]
            assert np.cumsum(steps).tolist() == levels[:leveled].tolist()
            top, rest, levels = top[in_top:], rest[leveled - in_top :], levels[leveled:]
        assert len(top) == len(rest) == len(levels) == 0


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_rows_decode_alone_as_they_do_together(support: Support) -> None:
    targets = targets_of(zipf_logits(6, (5, 12), 800), support, torch.rand(5, 12) < 0.8)
    codec, contexts = codec_of(targets, support), contexts_of(targets)
    arrays = codec.encode(targets, contexts)
    together = codec.decode(rows_of(arrays), contexts, targets.mask.numpy())
    for row in range(5):
        one = slice(row, row + 1)
        alone = codec.decode(
            rows_of({name: values[one] for name, values in arrays.items()}), contexts[one], targets.mask[one].numpy()
        )
        one_of_all, alone = same_width(together[one], alone)
        assert torch.equal(one_of_all.token_ids, alone.token_ids)
        # The sum over a position may be taken in another order: a few float32 roundings.
        used = alone.token_ids >= 0
        torch.testing.assert_close(one_of_all.log_probs[used], alone.log_probs[used], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("support", [Support("threshold", tau=0.05), Support("sampled", draws=20)], ids=str)
def test_samples_for_one_temperature_have_no_levels(support: Support) -> None:
    """Where T is 1 only, levels are stored of the head alone, and the samples' weights are those of the exact
    targets."""
    targets = targets_of(zipf_logits(11, (4, 16), 3000), support, knots=(1.0,))
    codec = codec_of(targets, support)
    arrays = codec.encode(targets, contexts_of(targets))
    assert "tail_steps" not in arrays
    levels = sum(np.count_nonzero(row) for name in ("top_steps", "rest_steps") for row in arrays[name])
    assert levels <= int(targets.head_mask.sum())
    exact, decoded = same_width(targets, roundtrip(targets, codec))
    samples, rounded = (
        torch.where(t.draws > 0, t.weights, 0.0).gather(-1, t.token_ids.argsort(-1)) for t in (exact, decoded)
    )
    # The tail's mass moves by half a step of its log-odds, and all its samples with it.
    torch.testing.assert_close(rounded, samples, rtol=math.expm1(HEAD_MASS_STEP / 2) + FLOAT_SLACK, atol=0)
    with pytest.raises(ValueError, match="have it at"):
        decoded.at_temperature(2.0)


def test_an_empty_tail_stays_empty() -> None:
    support = Support("topk", k=9)
    targets = targets_of(torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)), support)
    decoded = roundtrip(targets, codec_of(targets, support))
    assert torch.isneginf(decoded.tail_curve).all()
    log_p, log_tail = decoded.at_temperature(3.0)
    assert torch.isneginf(log_tail).all() and torch.isfinite(log_p).all()


@pytest.mark.parametrize("profile", ["compact", "fast"])
@pytest.mark.parametrize("vocab_size", [2**16 - 1, 2**16, 2**16 + 1, 2**18, 2**20])
def test_ids_of_large_vocabularies_are_not_aliased(vocab_size: int, profile: str) -> None:
    logits = torch.randn(1, 2, vocab_size, generator=torch.Generator().manual_seed(0))
    # The last ids are the ones that a narrower integer would fold.
    logits[..., -3:] = torch.tensor([20.0, 21.0, 22.0])
    for support in (Support("topk", k=8), Support("threshold", tau=0.1), Support("sampled", draws=9)):
        targets = targets_of(logits, support)
        decoded = roundtrip(targets, codec_of(targets, support, profile))
        exact, rounded = same_width(targets, decoded)
        assert torch.equal(by_id(rounded)[0], by_id(exact)[0])
        assert vocab_size - 1 in decoded.token_ids[0, 0]


def test_equal_targets_give_equal_bytes() -> None:
    support = Support("threshold", tau=0.03)
    one, other = (targets_of(zipf_logits(2, (3, 9), 700), support) for _ in range(2))
    books = [codec_of(targets, support) for targets in (one, other)]
    assert books[0].to_json() == books[1].to_json()
    a, b = (codec.encode(targets, contexts_of(targets)) for codec, targets in zip(books, (one, other), strict=True))
    assert same_rows(a, b)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("k", [64, 128])
def test_the_loss_of_rounding_is_small(temperature: float, k: int) -> None:
    """Mean KL(exact || decoded), both renormalised over the support; at the levels' steps about 1/24 sum p s^2."""
    support = Support("topk", k=k)
    targets = targets_of(zipf_logits(7, (4, 32), 3000), support)
    decoded = roundtrip(targets, codec_of(targets, support))
    exact, rounded = (
        SparseTargets(*(*by_id(t)[:2], t.tail_curve, t.mask, t.knots, t.vocab_size)).at_temperature(temperature)[0]
        for t in (targets, decoded)
    )
    exact, rounded = exact.double().log_softmax(-1), rounded.double().log_softmax(-1)
    kl = (exact.exp() * (exact - rounded)).sum(-1)
    assert kl.mean() <= 5e-4
    assert kl.mean() > 0, "nothing was rounded: this test measures nothing"


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 4.0])
def test_the_tail_mass_survives_rounding(temperature: float) -> None:
    support = Support("topk", k=64)
    targets = targets_of(zipf_logits(8, (4, 32), 3000), support)
    exact, decoded = (
        t.at_temperature(temperature)[1].double().exp()
        for t in (targets, roundtrip(targets, codec_of(targets, support)))
    )
    error = (exact - decoded).abs()
    # Log-odds of the tail move by F's own rounding, and by that of the head's sum, set right at T = 1: together below
    # 1/4 of a few hundredths.
    assert error.max() <= 0.005
    assert error.mean() <= 0.001


def test_tokens_of_vanishing_probability_saturate_without_wrapping() -> None:
    support = Support("topk", k=4)
    targets = targets_of(torch.tensor([[[0.0, -20.0, -3000.0, -90000.0, -95000.0]]]), support)
    decoded = roundtrip(targets, codec_of(targets, support))
    assert decoded.token_ids.tolist() == [[[0, 1, 2, 3]]]
    assert decoded.log_probs[0, 0, 0] == pytest.approx(0.0, abs=1e-6)
    assert decoded.log_probs[0, 0, 1] == pytest.approx(-20.0, abs=(LEVEL_STEP + LEVEL_GROWTH * 20) / 2)
    assert (decoded.log_probs.diff(dim=-1) < 0).all()
    assert (decoded.tail_curve <= -60).all()


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_json_roundtrip(support: Support) -> None:
    targets = targets_of(zipf_logits(3, (4, 40), 300), support)
    codec = codec_of(targets, support)
    value = json.loads(json.dumps(codec.to_json()))
    again = TargetCodec.from_json(value, codec.codebook, None)
    assert again == codec and again.to_json() == value


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"version": 2},
        {"profile": "huge"},
        {"level_step": 0.1},
        {"codebook": "0" * 64},
        {"tail_prediction": [[0.0]]},
        {"knots": [0.5]},
    ],
    ids=str,
)
def test_an_unknown_codec_is_refused(change: dict[str, object]) -> None:
    value = {**TargetCodec(Support("topk", k=4), KNOTS, 50).to_json(), **change}
    with pytest.raises(ValueError):
        TargetCodec.from_json(value, None, None)


def test_numbers_that_no_encoder_writes_are_refused() -> None:
    """Values that no encoder writes must not lead outside the tables."""
    support = Support("topk", k=12)
    targets = targets_of(zipf_logits(4, (2, 30), 300), support)
    codec, contexts = codec_of(targets, support), contexts_of(targets)
    good = codec.encode(targets, contexts)
    for name, value in (("codes", 65535), ("top_steps", 60000), ("rest_steps", 60000)):
        arrays = {**good, name: [np.full_like(row, value) for row in good[name]]}
        with pytest.raises((ValueError, IndexError)):
            codec.decode(rows_of(arrays), contexts, targets.mask.numpy())


@pytest.mark.parametrize("stray", [-1, 300, 2**40])
def test_what_stands_where_nothing_is_kept_does_not_matter(stray: int) -> None:
    for support in SUPPORTS:
        mask = torch.arange(12).reshape(2, 6) % 3 != 1
        targets = targets_of(zipf_logits(4, (2, 6), 300), support, mask)
        contexts = np.where(mask, contexts_of(targets), stray)
        codec = TargetCodec(support, targets.knots, 300).learn(targets, contexts, 1000)
        decoded = codec.decode(rows_of(codec.encode(targets, contexts)), contexts, mask.numpy())
        assert_close(targets, decoded)
    where_something_is = np.full(contexts.shape, stray)
    with pytest.raises((ValueError, IndexError)):
        codec.decode(rows_of(codec.encode(targets, contexts_of(targets))), where_something_is, mask.numpy())


def test_encoding_does_not_modify_the_targets() -> None:
    support = Support("threshold", tau=0.05)
    targets = targets_of(zipf_logits(9, (2, 6), 100), support, torch.arange(12).reshape(2, 6) % 2 == 0)
    names = ("token_ids", "log_probs", "tail_curve", "mask", "draws")
    before = {name: getattr(targets, name).clone() for name in names}
    codec, contexts = codec_of(targets, support), contexts_of(targets)
    arrays = codec.encode(targets, contexts)
    kept = {name: [row.copy() for row in rows] for name, rows in arrays.items()}
    codec.decode(rows_of(arrays), contexts, targets.mask.numpy())
    assert all(torch.equal(getattr(targets, name), values) for name, values in before.items())
    assert same_rows(arrays, kept)


def test_loops_are_compiled_for_one_kind_of_arguments() -> None:
    """Of two, processes that compile at the same time could take each other's (`compiled`)."""
    for vocab_size in (300, 70_000):
        for support in SUPPORTS:
            for knots in (DEFAULT_KNOTS, (1.0,)):
                targets = targets_of(zipf_logits(4, (2, 5), vocab_size), support, knots=knots)
                for profile in ("compact", "fast"):
                    roundtrip(targets, codec_of(targets, support, profile))
    kernels = (read_bands, read_ids, scale_levels, spread, curve_of_steps)
    assert [len(kernel.dispatcher.signatures) for kernel in kernels] == [1] * 5
