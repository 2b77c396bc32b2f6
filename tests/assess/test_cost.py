"""Cost: counted work against torch's own counter, time and break-even against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache.assess.cost import GPUS, ModelShape, estimate, model_shape
from logit_cache.base.errors import RecipeError
from logit_cache.store.signals import signals_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from tests.helpers.synthetic import make_cache

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_work_is_what_torch_counts(kind: Any, tied: bool) -> None:
    config = kind(**TINY, head_dim=8, tie_word_embeddings=tied)
    shape = model_shape(config)
    # eager: the fused kernel for CPUs is unknown to the counter
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    length = 48
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    # torch counts attention over the whole square, a causal model needs half of it.
    half = 4 * shape.layers * shape.attention_width * length * length / 2
    assert shape.forward_flops(length) * length + half == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_only_chosen_experts_work() -> None:
    dense = model_shape(LlamaConfig(**TINY))
    mixture = model_shape(MixtralConfig(**TINY, num_local_experts=8, num_experts_per_tok=2))
    experts = 3 * 3 * 32 * 96
    assert mixture.parameters - dense.parameters == 7 * experts + 3 * 32 * 8
    assert mixture.products - dense.products == experts + 3 * 32 * 8


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    """Llama 3.1 8B as its config.json has it, without a weight: 8.03 billion parameters, as published."""
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(tmp_path)
    shape = model_shape(AutoConfig.from_pretrained(tmp_path))
    assert shape.parameters == 8_030_261_248
    got = estimate(shape, tokens=10**9, row_length=4096, bytes_per_position=100, gpu="h100", utilisation=0.4)
    # 2 x 7.5e9 weights and 2.1e9 of attention per token at 40 % of 989 TFLOP/s, and 4 bytes for each of its logits.
    assert got.flops_per_token == pytest.approx(2 * (shape.parameters - 128256 * 4096) + 4 * 32 * 4096 * 2048, rel=1e-3)
    seconds = got.flops_per_token / (0.4 * 989e12) + 4 * 128256 / 3.35e12
    assert got.teacher_hours == pytest.approx(1e9 * seconds / 3600)
    assert 1 < got.capture_overhead < 1.01
    assert got.memory > 16e9 and got.gpus_per_copy == 1
    assert got.storage == 1e11


def test_a_large_vocabulary_weighs_on_a_small_teacher() -> None:
    """Logits of the reduction in memory and in time, by hand; torch's operations move 90 bytes where no kernel runs."""
    shape = ModelShape(10**8, 10**8, 1, 0, 1, 1, 100_000)
    other = ModelShape(10**8, 10**8, 1, 0, 1, 1, 200_000)
    options = {"tokens": 10**6, "row_length": 1000, "bytes_per_position": 50.0, "batch_rows": 2}
    assert shape.inference_memory(2000) == 2 * (10**8 + 7 * 2000) + 14 * 1024 * 100_000
    share = 4 * 100_000 / 3.35e12 * 0.4 * 989e12 / 2e8
    assert estimate(shape, **options).capture_overhead == pytest.approx(1 + share)
    assert estimate(other, **options).capture_overhead == pytest.approx(1 + 2 * share)
    share = 90 * 100_000 / 5.3e12 * 0.4 * 1307e12 / 2e8
    assert estimate(shape, **options, gpu="mi300x").capture_overhead == pytest.approx(1 + share)


def test_shares_and_break_even() -> None:
    shape = ModelShape(10**9, 10**9, 10, 1000, 1000, 4000, 1000)
    options = {"tokens": 10**8, "row_length": 100, "bytes_per_position": 50.0}
    one, many = estimate(shape, **options), estimate(shape, **options, num_gpus=4)
    assert one.teacher_hours == pytest.approx(4 * many.teacher_hours) and one.gpu_hours == pytest.approx(many.gpu_hours)
    for epochs, overhead in ((1.0, 1.1), (1.0, 1.0), (3.0, 1.1), (0.25, 1.1)):
        got = estimate(shape, **options, epochs=epochs, capture_overhead=overhead)
        # What the teacher takes beside one student, which trains as long either way.
        beside = epochs * got.teacher_hours / overhead
        assert got.teacher_hours < got.break_even * beside
        assert got.teacher_hours >= (got.break_even - 1) * beside * (1 - 1e-12)


@pytest.mark.parametrize("rank", [0, 5])
def test_files_are_those_of_a_cache(tmp_path: Path, rank: int) -> None:
    cache = make_cache(tmp_path / "cache", rows=12, length=16, shard_rows=5, tail_rank=rank)
    shape = ModelShape(1, 1, 1, 1, 1, 1, 1)
    got = estimate(shape, tokens=12 * 16, row_length=16, bytes_per_position=1, tail_rank=rank, shard_rows=5)
    written = [p for p in cache.path.rglob("*") if p.is_file() and "corpus" not in p.relative_to(cache.path).parts]
    assert got.files == len(written)


def test_every_number_can_be_printed() -> None:
    shape = model_shape(LlamaConfig(**TINY))
    for gpu in GPUS:
        got = estimate(shape, tokens=10**6, row_length=128, bytes_per_position=126.2, gpu=gpu)
        text = got.facts()
        assert GPUS[gpu].name in text["time of stage one"] and "40%" in text["time of stage one"]
        assert "students" in text["worth it from"]
    assert asdict(got)["tokens"] == 10**6


def test_what_cannot_be_is_said() -> None:
    shape = model_shape(LlamaConfig(**TINY))
    good = {"tokens": 1000, "row_length": 10, "bytes_per_position": 1.0}
    for wrong, said in (
        ({"gpu": "abacus"}, "one of b200"),
        ({"utilisation": 1.5}, "between 0 and 1"),
        ({"tokens": 0}, "must be positive"),
    ):
        with pytest.raises(RecipeError, match=said):
            estimate(shape, **{**good, **wrong})
    with pytest.raises(RecipeError, match="no causal language model"):
        model_shape(AutoConfig.for_model("vit"))


def test_bytes_of_signals_are_those_of_the_published_systems() -> None:
    """BERT-base: what the shapes give, counted by hand; steps of int8 are 2 bytes for each state or head."""

    def signal_bytes(signals: Sequence[str], config: Any, row_length: int) -> dict[str, int]:
        return {signal.name: signal.bytes_per_position for signal in signals_of(signals, config, row_length)}

    bert = AutoConfig.for_model("bert")
    assert signal_bytes(["hidden.12:float16", "hidden.6", "hidden.0:direction"], bert, 128) == {
        "hidden.12": 1536,
        "hidden.6": 770,
        "hidden.0": 768,
    }
    tiny = [f"hidden.{layer}" for layer in (0, 3, 6, 9, 12)] + [f"attention.{layer}" for layer in (2, 5, 8, 11)]
    assert sum(signal_bytes(tiny, bert, 128).values()) == 5 * 770 + 4 * (12 * 128 + 24)
    assert sum(signal_bytes(tiny, bert, 512).values()) == 5 * 770 + 4 * (12 * 512 + 24)
    for length in (128, 512):
        assert signal_bytes(["qk.5"], bert, length) == {"qk.5": 2 * 768 + 48}
    grouped = AutoConfig.for_model("llama", num_attention_heads=8, num_key_value_heads=2, hidden_size=512)
    assert signal_bytes(["qk.0:float16"], grouped, 64) == {"qk.0": 2 * (8 + 2) * 64}
    with pytest.raises(RecipeError, match=r"hidden.0 to hidden.12"):
        signal_bytes(["hidden.13"], bert, 128)
