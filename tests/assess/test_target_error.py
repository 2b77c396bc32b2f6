"""The errors of targets against autograd and whole distributions, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from logit_cache import SparseTargets, distillation_loss
from logit_cache.assess import target_error
from logit_cache.assess.target_error import Group, Shapes, States, Uniform, sketch, target_errors
from logit_cache.models.output_layer import OutputLayer
from logit_cache.targets.basis import TailBasis
from logit_cache.targets.supports import Support
from torch import Tensor

N, V, D, R = 37, 300, 12, 5
TEMPERATURES = (1.0, 2.0, 4.0)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_error, "_POSITIONS", 16)
    monkeypatch.setattr(target_error, "_TOKENS", 64)


def states(seed: int, **layer: object) -> States:
    generator = torch.Generator().manual_seed(seed)
    weight, hidden = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (V, N))
    return States(hidden, OutputLayer(weight, **layer))  # type: ignore[arg-type]


def with_shape(targets: SparseTargets) -> SparseTargets:
    generator = torch.Generator().manual_seed(9)
    basis = TailBasis(torch.randn(V, generator=generator), torch.randn(V, R, generator=generator), softcap=7.0)
    coordinates = torch.randn(len(targets.mask), R, generator=generator, dtype=torch.float64)
    return replace(targets, tail_coordinates=coordinates, basis=basis)


def error_by_autograd(
    teacher: States, student: States, targets: SparseTargets, temperature: float, tail: str | None
) -> float:
    """|gradient - gradient of the full distribution| / |that|, by the weight of the student's output layer."""
    weight = student.output_layer.weight.clone().requires_grad_()
    x = replace(student.output_layer, weight=weight).logits(student.hidden_ND)
    p = (teacher.output_layer.logits(teacher.hidden_ND) / temperature).softmax(-1)
    full = -(p * (x / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2
    loss = distillation_loss(x, targets, torch.zeros(N, dtype=torch.long), temperature=temperature, tail=tail).loss
    one, other = (torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, full))
    return float((one - other).norm() / other.norm())


def divergence(p: Tensor, other: Tensor) -> float:
    return float(torch.where(p > 0, p * (p.log() - other.log()), 0.0).sum(-1).mean())


@pytest.mark.parametrize("layer", [{}, {"scale": 0.5, "softcap": 5.0}], ids=str)
def test_against_autograd_and_whole_distributions(layer: dict[str, float]) -> None:
    teacher = states(0)
    students = {"near": states(1, bias=torch.linspace(-1, 1, V, dtype=torch.float64)), "far": states(2, **layer)}
    logits = teacher.output_layer.logits(teacher.hidden_ND)
    heads = [SparseTargets.from_logits(logits, k=k) for k in (3, 17)]
    heads.append(SparseTargets.from_logits(logits, support="topp", p=0.8, k=20))
    shaped = [with_shape(targets) for targets in heads]
    sampled = [SparseTargets.from_logits(logits, support=Support("threshold", tau=0.1))]
    source = Shapes(shaped[0].tail_coordinates, shaped[0].basis)  # type: ignore[arg-type]
    both = list(students)
    cases: list[tuple[Group, str | None]] = [
        (Group(source, shaped, both), "shape"),
        (Group(Uniform(teacher), heads, both), "uniform"),
        *((Group(students[name], heads, [name]), "bucket") for name in both),
        (Group(None, sampled, both), None),
    ]
    found = target_errors(teacher, students, [group for group, _ in cases], TEMPERATURES)
    for (group, tail), of_group in zip(cases, found, strict=True):
        for targets, errors in zip(group.targets, of_group, strict=True):
            assert list(errors.gradient) == group.students
            for temperature in TEMPERATURES:
                for name in group.students:
                    expected = error_by_autograd(teacher, students[name], targets, temperature, tail)
                    assert errors.gradient[name][temperature] == pytest.approx(expected, rel=1e-9), (tail, name)
                p = (logits / temperature).softmax(-1)
                if tail == "shape":
                    assert errors.kl[temperature] == pytest.approx(divergence(p, targets.dense(temperature)), rel=1e-6)
                if tail == "uniform":
                    other = uniform(targets, temperature)
                    assert errors.kl[temperature] == pytest.approx(divergence(p, other), rel=1e-9)
            assert bool(errors.kl) == (group.spread is not None)


def uniform(targets: SparseTargets, temperature: float) -> Tensor:
    log_p, log_tail = targets.at_temperature(temperature)
    whole = (log_tail.exp() / (V - targets.head_mask.sum(-1))).unsqueeze(-1).repeat(1, V + 1)
    # Unused entries go to a column of their own.
    places = torch.where(targets.head_mask, targets.token_ids, V)
    return whole.scatter(-1, places, log_p.exp())[:, :V]


def test_what_is_rounded_counts() -> None:
    """Entries and masses as they are in the targets, not as they are in the teacher."""
    teacher, student = states(0), states(1)
    logits = teacher.output_layer.logits(teacher.hidden_ND)
    rounded = SparseTargets.from_logits((logits * 16).round() / 16, k=9)
    found = target_errors(teacher, {"far": student}, [Group(Uniform(teacher), [rounded], ["far"])], TEMPERATURES)
    for temperature in TEMPERATURES:
        p = (logits / temperature).softmax(-1)
        errors = found[0][0]
        assert errors.kl[temperature] == pytest.approx(divergence(p, uniform(rounded, temperature)), rel=1e-9)
        expected = error_by_autograd(teacher, student, rounded, temperature, "uniform")
        assert errors.gradient["far"][temperature] == pytest.approx(expected, rel=1e-9)


def test_what_has_no_error() -> None:
    """All tokens in the head; and a shape with the teacher's own logits."""
    teacher, student = states(0), states(1)
    logits = teacher.output_layer.logits(teacher.hidden_ND)
    targets = [SparseTargets.from_logits(logits, k=k) for k in (4, V)]
    groups = [Group(teacher, targets, ["far"]), Group(student, targets[1:], ["far"])]
    for errors in itertools.chain(*target_errors(teacher, {"far": student}, groups, TEMPERATURES)):
        for temperature in TEMPERATURES:
            assert abs(errors.kl[temperature]) < 1e-12 and errors.gradient["far"][temperature] < 1e-12


def test_a_temperature_that_the_cache_does_not_serve_is_left_out() -> None:
    teacher, student = states(0), states(1)
    logits = teacher.output_layer.logits(teacher.hidden_ND)
    targets: Sequence[SparseTargets] = [SparseTargets.from_logits(logits, k=4, knots=knots) for knots in ((), (2.0,))]
    groups = [Group(Uniform(teacher), targets, ["far"])]
    one, two = target_errors(teacher, {"far": student}, groups, (0.5, 1.0))[0]
    assert list(one.kl) == list(one.gradient["far"]) == [1.0]
    assert list(two.kl) == list(two.gradient["far"]) == [0.5, 1.0]


def test_a_sketch_keeps_lengths() -> None:
    """Of sums over states whose widths fall as those of a language model; exact where there are few numbers."""
    generator = torch.Generator().manual_seed(0)
    width = torch.arange(1, 257).float() ** -0.5
    hidden = torch.randn(512, 256, generator=generator) * width + 2 * width
    error = torch.randn(512, 1000, generator=generator) + 0.1
    whole = float((error.T @ hidden).norm())
    assert float((error.T @ sketch(hidden)).norm()) == pytest.approx(whole, rel=0.03)
    assert sketch(hidden)[:, :64].square().sum() < hidden.square().sum()
    small = hidden[:, :90]
    assert sketch(small) is small or torch.equal(sketch(small), small)
    assert math.isfinite(float(sketch(hidden.bfloat16()).sum()))
