"""Losses of targets whose tail has a shape: against float64 formulas, and the fused form against the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.corpus.labels import IGNORE
from logit_cache.distill.divergences import DIVERGENCES, MODES, resolve_alpha
from logit_cache.distill.fused import fused_distillation_loss, fused_online_loss
from logit_cache.distill.loss import distillation_loss
from logit_cache.distill.loss_settings import LossSettings
from logit_cache.models.output_layer import OutputLayer
from logit_cache.targets.basis import TailBasis
from logit_cache.targets.sparse_targets import SparseTargets
from torch import Tensor

from .test_divergences import by_the_formula
from .test_loss import LargestOutput, assert_fused_is_reference, make_labels, make_layer, softmax

KNOTS = (0.25, 0.5, 0.75, 2.0)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
V, K, R, D, N = 23, 5, 3, 7, 11
LARGEST_SHARE = 31 / 32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def shaped(
    seed: int, *, mask: Tensor | None = None, softcap: float | None = None, dtype=torch.float64, **support
) -> tuple[Tensor, SparseTargets]:
    """Teacher logits [N, V], and their targets with a shape that has nothing to do with the teacher."""
    g = generator(seed)
    logits = 2 * normal(g, N, V)
    if mask is None:
        mask = torch.tensor([True, True, False] * N)[:N]
    basis = TailBasis(normal(g, V).to(dtype), normal(g, V, R).to(dtype), softcap)
    targets = SparseTargets.from_logits(logits.to(dtype), knots=KNOTS, mask=mask, **({"k": K} | support))
    return logits, replace(targets, tail_coordinates=normal(g, N, R).to(dtype), basis=basis)


def with_label_log_probs(targets: SparseTargets, teacher: Tensor, labels: Tensor) -> SparseTargets:
    log_p = torch.log_softmax(teacher, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return replace(targets, label_log_probs=torch.where(labels != IGNORE, log_p, 0.0).to(targets.log_probs.dtype))


def shape_logits(targets: SparseTargets) -> np.ndarray:
    """t [N, V] in float64, NumPy only."""
    assert targets.basis is not None and targets.tail_coordinates is not None
    a, u, z = (t.double().numpy() for t in (targets.basis.offset, targets.basis.directions, targets.tail_coordinates))
    t, cap = a + z @ u.T, targets.basis.softcap
    return t if cap is None else cap * np.tanh(t / cap)


def by_the_definition(
    teacher: np.ndarray, t: np.ndarray, temperature: float, student_vocab: int, *, k: int = K, label: int = IGNORE
) -> np.ndarray:
    """p^_T [student_vocab] of one position from the full softmax: exact on the k best tokens and the label, the rest by
    the shape."""
    p = softmax(teacher / temperature)
    exact = list(np.argsort(-teacher)[:k])
    rest = np.array([v for v in range(len(p)) if v not in exact])
    result = np.zeros(student_vocab)
    result[exact] = p[exact]
    mass = p[rest].sum()
    if label != IGNORE and label not in exact and len(rest) > 1:
        result[label] = min(p[label], LARGEST_SHARE * mass)
        mass -= result[label]
        rest = rest[rest != label]
    if len(rest):
        result[rest] = mass * softmax(t[rest] / temperature)
    return result


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("student_vocab", [V, V + 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("knows_labels", [False, True])
def test_the_definition_is_the_formula(
    temperature: float, student_vocab: int, softcap: float | None, knows_labels: bool
) -> None:
    """Value, and the gradient T (q - p^) over the number of positions."""
    teacher, targets = shaped(0, softcap=softcap)
    labels = make_labels(1, targets)
    if knows_labels:
        targets = with_label_log_probs(targets, teacher, labels)
    student = (2 * normal(generator(2), N, student_vocab)).requires_grad_()
    output = distillation_loss(student, targets, labels, temperature=temperature)
    values, gradients = [], []
    t = shape_logits(targets)
    for position in range(N):
        label = int(labels[position]) if knows_labels else IGNORE
        p = by_the_definition(teacher[position].numpy(), t[position], temperature, student_vocab, label=label)
        q = softmax(student[position].detach().numpy() / temperature)
        kept = bool(targets.mask[position])
        values += [kl(p, q)] if kept else []
        gradients.append(temperature * (q - p) * kept)
    count = len(values)
    assert output.kd.item() == pytest.approx(sum(values) / count, abs=1e-10)
    assert output.loss.item() == pytest.approx(temperature**2 * sum(values) / count, abs=1e-9)
    (gradient,) = torch.autograd.grad(output.loss, student)
    np.testing.assert_allclose(gradient.numpy(), np.stack(gradients) / count, rtol=0, atol=1e-10)
    head = torch.softmax(teacher / temperature, -1).topk(K).values.sum(-1)[targets.mask]
    assert output.coverage.item() == pytest.approx(head.mean().item(), abs=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("knows_labels", [False, True])
@pytest.mark.parametrize("student_vocab", [V, V + 6])
def test_fused_is_the_definition(temperature: float, chunk_size: int, knows_labels: bool, student_vocab: int) -> None:
    teacher, targets = shaped(3, softcap=2.0)
    labels = make_labels(4, targets)
    if knows_labels:
        targets = with_label_log_probs(targets, teacher, labels)
    layer = make_layer(5, vocab_size=student_vocab)
    options = {"temperature": temperature, "kd_weight": 0.6, "ce_weight": 0.4}
    assert_fused_is_reference(*layer, targets, labels, tolerance=1e-9, chunk_size=chunk_size, **options)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("knows_labels", [False, True])
def test_fused_is_the_definition_in_float32(temperature: float, knows_labels: bool) -> None:
    teacher, targets = shaped(3, dtype=torch.float32)
    labels = make_labels(4, targets)
    if knows_labels:
        targets = with_label_log_probs(targets, teacher, labels)
    hidden, weight, _ = make_layer(5, dtype=torch.float32, vocab_size=V + 6)
    options = {"temperature": temperature, "kd_weight": 0.6, "ce_weight": 0.4}
    assert_fused_is_reference(hidden, weight, None, targets, labels, tolerance=1e-5, **options)


@pytest.mark.parametrize(
    "transform", [{"logit_scale": 0.3}, {"softcap": 2.0}, {"logit_scale": 1.7, "softcap": 3.0}], ids=str
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scaled_and_capped_output_layers(transform: dict[str, float], with_bias: bool, dtype: torch.dtype) -> None:
    _, targets = shaped(6, dtype=dtype)
    hidden, weight, bias = make_layer(7, dtype=dtype)
    assert_fused_is_reference(
        hidden,
        weight,
        bias if with_bias else None,
        targets,
        make_labels(8, targets),
        transform=transform,
        tolerance=1e-9 if dtype == torch.float64 else 1e-5,
        temperature=2.0,
        ce_weight=0.5,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["kl", *DIVERGENCES])
def test_a_student_equal_to_the_target_has_no_gradient(temperature: float, name: str) -> None:
    _, targets = shaped(9, mask=torch.ones(N, dtype=torch.bool))
    student = (temperature * targets.dense(temperature).log()).requires_grad_()
    labels, eye = make_labels(10), torch.eye(V, dtype=torch.float64)
    entropy = 0.0
    if name == "soft_cross_entropy":
        p = targets.dense(temperature)
        entropy = -float((p * p.log()).sum(-1).mean())
    for output in (
        distillation_loss(student, targets, labels, temperature=temperature, divergence=name),
        fused_distillation_loss(student, eye, targets, labels, temperature=temperature, divergence=name),
    ):
        assert abs(output.kd.item() - entropy) < 1e-12
        (gradient,) = torch.autograd.grad(output.loss, student)
        if name != "total_variation":  # whose sign is any number at 0
            assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_with_every_coordinate_it_is_the_online_loss(temperature: float, softcap: float | None) -> None:
    """The teacher's own hidden states and output layer as coordinates and basis."""
    teacher_hidden, teacher_weight, teacher_bias = (part.detach() for part in make_layer(11))
    layer = OutputLayer(teacher_weight, teacher_bias, softcap=softcap)
    logits = layer.logits(teacher_hidden)
    mask = torch.arange(N) % 4 != 1
    targets = replace(
        SparseTargets.from_logits(logits, k=K, knots=KNOTS, mask=mask),
        tail_coordinates=teacher_hidden,
        basis=TailBasis(teacher_bias, teacher_weight, softcap),
    )
    hidden, weight, bias = make_layer(12, vocab_size=V + 2)
    labels, options = make_labels(13), {"temperature": temperature, "kd_weight": 0.8, "ce_weight": 0.2}
    online = fused_online_loss(
        hidden, OutputLayer(weight, bias), lambda rows: logits[rows], mask, labels, LossSettings(**options)
    )
    expected = torch.autograd.grad(online.loss, [hidden, weight, bias])
    for cached in (
        fused_distillation_loss(hidden, weight, targets, labels, bias=bias, chunk_size=3, **options),
        distillation_loss(hidden @ weight.T + bias, targets, labels, **options),
    ):
        assert cached.kd.item() == pytest.approx(online.kd.item(), abs=1e-10)
        assert cached.agreement.item() == pytest.approx(online.agreement.item())
        for one, other in zip(torch.autograd.grad(cached.loss, [hidden, weight, bias]), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [4, 14])
