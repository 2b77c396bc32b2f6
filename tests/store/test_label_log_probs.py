"""The teacher's log-probability of every label: from the entries or a level below the tail's mass; rows by their loss."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache import Ensemble, LogitCache, Mixture, ShorterRows, Subset
from logit_cache.base.errors import RecipeError
from logit_cache.corpus.labels import IGNORE
from logit_cache.recipe.choices import DEFAULT_KNOTS
from logit_cache.store.arrays import Rows
from logit_cache.store.codec import TargetCodec
from logit_cache.store.label_log_probs import LABEL_LEVELS, TEACHER_LOSS, read_labels
from logit_cache.store.levels import LEVEL_GROWTH, LEVEL_STEP
from logit_cache.store.masses import HEAD_MASS_STEP
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.supports import Support

from tests.helpers.shards import shard_arrays, shard_file
from tests.helpers.synthetic import make_cache, teacher_logits

SUPPORTS = [
    Support("topk", k=1),
    Support("topk", k=6),
    Support("topp", k=8, p=0.7),
    Support("threshold", tau=0.1),
    Support("threshold", tau=1.0),
    Support("sampled", draws=12),
]
FLOAT_SLACK = 1e-4  # log-probabilities are float32 of size up to 1e3: a few roundings of 2^-15


def example(
    seed: int,
    support: Support,
    knots: tuple[float, ...] = DEFAULT_KNOTS,
    vocab_size: int = 40,
    scale: float = 3.0,
    shape: tuple[int, int] = (3, 12),
) -> tuple[SparseTargets, np.ndarray, torch.Tensor]:
    """Targets with log-probabilities of labels, the labels, and all log-probabilities [B, L, V] in float64.

    Some positions have no target, and some with a target no label.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, vocab_size, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.8
    labels = torch.randint(0, vocab_size, shape, generator=generator)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.8, labels, IGNORE)
    rule = support.to_json()
    targets = SparseTargets.from_logits(logits.float(), support=rule.pop("name"), knots=knots, mask=mask, **rule)
    log_p = logits.float().double().log_softmax(-1)
    of_labels = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1))[..., 0]
    of_labels = torch.where(mask & (labels != IGNORE), of_labels, 0.0).float()
    return replace(targets, label_log_probs=of_labels), labels.numpy(), log_p


def codec_of(targets: SparseTargets, support: Support, profile: str = "compact") -> TargetCodec:
    return TargetCodec(support, targets.knots, targets.vocab_size, profile, label_log_probs=True)  # type: ignore[arg-type]


def encoded(targets: SparseTargets, labels: np.ndarray, codec: TargetCodec) -> Rows:
    return codec.encode(targets, np.zeros_like(labels), labels)


def decoded(rows: Rows, targets: SparseTargets, labels: np.ndarray, codec: TargetCodec) -> SparseTargets:
    stored = {name: list(values) for name, values in rows.items()}
    return codec.decode(stored, np.zeros_like(labels), targets.mask.numpy(), labels)


