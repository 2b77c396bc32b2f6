"""Students of teacher layers, of every causal class of transformers: the teacher itself with all layers, and with fewer
its layers as they are, or a refusal in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from logit_cache.base.errors import RecipeError
from logit_cache.models.layer_check import difference
from logit_cache.models.packing import plain_inputs
from logit_cache.models.student_layers import check_layers, layer_list, student_from_layers

from tests.models.tiny import CAUSAL, small_model

NOT_BUILT = {
    "blt",  # bytes in patches
    "cohere_compass_text",
    "dbrx",
    "dots3_note",
    "gemma3n",  # needs timm; its text side is gemma3n_text
    "gemma4_assistant",  # drafts for another model
    "gemma4_unified_assistant",
    "musicgen",  # of audio tokens
    "musicgen_melody",
}
REFUSED = {
    "beam": "attn_residual_add_idx",
    "big_bird": "attention_type",  # block_sparse until it has met a short text
    "diffllama": "lambda_init",  # by the layer's number
    "dory": "n_recurrent_layers",
    "gemma4_unified": "store_full_length_kv",
    "gemma4_unified_text": "store_full_length_kv",
    "git": "attention",
    "inkling2_loop_text": "attention_input",
    "inkling2_text": "attention_input",
    "minimax": "num_hidden_layers",  # decay by number and depth
    "modernbert-decoder": "attn_norm",  # the first layer has none
    "rwkv": "pre_ln",  # the first layer only
    "zamba2": "other results",
    "zaya": "router_states_scale",
}
"""Families that layers 1 and 3 of four cannot be taken of, and what the refusal names."""
ALWAYS = {"big_bird", "dory"}
"""Those of which no layers can be."""


def random_model(family: str) -> Any:
    """Weights large enough for biases, scalings and soft-capping to matter."""
    model = small_model(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(12).mul(7).add(11).remainder(100).reshape(1, 12)
    return model.eval()(**plain_inputs(model, ids)).logits


FAMILIES = sorted(set(CAUSAL) - NOT_BUILT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_layers_is_its_teacher(family: str) -> None:
    teacher = random_model(family)
    expected = logits(teacher)
    if family in ALWAYS:
        with pytest.raises(RecipeError, match=REFUSED[family]):
            student_from_layers(teacher, [*range(4)])
        return
    student = student_from_layers(teacher, [*range(layer_list(teacher)[1])])
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-5)
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_some_layers_are_the_teachers_or_refused(family: str) -> None:
    teacher = random_model(family)
    logits(teacher)
    name, count = layer_list(teacher)
    chosen = [1, 3] if count == 4 else [count - 1]
    if family in REFUSED:
        with pytest.raises(RecipeError, match=REFUSED[family]) as caught:
            check_layers(teacher, chosen)
        assert "\n" not in str(caught.value)
        return
    student = student_from_layers(teacher, chosen)
    assert logits(student).isfinite().all()
    layers, copies = teacher.get_submodule(name), student.get_submodule(layer_list(student)[0])
    assert len(copies) == len(chosen)
    for place, number in enumerate(chosen):
        assert difference(layers[number], copies[place], number, place) is None
        own, copied = layers[number].state_dict(), copies[place].state_dict()
        assert own.keys() == copied.keys()
        assert all(torch.equal(own[key], copied[key]) for key in own)
