"""The fit of a tail basis on small teachers: what it minimises, and what its coordinates mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from logit_cache import SparseTargets
from logit_cache.models.output_layer import OutputLayer
from logit_cache.targets.basis import TailBasis, TailProjection
from logit_cache.targets.basis_fit import TEMPERATURES, learn_basis
from logit_cache.targets.supports import Support
from torch import Tensor

POSITIONS, HIDDEN, VOCAB = 2**14, 24, 160
TOP8 = Support("topk", k=8)


def teacher(seed: int = 0, **layer: float) -> tuple[Tensor, OutputLayer]:
    """Hidden states of falling variance, and an output layer with a bias."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(POSITIONS, HIDDEN, generator=generator) * torch.linspace(1.5, 0.1, HIDDEN) + 0.3
    weight_VD = torch.randn(VOCAB, HIDDEN, generator=generator) * torch.rand(VOCAB, 1, generator=generator)
    return hidden_ND, OutputLayer(weight_VD, torch.randn(VOCAB, generator=generator), **layer)


def shaped(
    hidden_ND: Tensor, layer: OutputLayer, support: Support, fitted: tuple[TailBasis, TailProjection], step: float = 0.0
) -> SparseTargets:
    basis, projection = fitted
    z_NR = projection.coordinates(hidden_ND)
    if step:
        z_NR = (z_NR / step).round() * step
    targets = SparseTargets.from_logits(layer.logits(hidden_ND), support=support)
    return replace(targets, tail_coordinates=z_NR, basis=basis)


def errors(hidden_ND: Tensor, layer: OutputLayer, targets: SparseTargets, temperature: float) -> tuple[float, Tensor]:
    """KL(p_T, p^_T), mean in nats, and p_T - p^_T [N, V]."""
    p_NV = torch.softmax(layer.logits(hidden_ND).double() / temperature, -1)
    shape_NV = targets.map(lambda part: part.double() if part.is_floating_point() else part).dense(temperature)
    return float((p_NV * (p_NV.log() - shape_NV.log())).sum(-1).mean()), p_NV - shape_NV


@pytest.mark.parametrize("layer", [{}, {"scale": 0.5}, {"softcap": 4.0}, {"scale": 2.0, "softcap": 6.0}], ids=str)
@pytest.mark.parametrize("support", [TOP8, Support("topp", k=30, p=0.8), Support("threshold", tau=0.05)], ids=str)
def test_fit_beats_the_plane_it_starts_from_on_other_positions(
    layer: dict[str, float], support: Support, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_ND, output_layer = teacher(**layer)
    learn_ND, test_ND = hidden_ND[::2], hidden_ND[1::2]
    fitted = learn_basis(learn_ND, output_layer, support, 4, step=0.1)
    monkeypatch.setattr("logit_cache.targets.basis_fit._STEPS", 0)  # one step of a schedule that ends at once
    start = learn_basis(learn_ND, output_layer, support, 4, step=0.1)
    for temperature in TEMPERATURES:
        kl = [
            errors(test_ND, output_layer, shaped(test_ND, output_layer, support, basis), temperature)[0]
            for basis in (fitted, start)
        ]
        assert kl[0] < 0.95 * kl[1]


def test_bias_of_every_token_and_of_its_products_with_the_coordinates_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_ND, layer = teacher()
    fitted = learn_basis(hidden_ND, layer, TOP8, 4, step=0.1)
    monkeypatch.setattr("logit_cache.targets.basis_fit._STEPS", 0)
    start = learn_basis(hidden_ND, layer, TOP8, 4, step=0.1)
    moments = []
    for basis in (fitted, start):
        targets = shaped(hidden_ND, layer, TOP8, basis)
        wrong_NV = sum(errors(hidden_ND, layer, targets, temperature)[1] for temperature in TEMPERATURES)
        assert isinstance(wrong_NV, Tensor)
        z_NR = torch.nn.functional.pad(fitted[1].coordinates(hidden_ND).double(), (0, 1), value=1.0)
        moments.append(float((wrong_NV.T @ z_NR).norm()))
    assert moments[0] < 0.5 * moments[1]


def test_all_coordinates_give_the_teacher() -> None:
    hidden_ND, layer = teacher()
    targets = shaped(hidden_ND, layer, TOP8, learn_basis(hidden_ND, layer, TOP8, HIDDEN, step=0.01))
    for temperature in TEMPERATURES:
        assert errors(hidden_ND, layer, targets, temperature)[0] < 2e-3


def test_rounding_costs_what_the_metric_says() -> None:
    """In coordinates of unit Fisher information, errors uniform over a step s cost s^2 / 24 nats each."""
    hidden_ND, layer = teacher()
    rank, step = 6, 0.3
    fitted = learn_basis(hidden_ND, layer, TOP8, rank, step=step)
    cost = [
        errors(hidden_ND, layer, shaped(hidden_ND, layer, TOP8, fitted, step), temperature)[0]
        - errors(hidden_ND, layer, shaped(hidden_ND, layer, TOP8, fitted), temperature)[0]
        for temperature in TEMPERATURES
    ]
    expected = rank * step**2 / 24
    # The coordinate of least variance is not uniform within its step.
    assert 0.7 * expected < sum(cost) / len(cost) < 1.2 * expected


def test_coordinates_are_uncorrelated_and_in_descending_variance() -> None:
    hidden_ND, layer = teacher()
    _, projection = learn_basis(hidden_ND, layer, TOP8, 6, step=0.1)
    covariance = torch.cov(projection.coordinates(hidden_ND).double().T)
    variance = covariance.diagonal()
    assert (variance[:-1] >= variance[1:]).all()
    assert (covariance - variance.diag()).abs().max() < 1e-4 * variance[0]


def test_same_arguments_give_the_same_basis_and_leave_the_teacher_alone() -> None:
    hidden_ND, layer = teacher()
    before = layer.weight.clone(), hidden_ND.clone()
    (one, to_one), (other, to_other) = (learn_basis(hidden_ND, layer, TOP8, 3, step=0.1, seed=5) for _ in range(2))
    assert torch.equal(one.directions, other.directions)
    assert torch.equal(to_one.matrix, to_other.matrix)
    assert torch.equal(before[0], layer.weight)
    assert torch.equal(before[1], hidden_ND)


def test_one_position_and_equal_positions_give_finite_numbers() -> None:
    hidden_ND, layer = teacher()
    for some_ND in (hidden_ND[:1], hidden_ND[:1].expand(300, -1)):
        basis, projection = learn_basis(some_ND, layer, TOP8, 3, step=0.1)
        for part in (basis.offset, basis.directions, projection.matrix, projection.coordinates(hidden_ND)):
            assert torch.isfinite(part).all()


def test_tokens_that_the_teacher_never_gives() -> None:
    """Padding tokens with a logit of -inf stay impossible."""
    hidden_ND, layer = teacher()
    assert layer.bias is not None
    layer.bias[-7:] = -1e9
    targets = shaped(hidden_ND, layer, TOP8, learn_basis(hidden_ND, layer, TOP8, 4, step=0.1))
    assert float(targets.dense(2.0)[:, -7:].max()) == 0.0


@pytest.mark.parametrize(
    ("rank", "support", "message"),
    [(0, TOP8, "1 to 24"), (25, TOP8, "1 to 24"), (4, Support("sampled", draws=8), "no head")],
)
def test_what_cannot_be_learned(rank: int, support: Support, message: str) -> None:
    hidden_ND, layer = teacher()
    with pytest.raises(ValueError, match=message):
        learn_basis(hidden_ND, layer, support, rank, step=0.1)
