"""Students of teacher layers, of every causal class of transformers: the teacher itself with all layers, and with fewer
its layers as they are, or a refusal in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache.base.errors import RecipeError
from logit_cache.models.layer_check import difference
from logit_cache.models.packing import plain_inputs
from logit_cache.models.student_layers import check_layers, layer_list, student_from_layers
from logit_cache.stages.app import main
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.tiny import WORDS, make_recipe
from tests.models.tiny import CAUSAL, MASKED, small_model

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


MASKED_REFUSED = {
    "albert": "no module list",  # one layer, again and again
    "big_bird": "attention_type",
    "esmc": "scaling_factor",  # by the depth
    "modernbert": "attn_norm",
    "modernvbert": "attn_norm",
    "perceiver": "no module list",
}
MASKED_ALWAYS = {"albert", "big_bird", "perceiver"}


def random_model(family: str, objective: str) -> Any:
    """Weights large enough for biases, scalings and soft-capping to matter."""
    model = small_model(family, objective)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(12).mul(7).add(11).remainder(100).reshape(1, 12)
    return model.eval()(**plain_inputs(model, ids)).logits


FAMILIES = [
    *(("causal", family) for family in sorted(set(CAUSAL) - NOT_BUILT)),
    *(("masked", family) for family in sorted(MASKED)),
]


@pytest.mark.parametrize(("objective", "family"), FAMILIES)
def test_a_student_of_all_layers_is_its_teacher(objective: str, family: str) -> None:
    teacher = random_model(family, objective)
    expected = logits(teacher)
    if family in (ALWAYS if objective == "causal" else MASKED_ALWAYS):
        with pytest.raises(RecipeError, match=(REFUSED | MASKED_REFUSED)[family]):
            student_from_layers(teacher, [*range(4)])
        return
    student = student_from_layers(teacher, [*range(layer_list(teacher)[1])])
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-5)
    own, copied = ({p.data_ptr() for p in model.parameters() if p.numel()} for model in (teacher, student))
    assert not own & copied, "the weights must be copies"


@pytest.mark.parametrize(("objective", "family"), FAMILIES)
def test_some_layers_are_the_teachers_or_refused(objective: str, family: str) -> None:
    teacher = random_model(family, objective)
    logits(teacher)
    refused = REFUSED if objective == "causal" else MASKED_REFUSED
    if family in refused:
        with pytest.raises(RecipeError, match=refused[family]) as caught:
            check_layers(teacher, [1, 3])
        assert "\n" not in str(caught.value)
        return
    name, count = layer_list(teacher)
    chosen = [1, 3] if count == 4 else [count - 1]
    student = student_from_layers(teacher, chosen)
    assert logits(student).isfinite().all()
    layers, copies = teacher.get_submodule(name), student.get_submodule(layer_list(student)[0])
    assert len(copies) == len(chosen)
    for place, number in enumerate(chosen):
        assert difference(layers[number], copies[place], number, place) is None
        own, copied = layers[number].state_dict(), copies[place].state_dict()
        assert own.keys() == copied.keys()
        assert all(torch.equal(own[key], copied[key]) for key in own)


def test_layers_that_cannot_be_copied_are_refused_before_the_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(make_recipe(tmp_path, train__layers=[1]))
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = AutoConfig.for_model("diffllama", **sizes, num_hidden_layers=2, num_key_value_heads=2, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    assert main(["prepare", recipe]) == 0
    capsys.readouterr()
    assert main(["cache", recipe]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "students.student: layers [1]" in errors[0] and "lambda_init" in errors[0]
    assert not list((tmp_path / "run").rglob("*.zarr.zip"))


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_read_keys_of_others_need_those(family: str) -> None:
    """The last two of four layers read the keys of layers 0 and 1, of their own kind of attention."""
    teacher = random_model(family, "causal")
    # The last layer of a Gemma 4 always sees the whole text.
    for chosen in ([0, 1], [0, 1, 3], *([[0, 1, 2]] if family == "gemma3n_text" else [])):
        student = student_from_layers(teacher, chosen)
        assert student.config.num_kv_shared_layers == len(chosen) - 2
        assert logits(student).isfinite().all()
        width = teacher.config.hidden_size_per_layer_input
        name = "model.embed_tokens_per_layer.weight"
        table, copied = teacher.state_dict()[name], student.state_dict()[name]
        assert torch.equal(copied.unflatten(-1, (-1, width)), table.unflatten(-1, (-1, width))[:, chosen])
    for chosen in ([0, 2, 3], [1, 2]):
        with pytest.raises(RecipeError, match=rf"layers \[{chosen[0]}, "):
            check_layers(teacher, chosen)
