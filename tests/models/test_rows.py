"""Rows in every layout are their documents alone, and the probe finds the layout that a model needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cache import model_inputs, row_logits
from logit_cache.base.errors import RecipeError
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.packing import RowLayout, document_lengths, gather, make_passes
from logit_cache.models.probe import check_model
from logit_cache.models.rows import body_hidden
from logit_cache.models.states import run_rows
from logit_cache.models.taps import visible_pair_count, visible_pairs
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.tiny import small_config, small_model


@st.composite
def segmented_rows(draw: st.DrawFn) -> Tensor:
    """Segment ids [B, L] of rows of documents, with padding at the end of some."""
    length, rows = draw(st.integers(1, 40)), []
    for _ in range(draw(st.integers(1, 4))):
        cuts = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        row = torch.tensor(cuts).long().cumsum(0)
        row[length - draw(st.integers(0, length - 1)) :] = -1
        rows.append(row)
    return torch.stack(rows)


GPT2 = small_model("gpt2")


@given(segmented_rows(), st.sampled_from(["flattened", "documents", "equal documents"]), st.sampled_from([None, 4]))
def test_passes_hold_every_token_once_and_gather_puts_it_back(segments: Tensor, name: Any, switch: int | None) -> None:
    model = GPT2
    ids = torch.arange(1, segments.numel() + 1).view(segments.shape)
    passes = make_passes(model, RowLayout(name, switch), ids, segments)
    real = segments >= 0
    back = gather([one.inputs["input_ids"].unsqueeze(-1) for one in passes], passes, ids.shape)
    assert torch.equal(back[real][:, 0], ids[real])
    if name == "flattened":
        assert torch.equal(back[..., 0], ids)
        return
    assert (back[~real] == 0).all()
    starts, _ = document_lengths(segments)
    firsts = torch.cat([one.inputs["input_ids"][:, 0] for one in passes])
    assert sorted(firsts.tolist()) == sorted((starts + 1).tolist()), (
        "a row of a pass begins with a document's first token"
    )
    for one in passes:
        assert one.places_M is not None
        own = (one.places_M < ids.numel()).view(one.inputs["input_ids"].shape).sum(-1)
        if name == "equal documents":
            assert own.unique().numel() == 1
        if switch is not None and name == "documents":
            assert (own > switch).all() or (own <= switch).all(), "longrope: neighbours do not change a document"
        waste = one.inputs["input_ids"].numel() - int(own.sum())
        assert waste <= max(64, int(own.sum()) / 8)


@given(segmented_rows(), st.booleans())
def test_pairs_that_see_each_other_are_counted_without_them(segments: Tensor, causal: bool) -> None:
    assert visible_pair_count(segments, causal=causal) == visible_pairs(segments, causal=causal).sum()


LAYOUTS = {
    "llama": "packed",
    "gemma2": "packed",
    "mixtral": "packed",
    "gpt_oss": "masks",
    "opt": "masks",
    "mamba": "documents",
    "bloom": "documents",
    "llama4_text": "documents",
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_rows_are_documents_alone(family: str) -> None:
    """Of several rows with different boundaries, states and gradients are those of each document alone."""
    model = small_model(family, noise=0.2)
    assert check_model(model).layout.name == LAYOUTS[family]
    segments = torch.tensor([[0] * 9 + [1] * 11 + [2] * 4, [0] * 3 + [1] * 18 + [-1] * 3, [0] * 24])
    ids = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(0))
    states = body_hidden(model, ids, segments)
    logits, layer = row_logits(model, {"input_ids": ids, "segment_ids": segments}), OutputLayer.of(model)
    alone = []
    for row, numbers in zip(ids, segments, strict=True):
        for number in range(int(numbers.max()) + 1):
            alone.append(model(row[numbers == number].unsqueeze(0), use_cache=False).logits[0])
    expected, real = torch.cat(alone), segments >= 0
    torch.testing.assert_close(layer.logits(states[real]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[real], expected, rtol=1e-4, atol=1e-4)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    own, other = (
        torch.autograd.grad((values * pull).mean(), weights, allow_unused=True) for values in (logits[real], expected)
    )
    for a, b in zip(own, other, strict=True):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "mixtral", "qwen3"])
def test_masks_hold_what_transformers_finds_in_packed_rows(family: str) -> None:
    """A GPU gets masks where a CPU gets packed rows: windows count from where a document begins in both."""
    model = small_model(family, noise=0.2)
    segments = torch.tensor([[0] * 9 + [1] * 11 + [2] * 4, [0] * 3 + [1] * 18 + [-1] * 3, [0] * 24])
    ids = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = [run_rows(model, RowLayout(name), ids, segments) for name in ("packed", "masks")]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def test_a_loop_of_ones_own_is_told_what_the_model_needs() -> None:
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "segment_ids": torch.zeros(2, 8, dtype=torch.long)}
    model = small_model("llama")
    assert set(model_inputs(batch, model)) == {"input_ids", "position_ids", "use_cache"}
    with pytest.raises(RecipeError, match=r"mixes the documents .*: take row_logits\(model, batch\)"):
        model_inputs(batch, small_model("mamba", noise=0.2))


def test_longrope_takes_each_document_by_its_own_length() -> None:
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=8,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 8,
        },
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    probe = check_model(model)
    assert probe.layout == RowLayout("documents", 8) and "longest position of a batch" in str(probe)
    ids = torch.randint(3, 90, (2, 24))
    segments = torch.tensor([[0] * 5 + [1] * 19, [0] * 8 + [1] * 9 + [2] * 7])
    with torch.no_grad():
        states = body_hidden(model, ids, segments)
        short = body_hidden(model, ids[1:, 17:], segments[1:, 17:])
        assert torch.allclose(states[1, 17:], short[0], atol=1e-5), "whatever its neighbours are"
        long = body_hidden(model, ids[:1, 5:], segments[:1, 5:])
        assert torch.allclose(states[0, 5:], long[0], atol=1e-5)


def test_a_model_that_sees_what_it_predicts_is_refused() -> None:
    config = small_config("bert")
    config.is_decoder = False
    with pytest.raises(RecipeError, match="sees the tokens after a position"):
        check_model(AutoModelForCausalLM.from_config(config))
    with pytest.raises(RecipeError, match="has an encoder and a decoder"):
        check_model(small_model("bart", "masked"))


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Causal attention [B, A, L, d] as flash attention computes it in transformers: restarting positions are packed
    documents in a batch of one, and are not looked at in a larger one."""
    positions, length = settings["position_ids"], query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if len(positions) == 1:
        document = (positions[0] == 0).cumsum(0)
        seen &= document.unsqueeze(-1) == document
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=settings["scaling"])
    return out.transpose(1, 2).contiguous(), None


def test_flash_attention_gets_all_rows_as_one() -> None:
    """More than one row a batch: transformers recognises packing in a batch of one only."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("varlen", varlen_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("varlen", flash_attention_mask)
    model = small_model("llama", noise=0.2)
    ids = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0] * 9 + [1] * 15, [0] * 3 + [1] * 18 + [-1] * 3, [0] * 24])
    with torch.no_grad():
        expected = body_hidden(model, ids, segments)
        model.set_attn_implementation("varlen")
        probe = check_model(model)
        assert probe.layout.name == "flattened" and "packed, masks" in str(probe)
        states = body_hidden(model, ids, segments)
    real = segments >= 0
    torch.testing.assert_close(states[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_experts_are_no_coin_toss(dtype: torch.dtype, seed: int) -> None:
    """Batching of experts changes roundings: two packed documents need not be equal bit for bit."""
    model = small_model("mixtral", noise=0.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    assert check_model(model.to(dtype)).layout.name == "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "lfm2"])
def test_layouts_are_told_apart_in_half_precision(family: str, dtype: torch.dtype) -> None:
    expected = {"llama": "packed", "gpt_oss": "masks", "lfm2": "documents"}[family]
    assert check_model(small_model(family, noise=0.1).to(dtype)).layout.name == expected
