"""The output layer's product in blocks is the whole product."""

from __future__ import annotations

import pytest
import torch
from logit_cache.models.output_layer import project, room_for_logits


@pytest.mark.parametrize("vocab", [1, 511, 512, 513, 1500])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_are_the_whole(vocab: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    hidden, weight, bias_V = torch.randn(5, 8).to(dtype), torch.randn(vocab, 8).to(dtype), torch.randn(vocab).to(dtype)
    room = torch.full((7, vocab), torch.nan, dtype=dtype)
    found = project(hidden, weight, room[:5], bias_V if bias else None)
    assert found.data_ptr() == room.data_ptr() and room[5:].isnan().all()
    exact = hidden.double() @ weight.double().T + (bias_V.double() if bias else 0.0)
    # Eight products and a bias, each sum rounded; bfloat16 results are rounded once more.
    size = hidden.double().abs() @ weight.double().abs().T + bias_V.double().abs()
    unit = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
    limit = 10 * unit * size + (torch.finfo(torch.bfloat16).eps * exact.abs() if dtype == torch.bfloat16 else 0.0)
    assert ((found.double() - exact).abs() <= limit).all()


def test_rows_of_logits_are_aligned_on_a_gpu() -> None:
    on_cpu, elsewhere = (room_for_logits(torch.empty(0, device=device), 3, 50_257) for device in ("cpu", "meta"))
    assert on_cpu.shape == elsewhere.shape == (3, 50_257)
    assert (on_cpu.stride(), elsewhere.stride()) == ((50_257, 1), (50_304, 1))
