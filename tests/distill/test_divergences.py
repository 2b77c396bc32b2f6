"""Divergences: against their formulas in float64, their gradients against autograd, and what every one must satisfy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.distill.divergences import DIVERGENCES, MODES, position_scale, resolve_alpha
from logit_cache.distill.flat_targets import FlatTargets
from logit_cache.distill.fused import fused_distillation_loss, fused_online_loss
from logit_cache.distill.gradients import cell_divergence
from logit_cache.distill.loss import distillation_loss
from logit_cache.distill.loss_settings import LossSettings
from logit_cache.models.output_layer import OutputLayer
from logit_cache.targets.sparse_targets import SparseTargets

V, K, D, N = 29, 14, 7, 9
KNOTS = (0.25, 0.5, 0.75, 2.0)
NAMES = tuple(DIVERGENCES)
TEMPERATURES = (0.5, 1.0, 2.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(seed: int, *shape: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def by_the_formula(name: str, p: np.ndarray, q: np.ndarray, alpha: float, mean_rest: float) -> float:
    """Over cells with p, q > 0, straight from the definitions."""

    def kl(a: np.ndarray, b: np.ndarray) -> float:
        return float(sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)))

    if name == "reverse_kl":
        return kl(q, p)
    if name == "jensen_shannon":
        m = alpha * p + (1 - alpha) * q
        return alpha * kl(p, m) + (1 - alpha) * kl(q, m)
    if name == "skew_kl":
        return kl(p, alpha * p + (1 - alpha) * q)
    if name == "skew_reverse_kl":
        return kl(q, (1 - alpha) * p + alpha * q)
    if name == "total_variation":
        return 0.5 * float(np.abs(p - q).sum())
    if name == "soft_cross_entropy":
        return -float(sum(x * math.log(y) for x, y in zip(p, q, strict=True)))
    modes = min(MODES, len(p) - 1)
    p_rest, q_rest = p[modes:].sum(), q[modes:].sum()
    first = kl(np.append(p[:modes], p_rest), np.append(q[:modes], q_rest))
    return first + alpha / mean_rest * p_rest * kl(p[modes:] / p_rest, q[modes:] / q_rest)


def cells(x: np.ndarray, order: np.ndarray, k: int) -> np.ndarray:
    """The k tokens of `order` and all others together."""
    p = softmax(x)
    return np.append(p[order[:k]], p[order[k:]].sum())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_the_reference_is_the_formula(name: str, temperature: float, alpha: float | None) -> None:
    if alpha is not None and resolve_alpha(name, None) == 0.0:
        pytest.skip("has no alpha")
    teacher, student = logits(0, N, V), logits(1, N, V)
    targets = SparseTargets.from_logits(teacher, k=K, knots=KNOTS)
    labels = torch.zeros(N, dtype=torch.long)
    output = distillation_loss(student, targets, labels, temperature=temperature, divergence=name, alpha=alpha)
    pairs = []
    for x, y in zip(teacher.numpy(), student.numpy(), strict=True):
        order = np.argsort(-x)
        pairs.append((cells(x / temperature, order, K), cells(y / temperature, order, K)))
    mean_rest = float(np.mean([p[MODES:].sum() for p, _ in pairs]))
    used = resolve_alpha(name, alpha)
    expected = np.mean([by_the_formula(name, p, q, used, mean_rest) for p, q in pairs])
    assert float(output.kd) == pytest.approx(float(expected), abs=1e-9)
    assert float(output.loss) == pytest.approx(temperature**2 * float(expected), abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_by_log_q_is_autograds(name: str) -> None:
    function, alpha = DIVERGENCES[name], resolve_alpha(name, None)
    log_p = torch.log_softmax(logits(2, N, K + 1), -1)
    log_p[:, 3] = -math.inf  # an unused entry
    log_q = torch.log_softmax(logits(3, N, K + 1), -1)
    log_q[:, 3] = -math.inf
    log_q.requires_grad_()
    scale = position_scale(name, log_p[:, :K], torch.ones(N, dtype=torch.bool), alpha)
    value, slope = function(log_p, log_q, alpha, scale)
    (gradient,) = torch.autograd.grad(value.sum(), log_q)
    assert torch.isfinite(value).all()
    assert torch.allclose(slope, gradient, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize("student_vocab", [V, V + 5])
def test_the_fused_form_is_the_reference(name: str, temperature: float, chunk_size: int, student_vocab: int) -> None:
    mask = torch.tensor([True, True, False] * 3)
    targets = SparseTargets.from_logits(logits(0, N, V), k=K, knots=KNOTS, mask=mask)
    labels = torch.randint(0, V, (N,), generator=generator(4))
    labels[2] = -100
    weights = [logits(5, N, D), logits(6, student_vocab, D), logits(7, student_vocab)]
    options = {"temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.3, "divergence": name}
    gradients, outputs = [], []
    for fused in (False, True):
        hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in weights)
        if fused:
            output = fused_distillation_loss(
                hidden, weight, targets, labels, bias=bias, chunk_size=chunk_size, **options
            )
        else:
            output = distillation_loss(hidden @ weight.T + bias, targets, labels, **options)
        output.loss.backward()
        gradients.append((hidden.grad, weight.grad, bias.grad))
        outputs.append(output)
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=1e-12 * max(1.0, float(one.abs().max())))
    for field in ("loss", "kd", "ce", "coverage", "agreement"):
        one, two = (getattr(output, field).item() for output in outputs)
        assert one == pytest.approx(two, abs=1e-12), field


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_vocabulary_online_is_the_whole_vocabulary_cached(name: str) -> None:
    teacher = logits(0, N, V)
    hidden, weight = logits(5, N, D).requires_grad_(), logits(6, V, D).requires_grad_()
    labels, mask = torch.zeros(N, dtype=torch.long), torch.ones(N, dtype=torch.bool)
    options = LossSettings(2.0, divergence=name)
    if name == "tail_aware_kl":
        with pytest.raises(ValueError, match="cached"):
            fused_online_loss(hidden, OutputLayer(weight), lambda rows: teacher[rows], mask, labels, options)
        return
    online = fused_online_loss(hidden, OutputLayer(weight), lambda rows: teacher[rows], mask, labels, options)
    online_gradient = torch.autograd.grad(online.loss, hidden)[0]
    targets = SparseTargets.from_logits(teacher, k=V, knots=KNOTS)
    cached = fused_distillation_loss(hidden, weight, targets, labels, temperature=2.0, divergence=name)
    assert float(online.kd) == pytest.approx(float(cached.kd), abs=1e-9)
    assert float(online.agreement) == float(cached.agreement)
    assert torch.allclose(online_gradient, torch.autograd.grad(cached.loss, hidden)[0], atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 10_000), k=st.integers(1, V), temperature=st.floats(0.5, 8.0))
def test_zero_for_the_teacher_itself_and_positive_for_others(name: str, seed: int, k: int, temperature: float) -> None:
    teacher, student = logits(seed, 5, V), logits(seed + 1, 5, V)
    targets = SparseTargets.from_logits(teacher, k=k, knots=[*KNOTS, 1 / temperature])
    labels = torch.zeros(5, dtype=torch.long)
    itself = teacher.clone().requires_grad_()
    output = distillation_loss(itself, targets, labels, temperature=temperature, divergence=name)
    entropy = 0.0
    if name == "soft_cross_entropy":
        log_p, log_tail = targets.at_temperature(temperature)
        p = torch.cat([log_p, log_tail.unsqueeze(-1)], -1).double()
        entropy = -float((p.exp() * p).nan_to_num(0.0).sum(-1).mean())
    assert abs(float(output.kd) - entropy) < 1e-12
    (gradient,) = torch.autograd.grad(output.loss, itself)
    if name != "total_variation":  # whose sign is any number at 0
        assert float(gradient.abs().max()) < 1e-7
    assert float(output.agreement) == 1.0
    other = distillation_loss(student, targets, labels, temperature=temperature, divergence=name)
    assert float(other.kd) > entropy - 1e-12


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(NAMES[:-1]), seed=st.integers(0, 10_000), k=st.integers(1, V - 1))
def test_a_bucket_never_exceeds_the_whole_vocabulary(name: str, seed: int, k: int) -> None:
    teacher, student = logits(seed, 4, V), logits(seed + 1, 4, V)
    labels = torch.zeros(4, dtype=torch.long)
    values = [
        float(distillation_loss(student, SparseTargets.from_logits(teacher, k=size), labels, divergence=name).kd)
        for size in (k, V)
    ]
    assert values[0] <= values[1] + 1e-12


def test_tail_aware_kl_is_kl_where_the_scale_is_one() -> None:
    teacher, student = logits(0, N, V), logits(1, N, V)
    targets = SparseTargets.from_logits(teacher, k=K)
    labels = torch.zeros(N, dtype=torch.long)
    mean_rest = float((1 - targets.log_probs[:, :MODES].exp().sum(-1)).mean())
    scaled = distillation_loss(student, targets, labels, divergence="tail_aware_kl", alpha=mean_rest)
    assert float(scaled.kd) == pytest.approx(float(distillation_loss(student, targets, labels).kd), abs=1e-12)


def test_tail_aware_kl_is_normalised_by_sequence() -> None:
    """Two rows with tails of different weight: each by its own mean, and positions without a target do not count."""
    teacher = torch.stack([logits(0, 5, V, scale=1.0), logits(1, 5, V, scale=3.0)])
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    targets = SparseTargets.from_logits(teacher, k=K, mask=mask)
    student, labels = logits(2, 2, 5, V), torch.zeros(2, 5, dtype=torch.long)
    together = distillation_loss(student, targets, labels, divergence="tail_aware_kl")
    parts = [distillation_loss(student[i], targets[i], labels[i], divergence="tail_aware_kl") for i in range(2)]
    assert float(together.kd) == pytest.approx((5 * float(parts[0].kd) + 3 * float(parts[1].kd)) / 8, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 3, V])
def test_extremes_stay_finite(name: str, k: int) -> None:
    """A teacher and students so sure that everything else underflows, in float32; and no target at all."""
    teacher = torch.full((4, V), -200.0)
    teacher[:, 2] = 200.0
    for student in (teacher, teacher.roll(1, -1), torch.zeros(4, V)):
        mask = torch.tensor([True, True, True, False])
        targets = SparseTargets.from_logits(teacher, k=k, mask=mask)
        hidden = student.clone().requires_grad_()
        labels = torch.zeros(4, dtype=torch.long)
        for temperature in (1.0, 4.0):
            for fused in (False, True):
                options = {"temperature": temperature, "divergence": name}
                if fused:
                    output = fused_distillation_loss(hidden, torch.eye(V), targets, labels, **options)
                else:
                    output = distillation_loss(hidden, targets, labels, **options)
                (gradient,) = torch.autograd.grad(output.loss, hidden)
                assert torch.isfinite(output.loss) and torch.isfinite(gradient).all()


def test_agreement_and_coverage() -> None:
    teacher = logits(0, N, V)
    targets = SparseTargets.from_logits(teacher, k=K, mask=torch.tensor([True] * 6 + [False] * 3))
    student = teacher.clone()
    student[0, int(teacher[0].argmin())] = 100.0
    output = distillation_loss(student, targets, torch.zeros(N, dtype=torch.long), temperature=2.0)
    assert float(output.agreement) == pytest.approx(5 / 6)
    exact = torch.softmax(teacher[:6] / 2.0, -1).topk(K, -1).values.sum(-1).mean()
    # The knot 1/2 is kept, so nothing is interpolated.
    assert float(output.coverage) == pytest.approx(float(exact), abs=1e-6)


def test_unusable_settings_are_refused() -> None:
    targets = SparseTargets.from_logits(logits(0, N, V), k=K)
    labels = torch.zeros(N, dtype=torch.long)

    def refused(**options: object) -> str:
        with pytest.raises(ValueError) as caught:
            distillation_loss(logits(1, N, V), targets, labels, **options)  # type: ignore[arg-type]
        return str(caught.value)

    assert "one of kl, soft_cross_entropy, reverse_kl" in refused(divergence="wasserstein")
    assert "no alpha" in refused(divergence="reverse_kl", alpha=0.5)
    assert "no alpha" in refused(alpha=0.5)
    assert "between 0 and 1" in refused(divergence="skew_kl", alpha=1.0)
    assert "not be negative" in refused(divergence="tail_aware_kl", alpha=-1.0)
    assert "as a shape or as a bucket" in refused(divergence="reverse_kl", tail="drop")


def test_unused_entries_change_nothing() -> None:
    """Padded heads, as in a mixture of caches with different k."""
    teacher = logits(0, N, V)
    targets = SparseTargets.from_logits(teacher, k=K)
    padded = SparseTargets(
        torch.nn.functional.pad(targets.token_ids, (0, 4), value=-1),
        torch.nn.functional.pad(targets.log_probs, (0, 4), value=-math.inf),
        targets.tail_curve,
        targets.mask,
        targets.knots,
        targets.vocab_size,
    )
    student, labels = logits(1, N, V), torch.zeros(N, dtype=torch.long)
    for name in NAMES:
        settings, alpha = LossSettings(divergence=name), resolve_alpha(name, None)
        results = [
            cell_divergence(student.clone(), FlatTargets.of(t, labels, settings.fit(t, V)), name, alpha)
            for t in (targets, padded)
        ]
        for one, two in zip(*results, strict=True):
            assert torch.allclose(one, two, atol=1e-12)
