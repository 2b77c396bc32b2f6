"""Losses: the reference against the formulas in float64, the fused form against the reference, and their limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.corpus.labels import IGNORE
from logit_cache.distill.fused import fused_distillation_loss, fused_online_loss
from logit_cache.distill.loss import distillation_loss
from logit_cache.distill.loss_settings import TAIL_MODES, LossSettings
from logit_cache.models.output_layer import OutputLayer
from logit_cache.targets.sparse_targets import SparseTargets
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

KNOTS = (0.25, 0.5, 0.75, 2.0)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
V, K, D, N = 23, 5, 7, 11
SPARSE_TAILS = tuple(tail for tail in TAIL_MODES if tail != "shape")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_targets(seed: int, *, k: int = K, vocab_size: int = V, dtype=torch.float64, mask=None, scale: float = 3.0):
    """Teacher logits [N, vocab_size] and their targets; about a third of the positions is masked by default."""
    logits = scale * torch.randn(N, vocab_size, generator=generator(seed), dtype=torch.float64)
    if mask is None:
        mask = torch.tensor([True, True, False] * N)[:N]
    return logits, SparseTargets.from_logits(logits.to(dtype), k=k, knots=KNOTS, mask=mask)


def make_labels(seed: int, targets: SparseTargets | None = None) -> torch.Tensor:
    """Labels of which some are missing, some outside the head and, given targets, some inside it."""
    labels = torch.randint(0, V, (N,), generator=generator(seed))
    if targets is not None:
        inside = (targets.token_ids[:, 1] >= 0) & (torch.arange(N) % 2 == 0)
        labels = torch.where(inside, targets.token_ids[:, 1], labels)
    labels[3] = labels[9] = IGNORE
    return labels


def make_layer(seed: int, *, vocab_size: int = V, dtype=torch.float64):
    g = generator(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(vocab_size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, bias


def by_the_formulas(
    student: np.ndarray, teacher: np.ndarray, mask, labels, *, k: int, temperature: float, tail: str
) -> tuple[float, float]:
    """(mean KL_T over the mask, mean CE over the labels): position by position, from full softmaxes."""
    divergences, entropies = [], []
    for x, teacher_x, has_target, label in zip(student, teacher, mask, labels, strict=True):
        if label != IGNORE:
            entropies.append(-math.log(softmax(x)[label]))
        if not has_target:
            continue
        # The teacher's vocabulary may be smaller than the student's.
        p, q = softmax(teacher_x / temperature), softmax(x / temperature)
        head = list(np.argsort(-teacher_x)[:k])
        rest = [v for v in range(len(q)) if v not in head]
        p_rest = sum(p[v] for v in rest if v < len(p))
        head_sum = sum(p[v] * math.log(p[v] / q[v]) for v in head)
        if tail == "bucket":
            value = head_sum + (p_rest * math.log(p_rest / sum(q[v] for v in rest)) if rest else 0.0)
        elif tail == "renormalize":
            p_head, q_head = sum(p[v] for v in head), sum(q[v] for v in head)
            value = sum(p[v] / p_head * math.log((p[v] / p_head) / (q[v] / q_head)) for v in head)
        elif tail == "renormalize_teacher":
            p_head = sum(p[v] for v in head)
            value = sum(p[v] / p_head * math.log(p[v] / p_head / q[v]) for v in head)
        elif tail == "drop":
            value = head_sum
        elif tail == "uniform":
            value = head_sum + sum(p_rest / len(rest) * math.log(p_rest / len(rest) / q[v]) for v in rest)
        else:
            target = {v: p[v] for v in head}
            if label != IGNORE:
                target[label] = target.get(label, 0.0) + p_rest
            value = sum(weight * math.log(weight / q[v]) for v, weight in target.items() if weight > 0)
        divergences.append(value)
    return sum(divergences) / max(len(divergences), 1), sum(entropies) / max(len(entropies), 1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("tail", SPARSE_TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("student_vocab", [V, V + 4])
def test_the_reference_is_the_formulas(tail: str, temperature: float, student_vocab: int) -> None:
    teacher, targets = make_targets(0)
    labels = make_labels(1, targets)
    student = 2 * torch.randn(N, student_vocab, generator=generator(2), dtype=torch.float64)
    output = distillation_loss(
        student, targets, labels, temperature=temperature, kd_weight=0.7, ce_weight=0.3, tail=tail
    )
    kd, ce = by_the_formulas(
        student.numpy(),
        teacher.numpy(),
        targets.mask.tolist(),
        labels.tolist(),
        k=K,
        temperature=temperature,
        tail=tail,
    )
    assert output.kd.item() == pytest.approx(kd, abs=1e-10)
    assert output.ce.item() == pytest.approx(ce, abs=1e-10)
    assert output.loss.item() == pytest.approx(0.7 * temperature**2 * kd + 0.3 * ce, abs=1e-9)
    assert output.positions == targets.mask.sum()
    assert not output.kd.requires_grad and not output.ce.requires_grad


def test_leading_axes_do_not_matter() -> None:
    logits = torch.randn(2, 3, V, dtype=torch.float64, generator=generator(0))
    targets = SparseTargets.from_logits(torch.randn(2, 3, V, dtype=torch.float64, generator=generator(1)), k=K)
    labels = torch.randint(0, V, (2, 3), generator=generator(2))
    shaped = distillation_loss(logits, targets, labels, ce_weight=0.5)
    flat = distillation_loss(logits.reshape(6, V), targets.flatten(), labels.reshape(6), ce_weight=0.5)
    assert torch.equal(shaped.loss, flat.loss)
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator(3))
    hidden = torch.randn(2, 3, D, dtype=torch.float64, generator=generator(4), requires_grad=True)
    fused = fused_distillation_loss(hidden, weight, targets, labels, ce_weight=0.5)
    reference = distillation_loss(hidden @ weight.T, targets, labels, ce_weight=0.5)
    torch.testing.assert_close(fused.loss, reference.loss, rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(fused.loss, hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference.loss, hidden)[0], rtol=0, atol=1e-10)


def layer_logits(hidden, weight, bias, *, logit_scale: float = 1.0, softcap: float | None = None):
    x = hidden @ weight.T
    x = (x if bias is None else x + bias) * logit_scale
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def assert_fused_is_reference(
    hidden, weight, bias, targets, labels, *, tolerance: float, transform=None, chunk_size: int = 4, **loss
) -> None:
    """Value and every gradient, with an incoming gradient other than 1. Tolerance is relative to the largest entry."""
    transform = transform or {}
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    reference = distillation_loss(layer_logits(hidden, weight, bias, **transform), targets, labels, **loss)
    fused = fused_distillation_loss(
        hidden, weight, targets, labels, bias=bias, chunk_size=chunk_size, **transform, **loss
    )
    for name in ("loss", "kd", "ce"):
        one, other = getattr(fused, name).item(), getattr(reference, name).item()
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance), name
    assert fused.positions == reference.positions
    assert not fused.kd.requires_grad and not fused.ce.requires_grad
    expected = torch.autograd.grad(1.5 * reference.loss, inputs)
    actual = torch.autograd.grad(1.5 * fused.loss, inputs)
    for name, one, other in zip(("hidden", "weight", "bias"), actual, expected, strict=False):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.isfinite(one).all(), name
        largest = max(float(other.abs().max()), 1.0)
        assert (one - other).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("tail", SPARSE_TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_is_the_reference(tail: str, temperature: float, dtype: torch.dtype) -> None:
    """With positions that have no target, positions that have no label, and a bias."""
    _, targets = make_targets(3, dtype=dtype)
    hidden, weight, bias = make_layer(4, dtype=dtype)
    assert_fused_is_reference(
        hidden,
        weight,
        bias,
        targets,
        make_labels(5, targets),
        temperature=temperature,
        kd_weight=0.6,
        ce_weight=0.4,
        tail=tail,
        # float32: sums of some tens of terms, scaled by T^2 like the value they are compared with.
        tolerance=1e-9 if dtype == torch.float64 else 1e-5,
    )


@pytest.mark.parametrize("tail", SPARSE_TAILS)
def test_fused_gradient_is_finite_where_positions_have_no_target(tail: str) -> None:
    """Rows of a cache always hold such positions: the last of a row and of every document."""
    mask = torch.ones(N, dtype=torch.bool)
    mask[-1] = False
    _, targets = make_targets(6, mask=mask)
    hidden, weight, _ = make_layer(7)
    loss = fused_distillation_loss(hidden, weight, targets, make_labels(8), tail=tail).loss
    for gradient in torch.autograd.grad(loss, [hidden, weight]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("chunk_size", [1, 3, N - 1, N, 1000])
def test_the_chunk_size_does_not_change_anything(chunk_size: int) -> None:
    _, targets = make_targets(9)
    hidden, weight, bias = make_layer(10)
    labels = make_labels(11)
    assert_fused_is_reference(
        hidden, weight, bias, targets, labels, tolerance=1e-9, chunk_size=chunk_size, temperature=2.0, ce_weight=0.2
    )


def test_the_backward_pass_runs_once() -> None:
    _, targets = make_targets(9)
    hidden, weight, _ = make_layer(10)
    loss = fused_distillation_loss(hidden, weight, targets, make_labels(11), ce_weight=0.5).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass: do not use retain_graph"):
        loss.backward()


def test_a_chunk_size_below_one_is_refused() -> None:
    _, targets = make_targets(9)
    hidden, weight, _ = make_layer(10)
    with pytest.raises(ValueError, match="chunk_size"):
        fused_distillation_loss(hidden, weight, targets, make_labels(11), chunk_size=0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "transform", [{"logit_scale": 0.3}, {"softcap": 2.0}, {"logit_scale": 1.7, "softcap": 3.0}], ids=str
)
@pytest.mark.parametrize("tail", SPARSE_TAILS)
def test_scaled_and_capped_output_layers(transform: dict[str, float], tail: str, with_bias: bool) -> None:
    _, targets = make_targets(12)
    hidden, weight, bias = make_layer(13)
    assert_fused_is_reference(
        hidden,
        weight,
        bias if with_bias else None,
        targets,
        make_labels(14, targets),
        transform=transform,
        tolerance=1e-9,
        temperature=2.0,
        ce_weight=0.5,
        tail=tail,
    )


def test_a_tied_output_layer_gets_both_gradients() -> None:
    _, targets = make_targets(15)
    _, weight, _ = make_layer(16)
    labels = make_labels(17)
    tokens = torch.randint(0, V, (N,), generator=generator(18))

    def gradient(fused: bool) -> torch.Tensor:
        hidden = torch.tanh(F.embedding(tokens, weight))
        if fused:
            loss = fused_distillation_loss(hidden, weight, targets, labels, ce_weight=0.5, chunk_size=4).loss
        else:
            loss = distillation_loss(hidden @ weight.T, targets, labels, ce_weight=0.5).loss
        return torch.autograd.grad(loss, weight)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=1e-9)


def test_frozen_inputs_get_no_gradient() -> None:
    _, targets = make_targets(15)
    hidden, weight, _ = make_layer(16)
    labels = make_labels(17)
    full = torch.autograd.grad(fused_distillation_loss(hidden, weight, targets, labels).loss, [hidden, weight])
    only_hidden = fused_distillation_loss(hidden, weight.detach(), targets, labels).loss
    only_weight = fused_distillation_loss(hidden.detach(), weight, targets, labels).loss
    assert torch.equal(torch.autograd.grad(only_hidden, hidden)[0], full[0])
    assert torch.equal(torch.autograd.grad(only_weight, weight)[0], full[1])
    with torch.no_grad():
        assert not fused_distillation_loss(hidden, weight, targets, labels).loss.requires_grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4 / 3, 2.0, 4.0])
def test_a_student_equal_to_its_teacher_has_no_gradient(temperature: float) -> None:
    """At the knots the tail mass is exact, so loss and gradient are 0 but for float64 rounding."""
    hidden, weight, _ = make_layer(19)
    logits = (hidden @ weight.T).detach()
    targets = SparseTargets.from_logits(logits, k=K, knots=KNOTS)
    labels = make_labels(20)
    reference = distillation_loss(hidden @ weight.T, targets, labels, temperature=temperature)
    fused = fused_distillation_loss(hidden, weight, targets, labels, temperature=temperature)
    for output in (reference, fused):
        assert abs(output.loss.item()) < 1e-12
        for gradient in torch.autograd.grad(output.loss, [hidden, weight]):
            assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [1.2, 3.0, 6.0])
def test_a_student_equal_to_its_teacher_between_the_knots(temperature: float) -> None:
    """There the tail mass is interpolated, right to about 0.005, which moves the KL by its square."""
    hidden, weight, _ = make_layer(19)
    targets = SparseTargets.from_logits((hidden @ weight.T).detach(), k=K)
    output = distillation_loss(hidden @ weight.T, targets, make_labels(20), temperature=temperature)
    assert 0 <= output.kd.item() < 1e-4


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_teacher", "drop", "uniform"])
def test_with_the_whole_vocabulary_it_is_the_dense_kl(temperature: float, tail: str) -> None:
    teacher, targets = make_targets(21, k=V, mask=torch.ones(N, dtype=torch.bool))
    hidden, weight, _ = make_layer(22)
    x = hidden @ weight.T
    dense = temperature**2 * F.kl_div(
        F.log_softmax(x / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    expected = torch.autograd.grad(dense, [hidden, weight])
    labels = make_labels(23)
    for output in (
        distillation_loss(hidden @ weight.T, targets, labels, temperature=temperature, tail=tail),
        fused_distillation_loss(hidden, weight, targets, labels, temperature=temperature, tail=tail, chunk_size=4),
    ):
        assert output.loss.item() == pytest.approx(dense.item(), abs=1e-9)
        for one, other in zip(torch.autograd.grad(output.loss, [hidden, weight]), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_bucket_gradient_is_the_formula(temperature: float) -> None:
    """T (q - p) in the head and T q (1 - p(R) / q(R)) outside it, T^2 included, over the number of positions."""
    teacher, targets = make_targets(24, mask=torch.ones(N, dtype=torch.bool))
    student = (2 * torch.randn(N, V, generator=generator(25), dtype=torch.float64)).requires_grad_()
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student.detach() / temperature, -1)
    in_head = torch.zeros(N, V, dtype=torch.bool).scatter(-1, teacher.topk(K).indices, True)
    ratio = (p * ~in_head).sum(-1, keepdim=True) / (q * ~in_head).sum(-1, keepdim=True)
    expected = temperature * torch.where(in_head, q - p, q * (1 - ratio)) / N

    reference = distillation_loss(student, targets, make_labels(26), temperature=temperature).loss
    # With the identity as output layer the gradient of the hidden states is that of the logits.
    eye = torch.eye(V, dtype=torch.float64)
    fused = fused_distillation_loss(student, eye, targets, make_labels(26), temperature=temperature).loss
    for loss in (reference, fused):
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_both_readings_of_a_renormalised_teacher(temperature: float) -> None:
    """At a student that equals its teacher: over the head alone all is well, over the vocabulary its tail is pushed out
    with the gradient T (q - p~), T^2 included, over the number of positions."""
    teacher, targets = make_targets(24, mask=torch.ones(N, dtype=torch.bool))
    student, labels = teacher.clone().requires_grad_(), make_labels(26)
    q = torch.softmax(teacher / temperature, -1)
    head = torch.zeros(N, V, dtype=torch.bool).scatter(-1, teacher.topk(K).indices, True)
    renormalised = (q * head) / (q * head).sum(-1, keepdim=True)
    expected = {"renormalize": torch.zeros_like(q), "renormalize_teacher": temperature * (q - renormalised) / N}
    lost = -(q * head).sum(-1).log().mean().item()  # KL(p~ || p) = - log p(H)
    eye = torch.eye(V, dtype=torch.float64)
    for tail, gradient in expected.items():
        options = {"temperature": temperature, "tail": tail}
        for output in (
            distillation_loss(student, targets, labels, **options),
            fused_distillation_loss(student, eye, targets, labels, **options),
        ):
            assert output.kd.item() == pytest.approx(lost if tail == "renormalize_teacher" else 0.0, abs=1e-12)
            torch.testing.assert_close(torch.autograd.grad(output.loss, student)[0], gradient, rtol=0, atol=1e-12)


def extreme(seed: int) -> torch.Tensor:
    """Logits at +-1e4, and rows where a few tokens hold all the mass."""
    g = generator(seed)
    logits = torch.where(torch.rand(N, V, generator=g) < 0.4, 1e4, -1e4) + torch.randn(N, V, generator=g)
    logits[0] = -1e4
    logits[0, 2] = 1e4
    logits[1] = torch.arange(V) * 10.0
    return logits


@pytest.mark.parametrize("tail", SPARSE_TAILS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("teacher_is", ["extreme", "mild"])
@pytest.mark.parametrize("k", [1, K, V])
def test_extreme_logits_stay_finite(tail: str, temperature: float, teacher_is: str, k: int) -> None:
    teacher = extreme(27) if teacher_is == "extreme" else torch.randn(N, V, generator=generator(28))
    targets = SparseTargets.from_logits(teacher, k=k)
    labels = make_labels(29)
    students = {"extreme": extreme(30), "the teacher": teacher.clone()}
    # The student's head holds all mass to the last bit of float32, while the teacher's tail holds some.
    certain = torch.zeros(N, V).scatter(-1, targets.token_ids, 200.0)
    for name, student in {**students, "certain": certain}.items():
        student.requires_grad_()
        reference = distillation_loss(student, targets, labels, temperature=temperature, ce_weight=0.1, tail=tail)
        fused = fused_distillation_loss(
            student, torch.eye(V), targets, labels, temperature=temperature, ce_weight=0.1, tail=tail, chunk_size=4
        )
        expected = torch.autograd.grad(reference.loss, student)[0]
        actual = torch.autograd.grad(fused.loss, student)[0]
        for output, gradient in ((reference, expected), (fused, actual)):
            assert torch.isfinite(output.loss) and torch.isfinite(gradient).all(), name
        # Log-probabilities of size 1e4 are 2^-10 apart; two roundings of them make up the difference.
        scale = max(temperature**2, 1.0)
        assert fused.loss.item() == pytest.approx(reference.loss.item(), rel=1e-5, abs=4 * 2.0**-10 * scale), name
        assert (actual - expected).abs().max() <= 4 * 2.0**-10 * scale, name


@given(
    seed=st.integers(0, 2**31),
    teacher_scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
    student_scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    k=st.integers(1, V),
    temperature=st.sampled_from([0.5, 1.0, 1.3, 2.0, 4.0, 9.0]),
)
@settings(max_examples=80, deadline=None)
def test_the_bucket_kl_is_a_divergence(
    seed: int, teacher_scale: float, student_scale: float, k: int, temperature: float
) -> None:
    """Between two distributions over head and bucket; also where the tail is interpolated, as both sum to one."""
    g = generator(seed)
    targets = SparseTargets.from_logits(
        teacher_scale * torch.randn(3, V, generator=g, dtype=torch.float64), k=k, knots=KNOTS
    )
    student = student_scale * torch.randn(3, V, generator=g, dtype=torch.float64)
    labels = torch.full((3,), IGNORE)
    # Terms up to 1e3 cancel in float64: 1e3 * 2^-53 * the number of terms.
    for position in range(3):
        part = slice(position, position + 1)
        arguments = (targets[part], labels[part])
        assert distillation_loss(student[part], *arguments, temperature=temperature).kd.item() >= -1e-11
        eye = torch.eye(V, dtype=torch.float64)
        assert fused_distillation_loss(student[part], eye, *arguments, temperature=temperature).kd.item() >= -1e-11


@pytest.mark.parametrize("tail", SPARSE_TAILS)
def test_no_positions_at_all_cost_nothing(tail: str) -> None:
    _, targets = make_targets(31, mask=torch.zeros(N, dtype=torch.bool))
    hidden, weight, bias = make_layer(32)
    labels = torch.full((N,), IGNORE)
    inputs = [hidden, weight, bias]
    for output in (
        distillation_loss(layer_logits(*inputs), targets, labels, ce_weight=0.5, tail=tail),
        fused_distillation_loss(hidden, weight, targets, labels, bias=bias, ce_weight=0.5, tail=tail),
    ):
        assert output.loss == 0 and output.kd == 0 and output.ce == 0 and output.positions == 0
        for gradient in torch.autograd.grad(output.loss, inputs):
            assert (gradient == 0).all()


def test_an_empty_batch_costs_nothing() -> None:
    _, targets = make_targets(31)
    hidden, weight, _ = make_layer(32)
    output = fused_distillation_loss(hidden[:0], weight, targets[:0], torch.empty(0, dtype=torch.int64), ce_weight=1.0)
    assert output.loss == 0
    assert (torch.autograd.grad(output.loss, weight)[0] == 0).all()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_micro_batches_add_up_to_the_batch(fused: bool, as_tensor: bool) -> None:
    """With totals given, sums over uneven micro-batches are the loss and the gradient of the whole."""
    _, targets = make_targets(33)
    hidden, weight, _ = make_layer(34)
    labels = make_labels(35)
    kd_positions, ce_positions = targets.mask.sum(), (labels != IGNORE).sum()
    if not as_tensor:
        kd_positions, ce_positions = int(kd_positions), int(ce_positions)
    settings = {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3}

    def loss(rows: slice, **counts) -> torch.Tensor:
        if fused:
            arguments = (hidden[rows], weight, targets[rows], labels[rows])
            return fused_distillation_loss(*arguments, chunk_size=2, **settings, **counts).loss
        return distillation_loss(hidden[rows] @ weight.T, targets[rows], labels[rows], **settings, **counts).loss

    whole = loss(slice(None))
    bounds = [0, 1, 3, 8, N]
    parts = sum(
        loss(slice(start, stop), kd_positions=kd_positions, ce_positions=ce_positions)
        for start, stop in itertools.pairwise(bounds)
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    expected = torch.autograd.grad(whole, [hidden, weight])
    for one, other in zip(torch.autograd.grad(parts, [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", SPARSE_TAILS)
def test_a_larger_student_vocabulary_works(tail: str) -> None:
    _, targets = make_targets(36)
    hidden, weight, bias = make_layer(37, vocab_size=V + 6)
    labels = make_labels(38, targets)
    assert_fused_is_reference(
        hidden, weight, bias, targets, labels, tolerance=1e-9, temperature=2.0, ce_weight=0.2, tail=tail
    )


def test_a_smaller_student_vocabulary_is_refused() -> None:
    _, targets = make_targets(36)
    hidden, weight, _ = make_layer(37, vocab_size=V - 1)
    with pytest.raises(ValueError, match=f"{V - 1} logits and the teacher {V}"):
        fused_distillation_loss(hidden, weight, targets, make_labels(38))
    with pytest.raises(ValueError, match=f"{V - 1} logits and the teacher {V}"):
        distillation_loss(hidden @ weight.T, targets, make_labels(38))


@pytest.mark.parametrize("argument", [{"tail": "tale"}, {"temperature": 0.0}, {"temperature": 0.4}], ids=str)
def test_unusable_arguments_are_refused(argument: dict[str, object]) -> None:
    _, targets = make_targets(36)
    hidden, weight, _ = make_layer(37)
    with pytest.raises(ValueError):
        fused_distillation_loss(hidden, weight, targets, make_labels(38), **argument)
    with pytest.raises(ValueError):
        distillation_loss(hidden @ weight.T, targets, make_labels(38), **argument)


@pytest.mark.parametrize("tail", SPARSE_TAILS)
def test_bfloat16_student(tail: str) -> None:
    _, targets = make_targets(39, dtype=torch.float32)
    hidden, weight, bias = make_layer(40, dtype=torch.bfloat16)
    labels = make_labels(41, targets)
    fused = fused_distillation_loss(
        hidden, weight, targets, labels, bias=bias, temperature=2.0, ce_weight=0.5, tail=tail, chunk_size=4
    )
    exact_inputs = [t.detach().float().requires_grad_() for t in (hidden, weight, bias)]
    x = layer_logits(*exact_inputs)
    exact = distillation_loss(x, targets, labels, temperature=2.0, ce_weight=0.5, tail=tail)
    assert fused.loss.dtype == torch.float32
    # One rounding to bfloat16 moves a logit by at most 2^-8 of it; the loss by |gradient|_1 <= 2 T + 2 * 0.5 as much.
    unit = 2.0**-8
    moved = float(x.detach().abs().max()) * unit
    assert abs(fused.loss.item() - exact.loss.item()) <= 5 * moved
    actual = torch.autograd.grad(fused.loss, [hidden, weight, bias])
    expected = torch.autograd.grad(exact.loss, exact_inputs)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.bfloat16
        # The softmaxes move by the logits' error, and the products are rounded themselves: a few units of the largest.
        assert (one.float() - other).abs().max() <= (moved + 4 * unit) * other.abs().max()


class LargestOutput(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("tail", SPARSE_TAILS)
def test_fused_never_holds_all_logits(tail: str) -> None:
    positions, vocab_size, width, chunk = 96, 200, 5, 8
    targets = SparseTargets.from_logits(torch.randn(positions, vocab_size, generator=generator(0)), k=6)
    hidden = torch.randn(positions, width, requires_grad=True)
    weight = torch.randn(vocab_size, width, requires_grad=True)
    labels = torch.randint(0, vocab_size, (positions,))
    allowed = max(chunk * vocab_size, vocab_size * width)
    assert positions * max(width, 6) <= allowed < positions * vocab_size / 4

    with LargestOutput() as fused:
        fused_distillation_loss(
            hidden, weight, targets, labels, chunk_size=chunk, temperature=2.0, ce_weight=0.5, tail=tail, softcap=5.0
        ).loss.backward()
    assert 0 < fused.numel <= allowed
    # The instrument sees what it should: the plain form does hold them.
    with LargestOutput() as plain:
        distillation_loss(hidden @ weight.T, targets, labels, tail=tail).loss.backward()
    assert plain.numel >= positions * vocab_size


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_online_is_the_cached_loss_with_the_whole_vocabulary(temperature: float) -> None:
    teacher, targets = make_targets(42, k=V)
    hidden, weight, bias = make_layer(43)
    labels = make_labels(44)
    settings = {"temperature": temperature, "kd_weight": 0.8, "ce_weight": 0.2}
    cached = fused_distillation_loss(hidden, weight, targets, labels, bias=bias, softcap=4.0, chunk_size=3, **settings)
    layer = OutputLayer(weight, bias, softcap=4.0)
    online = fused_online_loss(
        hidden, layer, lambda rows: teacher[rows], targets.mask, labels, LossSettings(**settings), chunk_size=4
    )
    for name in ("loss", "kd", "ce", "positions"):
        assert getattr(online, name).item() == pytest.approx(getattr(cached, name).item(), abs=1e-10), name
    expected = torch.autograd.grad(cached.loss, [hidden, weight, bias])
    for one, other in zip(torch.autograd.grad(online.loss, [hidden, weight, bias]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jensen_shannon"])
def test_online_gives_a_larger_student_what_the_cache_does(divergence: str) -> None:
    teacher, targets = make_targets(42, k=V)
    hidden, weight, bias = make_layer(43, vocab_size=V + 6)
    settings = {"temperature": 2.0, "ce_weight": 0.2, "divergence": divergence}
    labels, layer = make_labels(44), OutputLayer(weight, bias)
    cached = fused_distillation_loss(hidden, weight, targets, labels, bias=bias, **settings)
    online = fused_online_loss(
        hidden, layer, lambda rows: teacher[rows], targets.mask, labels, LossSettings(**settings), chunk_size=4
    )
    if (
        divergence != "reverse_kl"
    ):  # which is endless where the teacher gives nothing, and has another floor for a bucket
        assert online.loss.item() == pytest.approx(cached.loss.item(), abs=1e-10)
    for gradient in torch.autograd.grad(online.loss, [hidden, weight, bias]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("with_targets", [True, False])
def test_float16_keeps_what_is_small(with_targets: bool) -> None:
    """Many positions, a wide vocabulary and the scaled loss of GradScaler, against float64 of the same rounded numbers.

    Logits, their gradient and the products each round by half of 2^-10, and most errors are independent: well under 1 % of
    the whole, where a logit's gradient over the number of positions would be lost below 2^-24.
    """
    positions, vocab_size, width, scale = 4096, 2000, 16, 65536.0
    g = generator(60)
    hidden = torch.randn(positions, width, generator=g).half().requires_grad_()
    weight = (0.3 * torch.randn(vocab_size, width, generator=g)).half().requires_grad_()
    labels = torch.randint(0, vocab_size, (positions,), generator=g)
    targets = SparseTargets.from_logits(torch.randn(positions, vocab_size, generator=g), k=K) if with_targets else None
    settings = {"kd_weight": 1.0 if with_targets else 0.0, "ce_weight": 0.1}

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = [part.detach().to(dtype).requires_grad_() for part in (hidden, weight)]
        loss = fused_distillation_loss(*inputs, targets, labels, **settings).loss
        return torch.autograd.grad(loss, inputs, torch.tensor(scale, dtype=loss.dtype))

    for actual, expected in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        assert torch.isfinite(actual).all()
        assert (actual.double() - expected).norm() < 0.01 * expected.norm()


def test_without_targets_it_is_the_cross_entropy() -> None:
    hidden, weight, bias = make_layer(45)
    labels = make_labels(46)
    plain = F.cross_entropy(hidden @ weight.T + bias, labels, ignore_index=IGNORE)
    fused = fused_distillation_loss(hidden, weight, None, labels, bias=bias, kd_weight=0.0, ce_weight=1.0, chunk_size=4)
    assert fused.loss.item() == pytest.approx(plain.item(), abs=1e-12)
    assert fused.ce.item() == pytest.approx(plain.item(), abs=1e-12)
    expected = torch.autograd.grad(plain, [hidden, weight, bias])
    for one, other in zip(torch.autograd.grad(fused.loss, [hidden, weight, bias]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="kd_weight"):
        fused_distillation_loss(hidden, weight, None, labels, kd_weight=1.0)


@pytest.mark.parametrize("tail", SPARSE_TAILS)
def test_inputs_are_not_modified(tail: str) -> None:
    _, targets = make_targets(47)
    hidden, weight, bias = make_layer(48)
    labels = make_labels(49, targets)
    tensors = [hidden, weight, bias, labels, targets.token_ids, targets.log_probs, targets.tail_curve, targets.mask]
    before = [t.detach().clone() for t in tensors]
    eye = torch.eye(V, dtype=torch.float64)
    fused_distillation_loss(hidden, weight, targets, labels, bias=bias, ce_weight=0.1, tail=tail).loss.backward()
    logits = torch.randn(N, V, dtype=torch.float64)
    kept = logits.clone()
    distillation_loss(logits, targets, labels, ce_weight=0.1, tail=tail)
    fused_distillation_loss(logits, eye, targets, labels, tail=tail)
    assert torch.equal(logits, kept)
    assert all(torch.equal(tensor.detach(), copy) for tensor, copy in zip(tensors, before, strict=True))


DIVERGENCES = ("kl", "reverse_kl", "jensen_shannon", "skew_kl", "total_variation", "tail_aware_kl")


@pytest.mark.parametrize(
    ("support", "divergence"),
    [*itertools.product(("topk", "topp"), DIVERGENCES), ("threshold", "kl"), ("sampled", "kl")],
)
def test_a_student_without_numbers_has_a_loss_of_nan(support: str, divergence: str) -> None:
    """A training that has diverged says so; nothing is read or written outside."""
    teacher = 3 * torch.randn(N, V, generator=generator(1))
    targets = SparseTargets.from_logits(teacher, support=support, k=K, p=0.9, tau=0.1, draws=9)
    hidden, weight, _ = make_layer(3, dtype=torch.float32)
    labels, numbers = make_labels(4, targets), {"temperature": 2.0, "divergence": divergence, "ce_weight": 0.5}
    for bad in (math.nan, math.inf):
        broken = hidden.detach().clone()
        broken[2, 1] = bad
        broken.requires_grad_()
        plain = distillation_loss(broken @ weight.T, targets, labels, **numbers)
        fused = fused_distillation_loss(broken, weight, targets, labels, **numbers)
        for output in (plain, fused):
            output.loss.backward()
            assert output.loss.isnan() and output.kd.isnan() and output.ce.isnan()