def test_divergences_are_over_the_whole_vocabulary(name: str, temperature: float, k: int) -> None:
    """Of p^ in the order of the head and then of the other tokens, for `tail_aware_kl` with the modes in the head."""
    teacher, targets = shaped(14, mask=torch.ones(N, dtype=torch.bool), k=k)
    student, labels = 2 * normal(generator(15), N, V), make_labels(16)
    alpha, modes, t = resolve_alpha(name, None), min(MODES, k), shape_logits(targets)
    pairs = []
    for position in range(N):
        order = np.argsort(-teacher[position].numpy())
        p = by_the_definition(teacher[position].numpy(), t[position], temperature, V, k=k)
        pairs.append((p[order], softmax(student[position].numpy() / temperature)[order]))
    mean_rest = float(np.mean([p[modes:].sum() for p, _ in pairs]))
    if name == "tail_aware_kl":
        values = [with_modes(p, q, modes, alpha / mean_rest) for p, q in pairs]
    else:
        values = [by_the_formula(name, p, q, alpha, mean_rest) for p, q in pairs]
    output = distillation_loss(student, targets, labels, temperature=temperature, divergence=name)
    assert output.kd.item() == pytest.approx(float(np.mean(values)), abs=1e-9)


def with_modes(p: np.ndarray, q: np.ndarray, modes: int, scale: float) -> float:
    """tail_aware_kl: the KL over the first `modes` tokens and the rest, and within the rest."""
    p_rest, q_rest = p[modes:].sum(), q[modes:].sum()
    first = kl(np.append(p[:modes], p_rest), np.append(q[:modes], q_rest))
    return first + scale * p_rest * kl(p[modes:] / p_rest, q[modes:] / q_rest)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [4, 14])
