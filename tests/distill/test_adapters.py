"""Adapters on the output layer: the fused loss trains them as the model's own forward pass does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache import DistillationTrainer, LogitCache, distillation_loss, model_inputs
from logit_cache.base.errors import RecipeError
from logit_cache.distill.fused import fused_loss
from logit_cache.distill.loss_settings import LossSettings
from logit_cache.distill.stage_two import train_student
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.rows import body_hidden
from logit_cache.recipe.student import StudentConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.distill.test_ecosystem import SHAPE, arguments, student
from tests.distill.test_training_settings import BASE
from tests.helpers.synthetic import make_cache

peft = pytest.importorskip("peft")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["lm_head"]},
    "lora and bias": {"target_modules": ["lm_head", "q_proj"], "lora_bias": True},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "rslora": {"target_modules": ["lm_head"], "use_rslora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("adapters") / "cache", vocab_size=SHAPE["vocab_size"], tail_rank=2)


def adapted(settings: dict[str, Any], tied: bool = False) -> Any:
    """A student with adapters of random weights, in float64."""
    torch.manual_seed(1)
    plain = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).double()
    model = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", r=3, **settings))
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double() + 0.1 * torch.randn(parameter.shape, generator=g).double()
    return model


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


TIED: dict[str, dict[str, Any]] = {
    "lora, tied": {"target_modules": ["lm_head"]},
    "both, tied": {"target_modules": ["lm_head", "embed_tokens"]},
    "tokens, tied": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 7]},
    "saved, tied": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", [*KINDS, *TIED])
@pytest.mark.parametrize("tail", ["shape", "bucket"])
def test_adapters_on_the_output_layer_get_their_gradient(cache: LogitCache, kind: str, tail: str) -> None:
    model = adapted(KINDS[kind]) if kind in KINDS else adapted(TIED[kind], tied=True)
    batch = cache.batch([0, 3, 5])
    settings = LossSettings(2.0, 0.7, 0.3, tail)
    logits = model(**model_inputs(batch, model)).logits
    options = {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3, "tail": tail}
    reference = distillation_loss(logits, batch["targets"], batch["labels"], **options)
    expected = gradients(model, reference.loss)
    layers = ("lm_head", "embed_tokens")  # where peft shares adapters, the first of the two has them
    assert any(any(layer in name for layer in layers) and float(g.abs().max()) > 1e-4 for name, g in expected.items())
    hidden = body_hidden(model, batch["input_ids"], batch["segment_ids"])
    parts = hidden, OutputLayer.of(model), batch["targets"], batch["labels"], settings
    found = fused_loss(*parts, chunk_size=7)
    assert float(found.loss) == pytest.approx(float(reference.loss), abs=1e-9)
    actual = gradients(model, found.loss)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys() == trained
    for name, gradient in expected.items():
        # The norms of a Llama compute in float32: some roundings of the largest value.
        tolerance = 16 * torch.finfo(torch.float32).eps * gradient.abs().max()
        assert (actual[name] - gradient).abs().max() <= tolerance, name


def test_without_a_gradient_the_adapters_count_too(cache: LogitCache) -> None:
    model = adapted(KINDS["lora"])
    batch = cache.batch([0, 3, 5])
    with torch.no_grad():
        hidden = body_hidden(model, batch["input_ids"], batch["segment_ids"])
        found = fused_loss(hidden, OutputLayer.of(model), None, batch["labels"], LossSettings(1.0, 0.0, 1.0))
        logits = model(**model_inputs(batch, model)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert float(found.ce) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_under_mixed_precision(cache: LogitCache, dtype: torch.dtype) -> None:
    """Within the roundings of half precision, of a gradient that float32 computes."""
    model = adapted(KINDS["lora and bias"]).float()
    batch = cache.batch([0, 3, 5])
    labels, found = batch["labels"], []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            hidden = body_hidden(model, batch["input_ids"], batch["segment_ids"])
            loss = fused_loss(hidden, OutputLayer.of(model), batch["targets"], labels, LossSettings(), chunk_size=7)
        found.append(gradients(model, loss.loss))
    for name, gradient in found[0].items():
        assert float((gradient - found[1][name]).norm() / gradient.norm()) < 32 * torch.finfo(dtype).eps, name


def test_the_trainer_trains_adapters_on_the_output_layer(cache: LogitCache, tmp_path: Path) -> None:
    model = adapted({**KINDS["lora"], "lora_dropout": 0.5}).float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    DistillationTrainer(model, arguments(tmp_path), cache).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
def test_a_recipes_student_keeps_what_its_output_layer_has_learned(
    cache: LogitCache, tmp_path: Path, kind: str
) -> None:
    config = StudentConfig(**BASE, lora={"r": 3, **KINDS[kind]}, learning_rate=1e-2)
    train_student(config, "s", cache, tmp_path / "s", seed=0)
    final = load_file(tmp_path / "s/final/model.safetensors")
    torch.manual_seed(0)
    start = LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict()
    assert final.keys() == start.keys()
    assert not torch.equal(final["lm_head.weight"], start["lm_head.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "s/final")
    assert torch.equal(loaded.lm_head.weight, final["lm_head.weight"])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
    ],
)
def test_adapters_on_one_of_two_tied_layers_are_refused(
    cache: LogitCache, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Merged into the weights that both layers share, they would change the other layer too."""
    tied = {**BASE, "architecture": {"model_type": "llama", **SHAPE, "tie_word_embeddings": True}}
    config = StudentConfig(**tied, lora=settings)
    with pytest.raises(RecipeError, match=r"students\.s\.lora: .*(lm_head|embed_tokens).* shares? "):
        train_student(config, "s", cache, tmp_path / "s", seed=0)


def test_adapters_that_cannot_be_merged_are_refused_before_the_training(cache: LogitCache, tmp_path: Path) -> None:
    config = StudentConfig(**BASE, lora={"target_modules": ["q_proj"], "lora_bias": True})
    with pytest.raises(RecipeError, match=r"students\.s\.lora: .*merge"):
        train_student(config, "s", cache, tmp_path / "s", seed=0)
    assert not (tmp_path / "s").exists()


def test_prompts_are_refused(cache: LogitCache, tmp_path: Path) -> None:
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        DistillationTrainer(peft.get_peft_model(student(), settings), arguments(tmp_path), cache)
