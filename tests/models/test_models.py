"""Bodies, output layers and copied layers of the architectures that people distil, with small random weights."""

from __future__ import annotations

import pytest
import torch
from logit_cache.base.errors import RecipeError
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.packing import document_positions
from logit_cache.models.placement import choose_placement
from logit_cache.models.probe import check_model
from logit_cache.models.rows import body_hidden
from logit_cache.models.student_layers import layers_to_copy, student_from_layers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

SIZE = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
ARCHITECTURES = {
    "llama": SIZE,
    "qwen2": SIZE,
    "qwen3": {**SIZE, "head_dim": 8},
    "gemma2": {**SIZE, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 4},
    "gemma3_text": {**SIZE, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 4},
    "cohere": {**SIZE, "logit_scale": 0.25},
    "granite": {**SIZE, "logits_scaling": 4.0},
    "gpt2": {"vocab_size": 120, "n_embd": 32, "n_head": 4, "n_positions": 64},
    "phi": {**SIZE, "num_key_value_heads": 4},  # its output layer has a bias
}


def build(kind: str, layers: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    depth = {"n_layer": layers} if kind == "gpt2" else {"num_hidden_layers": layers}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind], **depth, **special)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # Large enough for soft-capping and scaling to matter, and a bias where there is one.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_body_and_head_are_the_model(kind: str) -> None:
    model = build(kind)
    check_model(model)
    ids = torch.randint(3, 120, (2, 16))
    segments = torch.tensor([[0] * 16, [0] * 6 + [1] * 10])
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=document_positions(segments), use_cache=False).logits
        head, hidden = OutputLayer.of(model), body_hidden(model, ids, segments)
        actual = head.logits(hidden)
        room = torch.full((32, expected.shape[-1]), torch.nan)
        in_room = head.logits(hidden.flatten(0, 1), out=room)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_room, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert in_room is room


@pytest.mark.parametrize("field", ["scale", "softcap"])
def test_a_head_without_its_transform_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("cohere" if field == "scale" else "gemma2")
    whole = OutputLayer.of(model)
    bare = OutputLayer(whole.weight, whole.bias, 1.0, None)
    monkeypatch.setattr(OutputLayer, "of", classmethod(lambda cls, model: bare))
    with pytest.raises(RecipeError, match="computes its logits"):
        check_model(model)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_all_layers_copied_are_the_teacher(kind: str) -> None:
    teacher = build(kind)
    student = student_from_layers(teacher, [0, 1, 2, 3]).eval()
    ids = torch.randint(3, 120, (2, 12))
    with torch.no_grad():
        assert torch.equal(student(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_chosen_layers_are_copied_in_order(kind: str) -> None:
    teacher = build(kind)
    student = student_from_layers(teacher, [3, 1])
    assert student.config.num_hidden_layers == 2
    source, copied = teacher.state_dict(), student.state_dict()
    for name, tensor in copied.items():
        origin = name
        for new, old in (("0", "3"), ("1", "1")):
            for container in (".layers.", ".h."):
                if f"{container}{new}." in name:
                    origin = name.replace(f"{container}{new}.", f"{container}{old}.")
        assert torch.equal(tensor, source[origin]), name
    with torch.no_grad():
        next(student.parameters()).add_(1.0)
    assert not torch.equal(next(student.parameters()), next(teacher.parameters())), "the weights must be copies"
    tied = teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight
    assert tied == (student.get_input_embeddings().weight is student.get_output_embeddings().weight)


def test_layer_types_follow_their_layers() -> None:
    teacher = build("gemma2")
    student = student_from_layers(teacher, [1, 2])
    assert student.config.layer_types == [teacher.config.layer_types[1], teacher.config.layer_types[2]]


def test_layers_are_spread_evenly() -> None:
    assert layers_to_copy(6, 30) == [0, 6, 12, 17, 23, 29]
    assert layers_to_copy(1, 30) == [0]
    assert layers_to_copy(4, 4) == [0, 1, 2, 3]
    for wrong in (0, 31, [], [30], [-1]):
        with pytest.raises(RecipeError):
            layers_to_copy(wrong, 30)


def test_positions_restart_at_documents() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2]])
    assert document_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]


def test_placement_gives_its_reasons() -> None:
    placement = choose_placement()
    assert placement.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "CUDA device" in str(placement) or "found" in str(placement)
    assert choose_placement("cpu", "float32").dtype == torch.float32
    with pytest.raises(RecipeError, match="write auto"):
        choose_placement("gpu9")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="no CUDA device"):
            choose_placement("cuda")


MASKED = {
    "bert": {**SIZE, "layer_norm_eps": 1e-12},
    "distilbert": {"vocab_size": 120, "dim": 32, "n_heads": 4, "hidden_dim": 48},
}


def build_masked(kind: str, layers: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    depth = {"n_layers": layers} if kind == "distilbert" else {"num_hidden_layers": layers}
    config = AutoConfig.for_model(kind, **MASKED[kind], **depth, pad_token_id=0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_one_position_changes_only_its_document_of_a_masked_row() -> None:
    model = build_masked("bert")
    segments = torch.tensor([[0] * 6 + [1] * 7 + [-1] * 3])
    ids = torch.randint(3, 120, (1, 16))
    with torch.no_grad():
        before = body_hidden(model, ids, segments)
        ids[0, 4] += 1 if ids[0, 4] < 119 else -1
        after = body_hidden(model, ids, segments)
    changed = (before != after).any(-1)[0]
    assert changed[:6].all() and not changed[6:].any(), (
        "both sides of the document, and nothing of another or of padding"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MASKED)
def test_masked_body_and_head_are_the_model(kind: str, attention: str) -> None:
    model = build_masked(kind)
    model.set_attn_implementation(attention)
    check_model(model)
    ids, segments = torch.randint(3, 120, (2, 16)), torch.tensor([[0] * 16, [0] * 6 + [1] * 10])
    with torch.no_grad():
        actual = OutputLayer.of(model).logits(body_hidden(model, ids, segments))
        alone = model(ids[1:, 6:]).logits[0]
        whole = model(ids[:1]).logits[0]
    torch.testing.assert_close(actual[1, 6:], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[0], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MASKED)
def test_layers_of_a_masked_model_are_copied(kind: str) -> None:
    teacher = build_masked(kind)
    ids = torch.randint(3, 120, (2, 12))
    with torch.no_grad():
        assert torch.equal(student_from_layers(teacher, [0, 1, 2, 3]).eval()(ids).logits, teacher(ids).logits)
    student = student_from_layers(teacher, [3, 1])
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        origin = name.replace("layer.0.", "layer.3.").replace("layer.1.", "layer.1.")
        assert torch.equal(tensor, source[origin]), name


def test_a_distilbert_of_all_layers_is_its_bert() -> None:
    teacher = build_masked("bert")
    student = student_from_layers(teacher, 4, "drop").eval()
    assert type(student).__name__ == "DistilBertForMaskedLM"
    assert not any("token_type" in name or "pooler" in name for name in student.state_dict())
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    ids = torch.randint(3, 120, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-4)
        half = student_from_layers(teacher, [0, 2], "drop").eval()(ids).logits
        torch.testing.assert_close(half, student_from_layers(teacher, [0, 2]).eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_token_types_are_dropped_of_a_bert_only() -> None:
    with pytest.raises(RecipeError, match="needs a BERT"):
        student_from_layers(build("llama"), [0], "drop")
