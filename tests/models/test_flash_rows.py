"""Flattened rows by flash attention: each document alone, no mask, no wait for the device.

The kernel needs a GPU; here a loop over the documents takes its place, which is given what the kernel is given.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from logit_cache.models.flash_rows import ATTENTION, attention_of_pass, can_flash, document_attention
from logit_cache.models.packing import RowLayout, layouts_by_cost, make_passes
from logit_cache.models.probe import check_model, run_rows_alone
from logit_cache.models.states import run_passes, run_rows
from logit_cache.models.taps import Tap
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.models.tiny import small_model

SEGMENTS = torch.tensor([[0] * 9 + [1] * 11 + [2] * 4, [0] * 3 + [1] * 18 + [2] * 3, [0] * 24])
IDS = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(0))
FLASH = RowLayout("flash")


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, ends_k: Tensor, *longest: int, **how: Any
) -> Tensor:
    """What `varlen_attn` computes: [N, A, d] -> [N, A, d]."""
    assert ends.dtype == torch.int32
    assert longest == (int(ends.diff().max()),) * 2
    assert how["window_size"] == (-1, 0), "causal"
    parts = []
    for first, last in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        q, k, v = (part[first:last].transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        repeated = q.shape[1] // k.shape[1]
        assert how["enable_gqa"] == (repeated > 1)
        k, v = (part.repeat_interleave(repeated, 1) for part in (k, v))
        parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=how["scale"])[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logit_cache.models.flash_rows._varlen", lambda: one_by_one)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_each_document_as_if_it_were_alone(kernel: None, family: str) -> None:
    model = small_model(family, noise=0.2).eval().requires_grad_(False)
    states = run_rows(model, FLASH, IDS, SEGMENTS)
    torch.testing.assert_close(states, run_rows_alone(model, IDS, SEGMENTS), rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"
    padded = SEGMENTS.clone()
    padded[0, 20:] = -1
    states = run_rows(model, FLASH, IDS, padded)
    torch.testing.assert_close(states[padded >= 0], run_rows(model, RowLayout("masks"), IDS, padded)[padded >= 0])


def test_no_mask_is_made(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are what costs memory, and their making what asks the device."""
    model = small_model("llama").requires_grad_(False)
    passes = make_passes(model, FLASH, IDS, SEGMENTS)
    assert [one.inputs["input_ids"].shape for one in passes] == [(1, 72)]
    assert passes[0].inputs["cu_seq_lens_q"].tolist() == [0, 9, 20, 24, 27, 45, 48, 72]
    assert passes[0].inputs["max_length_q"] == 24
    run_passes(model, passes, IDS.shape)  # what is found out of a model once
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: pytest.fail("a wait"))
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda **_: pytest.fail("a mask"))
    run_passes(model, passes, IDS.shape)


def test_signals_come_out_of_it_too(kernel: None) -> None:
    model = small_model("llama", noise=0.2).eval().requires_grad_(False)
    names = ["hidden.1", "qk.0", "attention.2"]
    expected, given = Tap(names), Tap(names)
    with torch.no_grad():
        states = expected.hidden(model, IDS, SEGMENTS)
        own = given.hidden(model, IDS, SEGMENTS, make_passes(model, FLASH, IDS, SEGMENTS))
    torch.testing.assert_close(own, states, rtol=1e-4, atol=1e-4)
    for name in names:
        torch.testing.assert_close(given.values[name], expected.values[name], rtol=1e-4, atol=1e-4)


def test_the_models_own_attention_is_back_after_a_failure() -> None:
    model = small_model("llama")
    with pytest.raises(ZeroDivisionError), attention_of_pass(model, ATTENTION):
        assert model.config._attn_implementation == ATTENTION
        _ = 1 / 0
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"sliding_window": 8}, {"is_causal": False}, {"dropout": 0.1}])
def test_another_attention_is_refused(more: dict[str, Any]) -> None:
    part = torch.zeros(1, 2, 4, 8)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="not that of documents alone"):
        document_attention(None, part, part, part, None, cu_seq_lens_q=ends, max_length_q=4, **more)


def test_where_it_is_tried() -> None:
    """For a teacher in half precision on a GPU; the probe then compares it with each document alone."""
    gpu = torch.device("cuda")
    model = small_model("llama").to(torch.bfloat16).requires_grad_(False)
    assert can_flash(model, gpu)
    assert layouts_by_cost(model, gpu)[:3] == ("flash", "masks", "packed")
    assert layouts_by_cost(model, torch.device("cpu"))[:2] == ("packed", "masks")
    assert not can_flash(model.float(), gpu)
    assert not can_flash(small_model("gemma2").to(torch.bfloat16).requires_grad_(False), gpu), "windows"
    assert not can_flash(small_model("llama").to(torch.bfloat16), gpu), "a student"
    assert "packed" not in layouts_by_cost(small_model("bert", "masked"), gpu)


@pytest.mark.gpu
def test_the_kernel_of_torch() -> None:
    model = small_model("llama", noise=0.2).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    assert check_model(model).layout.name == "flash", check_model(model).rejected