@pytest.mark.parametrize("student_vocab", [V, V + 5])
@pytest.mark.parametrize("knows_labels", [False, True])
def test_fused_divergences_are_the_definition(name: str, k: int, student_vocab: int, knows_labels: bool) -> None:
    teacher, targets = shaped(17, k=k)
    labels = make_labels(18, targets)
    if knows_labels:
        targets = with_label_log_probs(targets, teacher, labels)
    layer = make_layer(19, vocab_size=student_vocab)
    options = {"temperature": 2.0, "kd_weight": 0.6, "ce_weight": 0.4, "divergence": name}
    assert_fused_is_reference(*layer, targets, labels, tolerance=1e-9, chunk_size=3, **options)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_smaller_student_vocabulary_keeps_head_and_mass(temperature: float, fused: bool) -> None:
    smaller = V - 6
    teacher, targets = shaped(20, mask=torch.ones(N, dtype=torch.bool))
    student, labels = 2 * normal(generator(21), N, smaller), torch.full((N,), IGNORE)
    t, values = shape_logits(targets), []
    for position in range(N):
        p = softmax(teacher[position].numpy() / temperature)
        head = [v for v in np.argsort(-teacher[position].numpy())[:K] if v < smaller]
        rest = np.array([v for v in range(smaller) if v not in head])
        target = np.zeros(smaller)
        target[head] = p[head]
        target[rest] = (1 - p[head].sum()) * softmax(t[position][rest] / temperature)
        values.append(kl(target, softmax(student[position].numpy() / temperature)))
    fitting = targets.restrict_vocabulary(smaller)
    if fused:
        eye = torch.eye(smaller, dtype=torch.float64)
        output = fused_distillation_loss(student, eye, fitting, labels, temperature=temperature)
    else:
        output = distillation_loss(student, fitting, labels, temperature=temperature)
    assert output.kd.item() == pytest.approx(float(np.mean(values)), abs=1e-9)


