"""Models of text and images by their text side: loaded by the class that the configuration says, with the logits that
they have without images, and students of their text layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache.models.loading import load_weights
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.packing import plain_inputs
from logit_cache.models.rows import body_hidden
from logit_cache.models.student_layers import layer_list, student_from_layers
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from tests.models.tiny import small_config

LOADED = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "llama4": "Llama4ForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForCausalLM",
}
"""model_type -> the class that a checkpoint of the whole model is loaded with."""
STUDENTS = {
    "gemma3": "Gemma3ForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "llava": "LlamaForCausalLM",
    "mistral3": "MistralForCausalLM",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",  # transformers has no class of the text side alone
    "qwen3_5": "Qwen3_5ForCausalLM",
}


def saved(family: str, folder: Path) -> Any:
    """A tiny model with its vision tower, of random weights, saved in a folder."""
    torch.manual_seed(0)
    config = small_config(family)
    model = AutoModelForMultimodalLM._model_mapping[type(config)]._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(12).mul(7).add(11).remainder(100).reshape(1, 12)
    return model.eval()(**plain_inputs(model, ids)).logits


@pytest.mark.parametrize("family", LOADED)
def test_the_text_side_is_the_model_without_images(family: str, tmp_path: Path) -> None:
    whole = saved(family, tmp_path)
    teacher = load_weights(str(tmp_path), dtype=torch.float32).eval()
    assert type(teacher).__name__ == LOADED[family]
    # The whole Llama 4 cannot run without images in this version of transformers.
    torch.testing.assert_close(logits(teacher), logits(whole.language_model if family == "llama4" else whole))
    ids, segments = torch.randint(3, 100, (2, 16)), torch.tensor([[0] * 16, [0] * 6 + [1] * 10])
    with torch.no_grad():
        rows = OutputLayer.of(teacher).logits(body_hidden(teacher, ids, segments))
        alone = teacher(**plain_inputs(teacher, ids[1:, 6:])).logits
    torch.testing.assert_close(rows[1:, 6:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", STUDENTS)
def test_students_are_of_the_text_layers(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / "teacher")
    teacher = load_weights(str(tmp_path / "teacher"), dtype=torch.float32)
    student = student_from_layers(teacher, [*range(layer_list(teacher)[1])])
    assert type(student).__name__ == STUDENTS[family]
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    small = student_from_layers(teacher, [0, 3])
    small.save_pretrained(tmp_path / "student")
    torch.testing.assert_close(logits(load_weights(str(tmp_path / "student"))), logits(small))
    if STUDENTS[family].endswith("ForCausalLM"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
        torch.testing.assert_close(logits(plain), logits(small))
