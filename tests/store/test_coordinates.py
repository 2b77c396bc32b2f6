"""The stored form of tail coordinates."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache import SparseTargets
from logit_cache.models.output_layer import OutputLayer
from logit_cache.store.coordinates import NAME, CoordinateCodec
from logit_cache.targets.basis_fit import learn_basis
from logit_cache.targets.supports import Support

ROWS, LENGTH, HIDDEN, VOCAB, RANK = 3, 50, 12, 90, 5
TOPP = Support("topp", k=12, p=0.7)


@cache
def shaped(support: Support = TOPP) -> SparseTargets:
    """Targets [3, 50] of varying heads; every seventh position has none."""
    generator = torch.Generator().manual_seed(0)
    layer = OutputLayer(torch.randn(VOCAB, HIDDEN, generator=generator))
    hidden_ND = torch.randn(1000, HIDDEN, generator=generator) * torch.linspace(2, 0.1, HIDDEN)
    basis, projection = learn_basis(hidden_ND, layer, support, RANK, step=0.1)
    hidden_ND = hidden_ND[: ROWS * LENGTH]
    mask_N = torch.arange(ROWS * LENGTH) % 7 > 0
    targets = SparseTargets.from_logits(layer.logits(hidden_ND), support=support, mask=mask_N)
    z_NR = torch.where(mask_N.unsqueeze(-1), projection.coordinates(hidden_ND), 0.0)
    return replace(targets, tail_coordinates=z_NR, basis=basis).unflatten((ROWS, LENGTH))


def decoded(codec: CoordinateCodec, targets: SparseTargets) -> np.ndarray:
    steps = codec.encode(targets)[NAME].astype(codec.layout()[NAME])
    assert steps.shape == (ROWS, *codec.shapes(LENGTH)[NAME])  # type: ignore[misc]
    flat = targets.flatten()
    heads = flat.head_mask.sum(-1).numpy()
    return codec.decode(steps, flat.token_ids.numpy(), heads, flat.mask.numpy()).reshape(ROWS, LENGTH, RANK)


@pytest.mark.parametrize("predicted", [True, False])
@pytest.mark.parametrize("support", [TOPP, Support("topk", k=8), Support("threshold", tau=0.04)], ids=str)
@settings(deadline=None)  # the first example compiles
@given(step=st.sampled_from([0.01, 0.15, 0.5, 3.0]))
def test_error_is_half_a_step_and_nothing_where_there_is_no_target(
    support: Support, predicted: bool, step: float
) -> None:
    targets = shaped(support)
    z = decoded(CoordinateCodec(RANK, step, predicted, targets.basis), targets)
    assert targets.tail_coordinates is not None
    # Half a step, and the rounding of float32 sums of RANK + 2 terms of this size.
    assert np.abs(z - targets.tail_coordinates.numpy()).max() <= step / 2 + (RANK + 2) * 2.0**-23 * (
        8 + np.abs(z).max()
    )
    assert not z[~targets.mask.numpy()].any()


def test_stored_numbers_are_those_of_the_formula() -> None:
    targets, step = shaped(), 0.2
    codec = CoordinateCodec(RANK, step, True, targets.basis)
    steps = codec.encode(targets)[NAME]
    basis, z = targets.basis, targets.tail_coordinates
    assert basis is not None and z is not None and basis.prediction is not None
    for row, position in [(0, 1), (1, 8), (2, 49)]:
        head = targets.token_ids[row, position][targets.head_mask[row, position]]
        mean = basis.directions[head].double().mean(0)
        predicted = basis.prediction[0].double() + mean @ basis.prediction[1:].double()
        expected = ((z[row, position].double() - predicted) / step).round().numpy()
        assert (steps[row, position] == expected).all()


def test_predictions_make_the_numbers_smaller() -> None:
    targets = shaped()
    sizes = [np.abs(CoordinateCodec(RANK, 0.02, p, targets.basis).encode(targets)[NAME]).mean() for p in (True, False)]
    assert sizes[0] < 0.8 * sizes[1]


def test_numbers_beyond_16_bits_are_cut() -> None:
    targets = shaped()
    codec = CoordinateCodec(RANK, 1e-6, False, targets.basis)
    assert np.abs(codec.encode(targets)[NAME]).max() == 32767


def test_json() -> None:
    basis = shaped().basis
    assert basis is not None
    codec = CoordinateCodec(RANK, 0.15, True, replace(basis, digest="ab"))
    assert codec.to_json() == {"rank": RANK, "step": 0.15, "predicted": True, "basis": "ab"}
    assert CoordinateCodec.from_json(codec.to_json(), codec.basis).to_json() == codec.to_json()
    for wrong in ({"rank": 0}, {"rank": RANK + 1}, {"step": 0.0}, {"step": float("nan")}, {"step": float("inf")}):
        with pytest.raises(ValueError, match="do not fit"):
            CoordinateCodec.from_json(codec.to_json() | wrong, codec.basis)


def test_targets_without_coordinates_are_refused() -> None:
    targets = shaped()
    with pytest.raises(ValueError, match="coordinates"):
        CoordinateCodec(RANK, 0.1, True, targets.basis).encode(replace(targets, tail_coordinates=None))