def test_the_default_is_the_shape_where_there_is_one() -> None:
    _, targets = shaped(22)
    plain = replace(targets, tail_coordinates=None, basis=None)
    student, labels = 2 * normal(generator(23), N, V), make_labels(24)

    def kd(of: SparseTargets, **options) -> float:
        value = distillation_loss(student, of, labels, **options).kd.item()
        fused = fused_distillation_loss(student, torch.eye(V, dtype=torch.float64), of, labels, **options)
        assert fused.kd.item() == pytest.approx(value, abs=1e-10)
        return value

    assert kd(targets) == kd(targets, tail="shape") != kd(targets, tail="bucket")
    assert kd(plain) == kd(plain, tail="bucket")
    for tail in ("bucket", "renormalize", "renormalize_teacher", "drop", "uniform", "label"):
        assert kd(targets, tail=tail) == kd(plain, tail=tail), "others ignore the shape"
    with pytest.raises(ValueError, match=r"cache\.tail_rank"):
        kd(plain, tail="shape")


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tau", [0.06, 0.4])
@pytest.mark.parametrize("knows_labels", [False, True])
def test_samples_are_ignored_where_there_is_a_shape(temperature: float, tau: float, knows_labels: bool) -> None:
    """Also where no token reaches tau, so that the head is empty."""
    teacher, targets = shaped(25, mask=torch.ones(N, dtype=torch.bool), support="threshold", tau=tau)
    assert (targets.draws > 0).any() and (targets.head_mask.sum(-1) == 0).any() == (tau == 0.4)
    student, labels = 2 * normal(generator(26), N, V), make_labels(27)
    if knows_labels:
        targets = with_label_log_probs(targets, teacher, labels)
    t, values = shape_logits(targets), []
    for position in range(N):
        head = int((torch.softmax(teacher[position], -1) >= tau).sum())
        label = int(labels[position]) if knows_labels else IGNORE
        p = by_the_definition(teacher[position].numpy(), t[position], temperature, V, k=head, label=label)
        values.append(kl(p, softmax(student[position].numpy() / temperature)))
    for name in ("kl", "reverse_kl"):
        output = distillation_loss(student, targets, labels, temperature=temperature, divergence=name)
        eye = torch.eye(V, dtype=torch.float64)
        fused = fused_distillation_loss(student, eye, targets, labels, temperature=temperature, divergence=name)
        assert fused.kd.item() == pytest.approx(output.kd.item(), abs=1e-10)
        if name == "kl":
            assert output.kd.item() == pytest.approx(float(np.mean(values)), abs=1e-9)
    plain = replace(targets, tail_coordinates=None, basis=None)
    options = {"temperature": temperature, "tail": "bucket"}
    bucket = distillation_loss(student, targets, labels, **options).kd
    assert bucket == distillation_loss(student, plain, labels, **options).kd


