"""The compiled slope against the same formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logit_cache.targets.basis_kernels import tail_slopes


@pytest.mark.parametrize("size", [1, 7, 2048, 2049, 5000])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("impossible", [False, True], ids=["", "impossible tokens"])
def test_slope_is_that_of_float64(size: int, spread: float, impossible: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = 6
    shape, logits = (spread * torch.randn(rows, size, generator=generator) for _ in range(2))
    if impossible:
        logits[:, ::3], shape[:, ::3] = -1e9, -1e9
        logits[:, 1::9] = -np.inf
    heads = logits.topk(min(5, size), -1).indices
    masses = torch.rand(rows, 2, generator=generator)
    expected = torch.zeros(rows, size, dtype=torch.float64)
    for column, temperature in enumerate((1.0, 2.0)):
        shares = [
            torch.softmax(x.double().scatter(-1, heads, -torch.inf) / temperature, -1).nan_to_num(0.0)
            for x in (shape, logits)
        ]
        expected += (shares[0] - shares[1]) * (masses[:, column : column + 1].double() / temperature)
    tail_slopes(shape.numpy(), logits.numpy(), heads.numpy(), masses.numpy())
    # Exponents of float32 logits up to 4 spread are off by 2^-24 of their size, sums of blocks by their length's root.
    tolerance = (8 * spread + 4) * 2.0**-23
    assert torch.isfinite(shape).all()
    assert float((shape.double() - expected).abs().max()) < tolerance