def check(targets: SparseTargets, labels: np.ndarray, support: Support, profile: str) -> None:
    """All that rounding may do."""
    codec = codec_of(targets, support, profile)
    rows = encoded(targets, labels, codec)
    found = decoded(rows, targets, labels, codec)
    exact, values = targets.label_log_probs, found.label_log_probs
    assert exact is not None and values is not None and values.dtype == torch.float32
    has_label = targets.mask & torch.from_numpy(labels != IGNORE)
    assert (values[~has_label] == 0).all()
    own = found.token_ids >= 0 if len(targets.knots) > 1 else found.head_mask
    among = (found.token_ids == torch.from_numpy(labels).unsqueeze(-1)) & own
    inside = has_label & among.any(-1)
    assert torch.equal(values[inside], torch.where(among, found.log_probs, 0.0).sum(-1)[inside])
    outside = has_label & ~inside
    log_tail = found.tail_curve[..., targets.knots.index(1.0)]
    below = (log_tail - exact).clamp(min=0)[outside].double()
    half = (LEVEL_STEP + LEVEL_GROWTH * below) / 2 * math.exp(LEVEL_GROWTH / 2)
    # The tail's mass as decoded may lie below a label that holds all of it, by its own rounding.
    error = (values - exact)[outside].double().abs()
    assert (error <= half + HEAD_MASS_STEP / 2 + FLOAT_SLACK).all()
    assert (values <= log_tail + 1e-6)[outside].all(), "a label is never likelier than the tail"
    levels = np.stack(rows[LABEL_LEVELS])
    assert (levels[~outside.numpy()] == 0).all(), "nothing is stored of labels that are entries"
    losses = [
        float(-exact[row][has_label[row]].double().mean()) if has_label[row].any() else 0.0 for row in range(len(exact))
    ]
    np.testing.assert_allclose(np.concatenate(rows[TEACHER_LOSS]), losses, rtol=2**-23)


@pytest.mark.parametrize("knots", [DEFAULT_KNOTS, (1.0,)], ids=["any T", "T = 1"])
@pytest.mark.parametrize("profile", ["compact", "fast"])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_roundtrip(support: Support, profile: str, knots: tuple[float, ...]) -> None:
    targets, labels, _ = example(0, support, knots)
    check(targets, labels, support, profile)


@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    vocab_size=st.integers(8, 60),
    support=st.sampled_from(SUPPORTS),
    knots=st.sampled_from([DEFAULT_KNOTS, (1.0,)]),
    profile=st.sampled_from(["compact", "fast"]),
)
@settings(max_examples=60, deadline=None)
def test_roundtrip_of_any_distribution(
    seed: int, scale: float, vocab_size: int, support: Support, knots: tuple[float, ...], profile: str
) -> None:
    targets, labels, _ = example(seed, support, knots, vocab_size, scale)
    check(targets, labels, support, profile)


def test_the_rest_of_the_tail_keeps_a_mass() -> None:
    """Also where the tail is one token and that is the label."""
    targets, _, log_p = example(3, Support("topk", k=7), vocab_size=8)
    last = log_p.argmin(-1).numpy()
    of_last = torch.where(targets.mask, log_p.amin(-1), 0.0).float()
    targets = replace(targets, label_log_probs=of_last)
    check(targets, last, Support("topk", k=7), "compact")


def test_both_profiles_store_the_same() -> None:
    for support in SUPPORTS:
        targets, labels, _ = example(1, support)
        compact, fast = (encoded(targets, labels, codec_of(targets, support, p)) for p in ("compact", "fast"))
        for name in (LABEL_LEVELS, TEACHER_LOSS):
            np.testing.assert_array_equal(np.stack(compact[name]), np.stack(fast[name]))


def test_bytes_do_not_depend_on_the_rows_beside() -> None:
    for support in SUPPORTS:
        targets, labels, _ = example(2, support)
        codec = codec_of(targets, support)
        together = encoded(targets, labels, codec)
        for row in range(len(labels)):
            alone = encoded(targets[row : row + 1].trim(), labels[row : row + 1], codec)
            for name in (LABEL_LEVELS, TEACHER_LOSS):
                np.testing.assert_array_equal(alone[name][0], together[name][row])


def test_what_is_missing_is_told() -> None:
    support = Support("topk", k=6)
    targets, labels, _ = example(4, support)
    codec = codec_of(targets, support)
    with pytest.raises(ValueError, match="needs the labels"):
        codec.encode(targets, np.zeros_like(labels))
    with pytest.raises(ValueError, match="need those of their labels"):
        codec.encode(replace(targets, label_log_probs=None), np.zeros_like(labels), labels)
    without = replace(codec, label_log_probs=False)
    assert LABEL_LEVELS not in encoded(targets, labels, without)
    assert decoded(encoded(targets, labels, without), targets, labels, without).label_log_probs is None
    assert codec.to_json()["label_log_probs"] is True