@dataclass(frozen=True)
class Mean:
    """The mean of two teachers: a distribution over the whole vocabulary and nothing else."""

    parts: tuple[SparseTargets, SparseTargets]

    @property
    def mask(self) -> Tensor:
        return self.parts[0].mask

    @property
    def vocab_size(self) -> int:
        return self.parts[0].vocab_size

    def dense(self, temperature: float) -> Tensor:
        return 0.3 * self.parts[0].dense(temperature) + 0.7 * self.parts[1].dense(temperature)

    def flatten(self) -> Mean:
        return Mean((self.parts[0].flatten(), self.parts[1].flatten()))

    def __getitem__(self, index) -> Mean:
        return Mean((self.parts[0][index], self.parts[1][index]))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jensen_shannon", "soft_cross_entropy"])
@pytest.mark.parametrize("student_vocab", [V, V + 4])
def test_targets_that_are_known_densely_only(temperature: float, name: str, student_vocab: int) -> None:
    targets = Mean((shaped(28)[1], shaped(29)[1]))
    labels = make_labels(30)
    student = 2 * normal(generator(31), N, student_vocab)
    options = {"temperature": temperature, "divergence": name}
    output = distillation_loss(student, targets, labels, **options)
    if name != "reverse_kl" or student_vocab == V:  # which is endless where the teacher gives nothing
        pairs = [
            (p, softmax(x / temperature))
            for p, x, kept in zip(targets.dense(temperature).numpy(), student.numpy(), targets.mask, strict=True)
            if kept
        ]
        padded = [(np.append(p, np.zeros(student_vocab - V)), q) for p, q in pairs]
        if name == "kl":
            values = [kl(p, q) for p, q in padded]
        elif student_vocab == V:
            values = [by_the_formula(name, p, q, resolve_alpha(name, None), 1.0) for p, q in padded]
        else:
            values = [output.kd.item()]
        assert output.kd.item() == pytest.approx(float(np.mean(values)), abs=1e-9)
    layer = make_layer(32, vocab_size=student_vocab)
    assert_fused_is_reference(*layer, targets, labels, tolerance=1e-9, chunk_size=3, ce_weight=0.3, **options)


