"""What is kept and what is drawn, on the real teacher's distributions and through every stage."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache import Ensemble, LogitCache, distillation_loss, fused_distillation_loss
from logit_cache.corpus.labels import IGNORE
from logit_cache.models.packing import document_positions
from logit_cache.models.teacher import Teacher
from logit_cache.stages.app import main
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.supports import Support, position_seeds, uniforms

from tests.conftest import Run, files_of
from tests.helpers.tiny import make_recipe

PARAMETERS = {
    "topk": {"k": 8},
    "topp": {"k": 12, "p": 0.8},
    "threshold": {"tau": 0.05},
    "sampled": {"draws": 20},
}


@pytest.fixture(scope="module")
def logits(teacher: Teacher, small_run: Run) -> torch.Tensor:
    """[N, V] of the real teacher, over positions of all kinds: certain ones and open ones."""
    batch = LogitCache(small_run.dir / "cache").batch(np.arange(4))
    with torch.no_grad():
        x_BLV = teacher.model(
            input_ids=batch["input_ids"], position_ids=document_positions(batch["segment_ids"]), use_cache=False
        ).logits
    return x_BLV[batch["labels"] != IGNORE].float()[:120]


def dense(targets: SparseTargets) -> torch.Tensor:
    """The estimate of the whole distribution at T = 1 [N, V] that targets stand for."""
    out = torch.zeros(len(targets), targets.vocab_size, dtype=torch.float64)
    return out.scatter_add_(-1, targets.token_ids.clamp(min=0), targets.weights.double())


@pytest.mark.parametrize("name", ["threshold", "sampled"])
def test_the_mean_of_many_draws_is_the_distribution(logits: torch.Tensor, name: str) -> None:
    """Of 8 positions 300 draws each; 12 sums over ranges of ranks and random halves, each within 4 standard errors."""
    times = 300
    generator = torch.Generator().manual_seed(1)
    for x_V in logits[:: max(len(logits) // 8, 1)][:8]:
        p_V = x_V.double().softmax(-1)
        ranks_V = p_V.argsort(descending=True).argsort()
        sums = [ranks_V == 0, (ranks_V > 0) & (ranks_V < 8), (ranks_V >= 8) & (ranks_V < 64), ranks_V >= 64]
        sums += [torch.rand(p_V.shape, generator=generator) < 0.5 for _ in range(8)]
        functions_VF = torch.stack(sums, -1).double()
        targets = SparseTargets.from_logits(x_V.expand(times, -1), seed=7, support=name, **PARAMETERS[name])
        weights_MK1 = targets.weights.double().unsqueeze(-1)
        found_MF = (functions_VF[targets.token_ids.clamp(min=0)] * weights_MK1).sum(1)
        error_F = (found_MF.mean(0) - p_V @ functions_VF).abs()
        # float32 probabilities, and a floor for sums that systematic draws hit every time.
        assert (error_F <= 4 * found_MF.std(0) / times**0.5 + 1e-5).all()


def test_threshold_weighs_exactly_one(logits: torch.Tensor) -> None:
    for tau in (0.5, 0.05, 0.003):
        targets = SparseTargets.from_logits(logits, support="threshold", tau=tau)
        assert (targets.weights.double().sum(-1) - 1).abs().max() < 2e-6, "more than float32 sums explain"
        p_NV = logits.double().softmax(-1)
        # Log-probabilities are float32: a token may pass or miss tau by its rounding.
        assert targets.log_probs[targets.head_mask].min() >= np.log(tau) - 1e-5
        assert torch.equal(
            targets.head_mask.sum(-1).clamp(max=0),
            ((p_NV > tau * (1 + 1e-4)).sum(-1) > targets.head_mask.sum(-1)).long(),
        ), "a token above tau is missing"
        drawn_N = targets.draws.sum(-1)
        tail_N = 1 - torch.where(p_NV >= tau, p_NV, 0.0).sum(-1)
        assert ((drawn_N - torch.ceil(tail_N / tau)).abs() <= 1).all()


def test_threshold_errs_less_than_sampled_with_as_many_ids(logits: torch.Tensor) -> None:
    p_NV = logits.double().softmax(-1)

    def measured(**support: object) -> tuple[float, float]:
        found = [SparseTargets.from_logits(logits, seed=s, **support) for s in range(3)]  # type: ignore[arg-type]
        errors = [float((dense(t) - p_NV).square().sum(-1).mean()) for t in found]
        ids = [float((t.token_ids >= 0).sum(-1).float().mean()) for t in found]
        return sum(errors) / 3, sum(ids) / 3

    error, ids = measured(support="threshold", tau=0.05)
    error_of_sampled, ids_of_sampled = measured(support="sampled", draws=26)
    assert ids_of_sampled > ids, "a fair comparison gives `sampled` at least as many"
    assert error < error_of_sampled / 1.4


def test_scaled_weights_err_less_than_plain_ones(logits: torch.Tensor) -> None:
    """The claim of `SparseTargets.tail_samples`, as the error of the target at T = 2."""
    targets = SparseTargets.from_logits(logits, support="sampled", draws=50, seed=3)
    p_NV = (logits.double() / 2).softmax(-1)
    used, ids = targets.draws > 0, targets.token_ids.clamp(min=0)
    scaled, log_p_T = targets.tail_samples(2.0)
    assert torch.allclose(scaled.sum(-1), torch.ones(len(targets)), atol=1e-5)
    assert torch.allclose(log_p_T[used], p_NV.gather(-1, ids).log().float()[used], atol=1e-2)
    plain = torch.where(
        used, targets.draws.double() / 50 * (p_NV.gather(-1, ids) / targets.log_probs.double().exp()), 0.0
    )
    errors = [
        float((torch.zeros_like(p_NV).scatter_add_(-1, ids, w.double()) - p_NV).square().sum(-1).mean())
        for w in (scaled, plain)
    ]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("name", ["threshold", "sampled"])
def test_draws_depend_on_the_seed_of_their_position_alone(logits: torch.Tensor, name: str) -> None:
    seeds = position_seeds(3, torch.arange(len(logits)), torch.arange(len(logits)) % 7)

    def draw(some: torch.Tensor) -> SparseTargets:
        return SparseTargets.from_logits(logits[some], support=name, seed=seeds[some], **PARAMETERS[name])

    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    whole, shuffled, alone = draw(torch.arange(len(logits))), draw(order), draw(order[:1])
    for field in ("token_ids", "draws"):
        assert torch.equal(getattr(whole, field)[order], getattr(shuffled, field))
        assert torch.equal(getattr(shuffled, field)[:1], getattr(alone, field))
    # float32 sums over the vocabulary, in an order that depends on the tensor's shape.
    torch.testing.assert_close(shuffled.log_probs[:1], alone.log_probs, rtol=1e-6, atol=2e-6)


def test_seeds_and_uniforms_do_not_repeat() -> None:
    rows, positions = torch.arange(300).repeat_interleave(300), torch.arange(300).repeat(300)
    for seed in (0, 1):
        assert len(position_seeds(seed, rows, positions).unique()) == 90_000
    assert not torch.equal(position_seeds(0, rows, positions), position_seeds(1, rows, positions))
    points = uniforms(position_seeds(0, rows, positions), 8).flatten()
    assert points.min() >= 0 and points.max() < 1
    # Mean and variance of 720,000 uniforms, within 5 standard errors.
    assert abs(float(points.mean()) - 0.5) < 5 * (1 / 12) ** 0.5 / 720_000**0.5
    assert abs(float(points.var()) - 1 / 12) < 5 * (1 / 180) ** 0.5 / 720_000**0.5


@pytest.mark.parametrize("vocab_size", [151_936, 262_144, 2**20])
@pytest.mark.parametrize("name", PARAMETERS)
def test_large_vocabularies(name: str, vocab_size: int) -> None:
    """The likely tokens are the last ids of all, above every power of two that could fold them."""
    x_NV = torch.linspace(-3.0, 3.0, vocab_size).repeat(3, 1)
    favourites = torch.tensor([vocab_size - 1, vocab_size - 2, 131_072, 65_536])
    x_NV[:, favourites] = torch.tensor([22.0, 21.5, 21.0, 20.5])
    targets = SparseTargets.from_logits(x_NV, support=name, **PARAMETERS[name])
    p_NV = x_NV.double().softmax(-1)
    assert set(favourites.tolist()) >= set(targets.token_ids[:, :2].flatten().tolist())
    used = targets.token_ids >= 0
    expected = p_NV.gather(-1, targets.token_ids.clamp(min=0)).log()
    # float32 sums of a million terms of one sign.
    assert (targets.log_probs.double() - expected)[used].abs().max() < 1e-4


@pytest.fixture(scope="module", params=list(PARAMETERS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with one support: prepared, cached, trained, evaluated, reported."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {f"cache__{key}": value for key, value in PARAMETERS[request.param].items()}
    recipe = make_recipe(folder, cache__support=request.param, **changes)
    for stage in ("prepare", "cache", "train", "evaluate", "report"):
        assert main([stage, str(recipe)]) == 0
    return folder


@pytest.mark.slow
def test_every_support_goes_through_every_stage(run: Path) -> None:
    cache = LogitCache(run / "run/cache")
    support = cache.manifest.codec.support
    assert support == Support.of(support.name, **PARAMETERS[support.name])
    targets = cache.batch(np.arange(len(cache)))["targets"]
    assert (targets.draws is not None) == (support.name in ("threshold", "sampled"))
    assert main(["verify", str(run / "run/cache")]) == 0
    assert (run / "run/report/index.html").exists()
    total = targets.weights[targets.mask].sum(-1)
    if support.has_samples:
        assert (total - 1).abs().max() < 1e-4
    else:
        assert total.max() <= 1 + 1e-5


@pytest.mark.slow
def test_bytes_do_not_depend_on_batches_or_tasks(run: Path, tmp_path: Path) -> None:
    expected = files_of(run / "run/cache")
    for number, (rows, tasks) in enumerate(((1, 1), (4, 3))):
        again = ["--set", f"run_dir={tmp_path / str(number)}", "--set", f"teacher.batch_rows={rows}"]
        assert main(["prepare", str(run / "recipe.toml"), *again]) == 0
        for task in range(tasks):
            share = [] if tasks == 1 else ["--task", str(task), "--num-tasks", str(tasks)]
            assert main(["cache", str(run / "recipe.toml"), *share, *again]) == 0
        found = files_of(tmp_path / str(number) / "cache")
        assert {name for name in found if found[name] != expected.get(name)} == set()
        assert found.keys() == expected.keys()


@pytest.mark.slow
def test_samples_exclude_other_treatments_of_the_tail(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = LogitCache(run / "run/cache")
    sampled = cache.manifest.codec.support.has_samples
    other = ["--set", "students.other.tail=drop", "--set", "students.other.steps=1"]
    assert main(["cache", str(run / "recipe.toml"), *other]) == 0
    code = main(["train", str(run / "recipe.toml"), "--student", "other", *other])
    assert code == (2 if sampled else 0)
    if sampled:
        assert "tail 'drop'" in capsys.readouterr().err
        if cache.manifest.codec.coordinates is None:  # the mean of shapes needs no samples
            with pytest.raises(ValueError, match="cannot be averaged"):
                Ensemble([cache, cache])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["threshold", "sampled"])
def test_the_loss_with_samples_is_the_formula(name: str, temperature: float) -> None:
    """In float64: sum over the head of p (log p - log q), and over samples of w (log p - log q), T^2 and CE beside it."""
    generator = torch.Generator().manual_seed(5)
    teacher_NV = 3 * torch.randn(40, 200, generator=generator, dtype=torch.float64)
    hidden_ND = torch.randn(40, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    head_VD = torch.randn(200, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    labels_N = torch.randint(0, 200, (40,), generator=generator)
    targets = SparseTargets.from_logits(teacher_NV, support=name, **PARAMETERS[name])
    settings = {"temperature": temperature, "ce_weight": 0.3}

    log_q_NV = (hidden_ND @ head_VD.T / temperature).log_softmax(-1)
    log_p_NV = (teacher_NV / temperature).log_softmax(-1)
    ids = targets.token_ids.clamp(min=0)
    log_p, log_q, n = log_p_NV.gather(-1, ids), log_q_NV.gather(-1, ids), targets.draws.double().sum(-1, keepdim=True)
    w = targets.draws / n.clamp(min=1) * (log_p - teacher_NV.log_softmax(-1).gather(-1, ids)).exp()
    tail = 1 - torch.where(targets.head_mask, log_p.exp(), 0.0).sum(-1, keepdim=True)
    w = torch.where(targets.draws > 0, w / w.sum(-1, keepdim=True).clamp(min=1e-300) * tail, 0.0)
    w = torch.where(targets.head_mask, log_p.exp(), w)
    kl = (w * (log_p - log_q)).sum(-1).mean()
    ce = torch.nn.functional.cross_entropy(hidden_ND @ head_VD.T, labels_N)
    expected = temperature**2 * kl + 0.3 * ce
    gradient = torch.autograd.grad(expected, (hidden_ND, head_VD))

    for output in (
        distillation_loss(hidden_ND @ head_VD.T, targets, labels_N, **settings),
        fused_distillation_loss(hidden_ND, head_VD, targets, labels_N, chunk_size=7, **settings),
    ):
        # A knot or an interpolated tail mass away from T = 1 and 2 would not be exact; these are knots.
        assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
        for found, wanted in zip(torch.autograd.grad(output.loss, (hidden_ND, head_VD)), gradient, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


RULES = [
    Support("topk", k=8),
    Support("topk", k=300),
    Support("topp", k=8, p=0.9),
    Support("threshold", tau=0.05),
    Support("sampled", draws=20),
]
NO_DISTRIBUTION = {"nan": math.nan, "-nan": -math.nan, "inf": math.inf, "all inf": math.inf, "all -inf": -math.inf}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bad", NO_DISTRIBUTION)
def test_logits_that_are_no_distribution_give_nan(rule: Support, bad: str) -> None:
    """And never a token outside the vocabulary: as an index that costs a GPU its context."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)).to(dtype)
        whole = SparseTargets.from_logits(x, support=rule)
        x[2, ... if bad.startswith("all") else 7] = NO_DISTRIBUTION[bad]
        targets = SparseTargets.from_logits(x, support=rule)
        assert int(targets.token_ids.max()) < 300
        assert targets.tail_curve[2].isnan().any() or targets.log_probs[2, 0].isnan()
        others = [0, 1, 3, 4]
        assert torch.equal(targets.token_ids[others], whole.token_ids[others])
        assert torch.equal(targets.log_probs[others], whole.log_probs[others])
        assert torch.equal(targets.tail_curve[others], whole.tail_curve[others])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_token_of_probability_0_is_no_token_of_the_text(rule: Support) -> None:
    """Padded rows of an output layer, or tokens that a grammar excludes: logits of -inf are a distribution's."""
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(4))
    x[:, 40:] = -math.inf
    targets = SparseTargets.from_logits(x, support=rule)
    assert not targets.tail_curve.isnan().any() and not targets.log_probs.isnan().any()
    likely = targets.weights > 0
    assert int(targets.token_ids[likely].max()) < 40
    mass = targets.weights.sum(-1) + (0.0 if rule.has_samples else targets.at_temperature(1.0)[1].exp())
    torch.testing.assert_close(mass, torch.ones(4), rtol=0, atol=1e-5)
