"""Adapters as teachers: merged with their base, whose distribution is that of the adapted model, or refused by name."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache.base.errors import RecipeError
from logit_cache.models.loading import load_model, load_weights
from logit_cache.models.placement import choose_placement
from logit_cache.models.teacher import load_teacher
from logit_cache.models.teacher_source import resolve_teacher, teacher_files
from logit_cache.recipe.loading import load_recipe
from logit_cache.recipe.schema import Recipe
from logit_cache.stages.app import main
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import make_recipe

CPU = choose_placement("cpu", "float32")
IDS = torch.arange(12).reshape(1, 12)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def adapter_of(base: Path, folder: Path, seed: int = 1) -> torch.Tensor:
    """A LoRA of random weights; the logits of the adapted model."""
    torch.manual_seed(seed)
    adapted = get_peft_model(load_model(base, CPU), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return logits(adapted)


def recipe_of(folder: Path) -> tuple[Recipe, torch.Tensor]:
    """A run whose teacher is an adapter of the tiny teacher."""
    file = make_recipe(folder)
    expected = adapter_of(folder / "teacher", folder / "adapter")
    return load_recipe(file, [f"teacher.model={folder / 'adapter'}"]), expected


def test_an_adapter_is_merged_with_its_base(tmp_path: Path) -> None:
    recipe, expected = recipe_of(tmp_path)
    source = resolve_teacher(recipe)
    assert not (Path(source) / "adapter_config.json").exists()
    merged = load_model(source, CPU)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (logits(merged) - logits(load_model(tmp_path / "teacher", CPU))).abs().max() > 0.1
    stamp = (Path(source) / "model.safetensors").stat().st_mtime_ns
    assert resolve_teacher(recipe) == source
    assert (Path(source) / "model.safetensors").stat().st_mtime_ns == stamp, "merged again"


def test_identity_covers_base_and_adapter(tmp_path: Path) -> None:
    recipe, _ = recipe_of(tmp_path)
    identities, files = [], []

    def note() -> None:
        identities.append(load_teacher(resolve_teacher(recipe), recipe.teacher).identity["weights"])
        files.append(teacher_files(recipe))

    note()
    adapter_of(tmp_path / "teacher", tmp_path / "adapter", seed=2)
    note()
    weights = load_file(tmp_path / "teacher/model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "teacher/model.safetensors", {"format": "pt"})
    note()
    assert len(set(identities)) == 3
    assert all(a != b for a, b in pairwise(files))


def test_a_run_with_an_adapter_as_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_of(tmp_path)
    teacher = ["--set", f"teacher.model={tmp_path / 'adapter'}"]
    for stage in ("prepare", "cache", "train"):
        assert main([stage, str(tmp_path / "recipe.toml"), *teacher]) == 0, capsys.readouterr().err


def test_what_cannot_be_merged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = recipe_of(tmp_path)
    adapter = tmp_path / "adapter"
    with pytest.raises(RecipeError, match="is an adapter of another model: merge it first"):
        load_weights(str(adapter))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    fewer = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(fewer, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"does not fit its base .*down_proj"):
        resolve_teacher(recipe)
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(RecipeError, match="names no base_model_name_or_path"):
        resolve_teacher(recipe)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r"is an adapter of .* needs peft: pip install"):
        resolve_teacher(recipe)


def test_prompts_are_no_weights(tmp_path: Path) -> None:
    recipe, _ = recipe_of(tmp_path)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned: PeftModel = get_peft_model(load_model(tmp_path / "teacher", CPU), settings)
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "teacher")
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RecipeError, match="adapter of type PROMPT_TUNING, which cannot be merged"):
        resolve_teacher(recipe)