def test_targets_that_are_known_densely_only_have_no_other_tail() -> None:
    targets = Mean((shaped(28)[1], shaped(29)[1]))
    student, labels = normal(generator(31), N, V), make_labels(30)
    assert distillation_loss(student, targets, labels).coverage == 1
    for options in ({"tail": "bucket"}, {"tail": "label"}, {"divergence": "tail_aware_kl"}):
        with pytest.raises(ValueError, match="one teacher's targets"):
            distillation_loss(student, targets, labels, **options)


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from(TEMPERATURES), k=st.integers(1, V))
@settings(deadline=None, max_examples=40)
def test_the_labels_probability_never_makes_it_worse(seed: int, temperature: float, k: int) -> None:
    """KL(p || p^) falls by what the label's mass within the tail was off, but for the limit of its share."""
    teacher, targets = shaped(seed, mask=torch.ones(N, dtype=torch.bool), k=k)
    labels = make_labels(seed)
    knowing = with_label_log_probs(targets, teacher, labels)
    p = torch.softmax(teacher / temperature, -1)
    # The loss of a student with logits T log p is KL(p^ || p), so p^ itself is read from the gradient: T (q - p^) / N.
    student = (temperature * p.log()).requires_grad_()
    hats = []
    for of in (targets, knowing):
        (gradient,) = torch.autograd.grad(distillation_loss(student, of, labels, temperature=temperature).loss, student)
        hats.append(p - gradient * N / temperature)
    for hat in hats:
        torch.testing.assert_close(hat.sum(-1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-10)
    label = labels.clamp(min=0).unsqueeze(-1)
    exact = (hats[1].gather(-1, label) - p.gather(-1, label)).abs().squeeze(-1) < 1e-10
    head = p.topk(k).values.sum(-1)
    dominant = p.gather(-1, label).squeeze(-1) > LARGEST_SHARE * (1 - head)
    assert exact[(labels != IGNORE) & ~dominant].all()
    if k < V - 1:
        worse = (p * (hats[0].clamp(min=1e-300) / hats[1].clamp(min=1e-300)).log()).sum(-1)
        assert (worse[~dominant] < 1e-9).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_label_tail_is_a_bucket_beside_a_label_of_known_probability(temperature: float) -> None:
    teacher, targets = shaped(33, mask=torch.ones(N, dtype=torch.bool))
    labels = make_labels(34, targets)
    targets = with_label_log_probs(targets, teacher, labels)
    student = 2 * normal(generator(35), N, V)
    values = []
    for position in range(N):
        p, q = (softmax(x[position].numpy() / temperature) for x in (teacher, student))
        exact, label = list(np.argsort(-teacher[position].numpy())[:K]), int(labels[position])
        rest = 1 - p[exact].sum()
        target, other = list(p[exact]), list(q[exact])
        if label != IGNORE and label not in exact:
            target.append(min(p[label], LARGEST_SHARE * rest))
            other.append(q[label])
        values.append(kl(np.append(target, 1 - sum(target)), np.append(other, 1 - sum(other))))
    output = distillation_loss(student, targets, labels, temperature=temperature, tail="label")
    assert output.kd.item() == pytest.approx(float(np.mean(values)), abs=1e-9)
    layer = make_layer(36)
    options = {"temperature": temperature, "ce_weight": 0.3, "tail": "label"}
    assert_fused_is_reference(*layer, targets, labels, tolerance=1e-9, chunk_size=3, **options)


def test_a_rounded_label_cannot_take_more_than_the_tail() -> None:
    teacher, targets = shaped(37, mask=torch.ones(N, dtype=torch.bool))
    labels = torch.randint(0, V, (N,), generator=generator(38))
    targets = replace(targets, label_log_probs=torch.zeros(N, dtype=torch.float64))  # as if p(label) were 1
    student = torch.zeros(N, V, dtype=torch.float64, requires_grad=True)
    output = distillation_loss(student, targets, labels)
    (gradient,) = torch.autograd.grad(output.loss, student)
    hat = 1 / V - gradient * N
    tail = 1 - torch.softmax(teacher, -1).topk(K).values.sum(-1)
    outside = ~(targets.token_ids == labels.unsqueeze(-1)).any(-1)
    taken = hat.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(taken[outside], LARGEST_SHARE * tail[outside], rtol=0, atol=1e-10)
    torch.testing.assert_close(hat.sum(-1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, K, V])
@pytest.mark.parametrize("teacher_scale", [1.0, 1000.0])
@pytest.mark.parametrize("shape_scale", [1.0, 1000.0])
def test_extremes_stay_finite(temperature: float, k: int, teacher_scale: float, shape_scale: float) -> None:
    """Teachers, shapes and students so sure that everything else underflows, in float32."""
    teacher, targets = shaped(39, dtype=torch.float32)
    sparse = SparseTargets.from_logits((teacher_scale * teacher).float(), k=k, mask=targets.mask)
    coordinates = shape_scale * targets.tail_coordinates
    targets = replace(sparse, tail_coordinates=coordinates, basis=targets.basis)
    labels = make_labels(40)
    for scale in (1.0, 1e4):
        student = (scale * normal(generator(41), N, V)).float().requires_grad_()
        options = {"temperature": temperature, "ce_weight": 0.1}
        reference = distillation_loss(student, targets, labels, **options)
        fused = fused_distillation_loss(student, torch.eye(V), targets, labels, chunk_size=4, **options)
        expected, actual = (torch.autograd.grad(output.loss, student)[0] for output in (reference, fused))
        for output, gradient in ((reference, expected), (fused, actual)):
            assert torch.isfinite(output.loss) and torch.isfinite(gradient).all()
        assert fused.loss.item() == pytest.approx(reference.loss.item(), rel=1e-5, abs=4 * 2.0**-10 * temperature**2)
        assert (actual - expected).abs().max() <= 4 * 2.0**-10 * temperature**2


def test_no_targets_at_all_cost_nothing() -> None:
    _, targets = shaped(42, mask=torch.zeros(N, dtype=torch.bool), dtype=torch.float32)
    hidden, weight, bias = make_layer(43, dtype=torch.float32)
    labels = torch.full((N,), IGNORE)
    for part in (slice(None), slice(0)):
        of, wanted, states = targets[part], labels[part], hidden[part]
        for output in (
            distillation_loss(states @ weight.T + bias, of, wanted, ce_weight=0.5),
            fused_distillation_loss(states, weight, of, wanted, bias=bias, ce_weight=0.5),
        ):
            assert output.loss == 0 and output.kd == 0 and output.positions == 0
            for gradient in torch.autograd.grad(output.loss, [hidden, weight, bias]):
                assert (gradient == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bfloat16_student(temperature: float) -> None:
    _, targets = shaped(44, dtype=torch.float32)
    hidden, weight, bias = make_layer(45, dtype=torch.bfloat16)
    labels, options = make_labels(46, targets), {"temperature": temperature, "ce_weight": 0.5}
    fused = fused_distillation_loss(hidden, weight, targets, labels, bias=bias, chunk_size=4, **options)
    exact_inputs = [t.detach().float().requires_grad_() for t in (hidden, weight, bias)]
    x = exact_inputs[0] @ exact_inputs[1].T + exact_inputs[2]
    exact = distillation_loss(x, targets, labels, **options)
    # As in test_loss: one rounding to bfloat16 moves a logit by at most 2^-8 of it, the student's and the shape's.
    unit = 2.0**-8
    moved = (float(x.detach().abs().max()) + np.abs(shape_logits(targets)).max()) * unit
    assert abs(fused.loss.item() - exact.loss.item()) <= 5 * moved
    actual = torch.autograd.grad(fused.loss, [hidden, weight, bias])
    expected = torch.autograd.grad(exact.loss, exact_inputs)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).abs().max() <= (moved + 4 * unit) * other.abs().max()


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_never_holds_all_logits(divergence: str, temperature: float) -> None:
    positions, vocab_size, width, chunk = 96, 200, 5, 8
    g = generator(47)
    targets = replace(
        SparseTargets.from_logits(torch.randn(positions, vocab_size, generator=g), k=6),
        tail_coordinates=torch.randn(positions, R, generator=g),
        basis=TailBasis(torch.randn(vocab_size, generator=g), torch.randn(vocab_size, R, generator=g)),
    )
    hidden = torch.randn(positions, width, generator=g, requires_grad=True)
    weight = torch.randn(vocab_size, width, generator=g, requires_grad=True)
    labels = torch.randint(0, vocab_size, (positions,), generator=g)
    allowed = chunk * (vocab_size + 1)
    assert positions * 7 <= allowed < positions * vocab_size / 4
    with LargestOutput() as fused:
        options = {"chunk_size": chunk, "temperature": temperature, "divergence": divergence}
        fused_distillation_loss(hidden, weight, targets, labels, ce_weight=0.5, **options).loss.backward()
    assert 0 < fused.numel <= allowed


def test_inputs_are_not_modified() -> None:
    teacher, targets = shaped(48, dtype=torch.float32)
    hidden, weight, bias = make_layer(49, dtype=torch.float32)
    labels = make_labels(50, targets)
    targets = with_label_log_probs(targets, teacher, labels)
    basis = (targets.basis.offset, targets.basis.directions)
    tensors = [hidden, weight, bias, labels, targets.token_ids, targets.log_probs, targets.tail_curve, targets.mask]
    tensors += [*basis, targets.tail_coordinates, targets.label_log_probs]
    before = [tensor.detach().clone() for tensor in tensors]
    fused_distillation_loss(hidden, weight, targets, labels, bias=bias, ce_weight=0.1).loss.backward()
    logits = torch.randn(N, V)
    kept = logits.clone()
    distillation_loss(logits, targets, labels, ce_weight=0.1)
    fused_distillation_loss(logits, torch.eye(V), targets, labels)
    assert torch.equal(logits, kept)
    assert all(torch.equal(tensor.detach(), copy) for tensor, copy in zip(tensors, before, strict=True))
