"""Checkpoints that lack weights or bring code are refused by name; what an architecture can do without is no fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from logit_cache.base.errors import RecipeError
from logit_cache.distill.student import build_student
from logit_cache.models.loading import auto_class, load_config, load_model, load_weights
from logit_cache.models.placement import choose_placement
from logit_cache.recipe.paths import StudentPaths
from logit_cache.recipe.student import StudentConfig
from logit_cache.stages.app import main
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GgufConfig, LlamaConfig

from tests.helpers.tiny import make_masked_teacher, make_recipe, make_teacher

CPU = choose_placement("cpu", "float32")
Weights = dict[str, torch.Tensor]


def edit(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if not any(part in name for part in parts)}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


FAULTS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a dropped weight": (without("layers.1.mlp.down_proj"), "model.layers.1.mlp.down_proj.weight"),
    "a body without its head": (without("lm_head"), "lm_head.weight"),
    "renamed keys": (renamed("self_attn.q_proj", "attention.wq"), "model.layers.0.self_attn.q_proj.weight"),
    "another prefix": (renamed("model.", "backbone.inner."), "model.embed_tokens.weight"),
    "no layer at all": (without("layers."), r"model.layers.0.\S+, .* and 15 more"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_a_checkpoint_lacks_are_named(fault: str, tmp_path: Path) -> None:
    change, named = FAULTS[fault]
    edit(make_teacher(tmp_path), change)
    with pytest.raises(RecipeError, match=f"lacks weights of a LlamaForCausalLM: .*{named}"):
        load_model(tmp_path, CPU)
    with pytest.raises(RecipeError, match=named):
        build_student(StudentConfig(model=str(tmp_path)), StudentPaths(tmp_path / "student"), 0)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    set_config(make_teacher(tmp_path), intermediate_size=48)
    with pytest.raises(RecipeError, match=r"gate_proj.weight \(of shape \[64, 32\] instead of \[48, 32\]\)"):
        load_model(tmp_path, CPU)


def test_a_masked_teacher_needs_its_head(tmp_path: Path) -> None:
    make_masked_teacher(tmp_path)
    edit(tmp_path, without("cls."))
    with pytest.raises(RecipeError, match=r"lacks weights of a BertForMaskedLM: cls.predictions.* of a masked"):
        load_model(tmp_path, CPU, objective="masked")


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_tied_heads_need_no_weight_of_their_own(objective: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    if objective == "causal":
        model = AutoModelForCausalLM.from_config(LlamaConfig(**small, intermediate_size=16, tie_word_embeddings=True))
    else:
        model = AutoModelForMaskedLM.from_config(BertConfig(**small, intermediate_size=16))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any("lm_head" in name or "decoder.weight" in name for name in stored)
    loaded = load_model(tmp_path, CPU, objective=objective)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_what_a_class_can_do_without_is_no_fault(tmp_path: Path) -> None:
    """A BERT of two tasks has a head that a masked model leaves out; position ids are no weights."""
    make_masked_teacher(tmp_path)
    extra = {"cls.seq_relationship.weight": torch.zeros(2, 24), "bert.embeddings.position_ids": torch.arange(64)}
    edit(tmp_path, lambda weights: {**weights, **extra})
    load_model(tmp_path, CPU, objective="masked")


def test_an_incomplete_teacher_caches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path)
    assert main(["prepare", str(recipe)]) == 0
    edit(tmp_path / "teacher", without("layers.1.mlp.down_proj"))
    assert main(["cache", str(recipe)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "down_proj" in lines[-1]
    assert not list((tmp_path / "run").rglob("*.zarr.zip"))


def gguf_file(folder: Path, *, without: str = "nothing") -> Path:
    """A small Llama as a GGUF file that lacks the tensors whose names contain `without`."""
    width, wide, words = 32, 64, 40
    writer = GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    block = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_down": (width, wide)}
    block |= {f"attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    block |= {f"ffn_{name}": (wide, width) for name in ("gate", "up")}
    shapes = {"token_embd": (words, width), "output_norm": (width,), "output": (words, width)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        if without not in name:
            writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


def test_weights_that_a_gguf_file_lacks_are_named(tmp_path: Path) -> None:
    plain = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    whole = load_weights(str(tmp_path), gguf_file=gguf_file(tmp_path).name, **plain)
    assert type(whole).__name__ == "LlamaForCausalLM"
    gguf_file(tmp_path, without="ffn_down")
    with pytest.raises(RecipeError, match=r"lacks weights of a LlamaForCausalLM: model.layers.0.mlp.down_proj.weight"):
        load_weights(str(tmp_path), gguf_file="tiny.gguf", **plain)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_code"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(folder: Path) -> Path:
    """A checkpoint whose classes are in a file beside it, as repositories on the hub have them."""
    make_teacher(folder)
    (folder / "modeling_own.py").write_text(CODE)
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    set_config(folder, model_type="own_code", architectures=["OwnForCausalLM"], auto_map=own)
    return folder


def test_code_of_a_repository_runs_by_a_key_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    source = str(with_own_code(tmp_path))
    for load in (load_config, load_weights):
        with pytest.raises(RecipeError, match="trust_remote_code = true"):
            load(source)
    with pytest.raises(RecipeError, match="trust_remote_code = true"):
        build_student(StudentConfig(model=source), StudentPaths(tmp_path / "student"), 0)
    model = load_model(source, CPU, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    trusted = StudentConfig(model=source, trust_remote_code=True)
    assert type(build_student(trusted, StudentPaths(tmp_path / "student"), 0)).__name__ == "OwnForCausalLM"


def test_a_student_of_own_code_goes_through_both_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path)
    with_own_code(tmp_path / "teacher")
    assert main(["prepare", str(recipe)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    for stage in ("prepare", "cache", "train", "evaluate"):
        assert main([stage, str(recipe), "--set", "teacher.trust_remote_code=true"]) == 0, capsys.readouterr().err


def test_a_model_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="no causal language model for model_type 'vit'"):
        auto_class("causal", AutoConfig.for_model("vit"))
    with pytest.raises(RecipeError, match="no masked language model for model_type 'llama'"):
        auto_class("masked", AutoConfig.for_model("llama"))
