"""How many rows go through a teacher at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from logit_cache.models.batch_rows import CPU_ROWS, GPU_TOKENS, fitting_rows, rows_per_pass
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.placement import Placement
from logit_cache.models.teacher import Teacher
from transformers import LlamaConfig, LlamaForCausalLM

GIB = 2**30


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """The shape of a 1B model, without memory for its weights."""
    config = LlamaConfig(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=1)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layer = OutputLayer(model.lm_head.weight)
    return Teacher(model, layer, Placement(torch.device("cuda", 0), torch.bfloat16, "sdpa", ""), {}, "")


def test_a_large_gpu_gets_its_tokens_and_a_small_one_what_fits(teacher: Teacher) -> None:
    assert fitting_rows(teacher, 1024, 78 * GIB) == GPU_TOKENS // 1024
    assert fitting_rows(teacher, 4096, 78 * GIB) == GPU_TOKENS // 4096
    assert fitting_rows(teacher, 2 * GPU_TOKENS, 78 * GIB) == 1
    some = fitting_rows(teacher, 1024, 8 * GIB)
    assert 1 <= some < GPU_TOKENS // 1024
    # What a pass holds: 8 D + 3 I numbers of two bytes a token, a mask of 3 bytes a pair, 16 bytes a logit.
    assert some * 1024 * (2 * (8 * 2048 + 3 * 8192) + 3 * 1024) + 16 * 1024 * 128_256 <= 4 * GIB
    assert fitting_rows(teacher, 1024, 0) == 1


def test_the_recipe_decides_where_it_says_a_number(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (78 * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 0)
    assert rows_per_pass(5, teacher, 1024) == 5
    assert rows_per_pass("auto", teacher, 1024) == 32
    on_cpu = replace(teacher, placement=replace(teacher.placement, device=torch.device("cpu")))
    assert rows_per_pass("auto", on_cpu, 1024) == CPU_ROWS