def test_levels_that_no_encoder_writes_are_refused() -> None:
    support = Support("topk", k=6)
    targets, labels, _ = example(5, support)
    codec = codec_of(targets, support)
    rows = encoded(targets, labels, codec)
    with pytest.raises(ValueError, match="outside the scale"):
        decoded({**rows, LABEL_LEVELS: [row + np.uint16(256) for row in rows[LABEL_LEVELS]]}, targets, labels, codec)


def test_the_loop_is_compiled_for_one_kind_of_arguments() -> None:
    for support in SUPPORTS:
        targets, labels, _ = example(6, support)
        for profile in ("compact", "fast"):
            check(targets, labels, support, profile)
    assert len(read_labels.dispatcher.signatures) == 1  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("labels") / "cache")


def exact_losses(cache: LogitCache, teacher: int = 0) -> np.ndarray:
    """From the teacher's own logits, in float64."""
    batch = cache.batch(range(len(cache)))
    log_p = teacher_logits(batch["input_ids"], batch["segment_ids"], seed=teacher).log_softmax(-1)
    has_label = batch["labels"] != IGNORE
    of_labels = log_p.gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1))[..., 0]
    loss: np.ndarray = (-torch.where(has_label, of_labels, 0.0).sum(-1) / has_label.sum(-1).clamp(min=1)).numpy()
    return loss


def test_rows_by_the_teachers_loss(cache: LogitCache, tmp_path: Path) -> None:
    losses = cache.teacher_losses()
    np.testing.assert_allclose(losses, exact_losses(cache), rtol=1e-6)
    labels = (cache.batch(range(len(cache)))["labels"] != IGNORE).sum(-1).numpy()
    assert (losses * labels).sum() / labels.sum() == pytest.approx(cache.teacher_loss, rel=1e-6)
    # That of the targets as decoded differs by the rounding of levels, which averages out.
    decoded_nats = -cache.batch(range(len(cache)))["targets"].label_log_probs.double().sum()  # type: ignore[union-attr]
    assert float(decoded_nats) == pytest.approx((losses * labels).sum(), rel=5e-3)
    np.testing.assert_array_equal(cache.teacher_losses([7, -1, 2]), losses[[7, -1, 2]])
    plausible = np.flatnonzero(losses <= np.median(losses))
    np.testing.assert_array_equal(Subset(cache, plausible).teacher_losses(), losses[plausible])
    other = make_cache(tmp_path / "other", teacher=1)
    np.testing.assert_allclose(
        Ensemble([cache, other], [1, 3]).teacher_losses([3]),
        0.25 * losses[3] + 0.75 * other.teacher_losses()[3],
        rtol=1e-6,
    )
    for view in (ShorterRows(cache, 8), Mixture([cache, other])):
        with pytest.raises(RecipeError, match="ask the cache itself"):
            view.teacher_losses()


def test_the_arrays_open_with_zarr(cache: LogitCache) -> None:
    arrays = shard_arrays(shard_file(Path(str(cache.path)), 1))
    start, stop = cache.manifest.shard_range(1)
    np.testing.assert_array_equal(arrays[TEACHER_LOSS][:, 0], cache.teacher_losses(range(start, stop)))
    assert arrays[LABEL_LEVELS].shape == (stop - start, cache.row_length)


def test_a_cache_without_says_so(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", label_log_probs=False)
    assert cache[0]["targets"].label_log_probs is None
    with pytest.raises(RecipeError, match=r"cache\.label_log_probs = true"):
        cache.teacher_losses()


def test_an_unfinished_cache_knows_its_own_rows(cache: LogitCache, tmp_path: Path) -> None:
    shutil.copytree(str(cache.path), tmp_path / "cache")
    (tmp_path / "cache/shards/00000.json").unlink()
    partial = LogitCache(tmp_path / "cache", partial=True)
    np.testing.assert_array_equal(partial.teacher_losses(), cache.teacher_losses()[5:])
