"""The compiled losses of a CPU: against the definition in float64, over several blocks of tokens and several threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from logit_cache.corpus.labels import IGNORE
from logit_cache.distill.fused import fused_distillation_loss
from logit_cache.distill.loss import distillation_loss
from logit_cache.targets.basis import TailBasis
from logit_cache.targets.sparse_targets import SparseTargets

V, N, K, R = 5003, 70, 20, 6


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def double(targets: SparseTargets) -> SparseTargets:
    assert targets.basis is not None
    basis = replace(
        targets.basis, offset=targets.basis.offset.double(), directions=targets.basis.directions.double(), digest=""
    )
    return replace(targets.map(lambda part: part.double() if part.is_floating_point() else part), basis=basis)


def problem(softcap: float | None = None) -> tuple[torch.Tensor, SparseTargets, torch.Tensor]:
    """Float32 logits of a student with 5 more tokens than the teacher, targets with a shape, labels."""
    g = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(N, V, generator=g)
    targets = SparseTargets.from_logits(teacher, k=K, mask=torch.arange(N) % 5 != 2)
    basis = TailBasis(torch.randn(V, generator=g), torch.randn(V, R, generator=g), softcap)
    targets = replace(targets, basis=basis, tail_coordinates=torch.randn(N, R, generator=g))
    student = 4 * torch.randn(N, V + 5, generator=g)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[::2] = targets.token_ids[::2, 3].clamp(min=0)
    labels[::7] = IGNORE
    return student, targets, labels


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 4.0, 1000.0])
@pytest.mark.parametrize("tail", ["shape", "bucket"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_they_are_the_definition(temperature: float, tail: str, softcap: float | None) -> None:
    student, targets, labels = problem(softcap)
    options = {"temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.3, "tail": tail}
    exact_student = student.double().requires_grad_()
    exact = distillation_loss(exact_student, double(targets), labels, **options)
    (expected,) = torch.autograd.grad(exact.loss, exact_student)
    student.requires_grad_()
    fused = fused_distillation_loss(student, torch.eye(V + 5), targets, labels, **options)
    (actual,) = torch.autograd.grad(fused.loss, student)
    # Logits up to 20 nats from the largest are off by 2^-24 of that in float32, and as many roundings follow; where the KL
    # is small, it is the difference of terms of up to log V, 9 nats.
    for name, factor in (("loss", temperature**2), ("kd", 1.0), ("ce", 1.0), ("agreement", 1.0)):
        one, other = getattr(fused, name).item(), getattr(exact, name).item()
        assert one == pytest.approx(other, rel=40 * 2.0**-24, abs=9 * 2.0**-24 * factor), name
    largest = float(expected.abs().max())
    assert (actual - expected).abs().max() <= 40 * 2.0**-24 * largest
    if tail == "shape":
        # Also where the gradient is small: that of a token is made of q at 1 and at T, p^ and the label.
        softmaxes = [torch.softmax(exact_student.detach() / t, -1)[:, :V] for t in (1.0, temperature)]
        label = torch.zeros(N, V).scatter(-1, labels.clamp(min=0).unsqueeze(-1), 1.0)
        scale = sum(softmaxes) + double(targets).dense(temperature) + label
        off = (actual - expected)[:, :V].abs()
        assert (off <= 100 * 2.0**-24 * temperature / targets.mask.sum() * scale)[targets.mask].all()


def test_the_cross_entropy_alone() -> None:
    student, _, labels = problem()
    exact_student = student.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(exact_student, labels, ignore_index=IGNORE)
    (expected,) = torch.autograd.grad(exact, exact_student)
    student.requires_grad_()
    fused = fused_distillation_loss(student, torch.eye(V + 5), None, labels, kd_weight=0.0, ce_weight=1.0)
    (actual,) = torch.autograd.grad(fused.loss, student)
    assert fused.ce.item() == pytest.approx(exact.item(), rel=40 * 2.0**-24)
    assert (actual - expected).abs().max() <= 40 * 2.0**-24 * expected.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["shape", "bucket", None])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bfloat16_is_rounded_once(temperature: float, tail: str | None, softcap: float | None) -> None:
    """The same logits in bfloat16: the gradient of float32, rounded, but for the shape, whose exponents are rounded too."""
    student, targets, labels = problem(softcap)
    low = student.bfloat16()
    options = {"temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.3, "tail": tail}
    of = targets if tail is not None else None
    if of is None:
        options = {"kd_weight": 0.0, "ce_weight": 1.0}
    # The identity as output layer keeps logits as they are, and the gradient of the hidden states is that of the logits.
    results = []
    for hidden in (low.requires_grad_(), low.detach().float().requires_grad_()):
        output = fused_distillation_loss(hidden, torch.eye(V + 5, dtype=hidden.dtype), of, labels, **options)
        results.append((output, torch.autograd.grad(output.loss, hidden)[0].double()))
    (one, actual), (other, expected) = results
    # Products u z of size up to 10 are rounded to 2^-8 of that: p^ moves by as much of itself, and the KL by less.
    moved = 10 * 2.0**-8 if tail == "shape" else 0.0
    for name in ("loss", "kd", "ce"):
        assert getattr(one, name).item() == pytest.approx(getattr(other, name).item(), rel=1e-6 + moved / 8), name
    assert one.agreement == other.agreement
    assert (actual - expected).norm() <= (2.0**-8 + moved) * expected.norm()


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    student, targets, labels = problem()
    labels[1] = V + 5
    for of, options in ((targets, {}), (None, {"kd_weight": 0.0, "ce_weight": 1.0})):
        with pytest.raises(ValueError, match=f"label {V + 5} is outside"):
            fused_distillation_loss(student, torch.eye(V + 5), of, labels, **options)
