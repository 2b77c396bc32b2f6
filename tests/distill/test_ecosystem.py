"""A cache in other people's trainers: DataLoader, Accelerate, transformers, TRL, peft, torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from logit_cache import (
    DistillationTrainer,
    LogitCache,
    Mixture,
    RowStream,
    ShorterRows,
    collate,
    distillation_loss,
    model_inputs,
)
from logit_cache.base.errors import MismatchError, RecipeError
from logit_cache.distill.stage_two import train_student
from logit_cache.distill.student import build_student
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.rows import body_hidden
from logit_cache.recipe.paths import StudentPaths
from logit_cache.recipe.student import StudentConfig
from logit_cache.store.order import rows_at
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tests.helpers.synthetic import VOCAB, make_cache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("ecosystem") / "cache", vocab_size=VOCAB + 6)


SHAPE = {
    "vocab_size": VOCAB + 6,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def student(vocab_size: int = VOCAB + 6, layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": vocab_size, "num_hidden_layers": layers}))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 3,
    }
    return TrainingArguments(**{**options, **settings})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def loss_of(logits: torch.Tensor, batch: Any, count: Any = None) -> torch.Tensor:
    return distillation_loss(
        logits,
        batch["targets"],
        batch["labels"],
        temperature=2.0,
        ce_weight=0.1,
        kd_positions=count,
        ce_positions=count,
    ).loss


def by_hand(cache: LogitCache, steps: int, order: np.ndarray | None = None) -> LlamaForCausalLM:
    """Plain gradient steps on four rows each, in this order or as they stand."""
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        rows = np.arange(4 * step, 4 * step + 4)
        batch = cache.batch(rows if order is None else order[rows])
        loss_of(model(**model_inputs(batch, model)).logits, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_cache_is_a_torch_dataset(cache: LogitCache) -> None:
    assert isinstance(cache, Dataset)
    whole = next(iter(DataLoader(cache, batch_size=12, collate_fn=collate)))
    stream = next(iter(DataLoader(RowStream(cache, shuffle=False), batch_size=12, collate_fn=collate)))
    for batch in (whole, stream):
        assert torch.equal(batch["input_ids"], cache.batch(np.arange(12))["input_ids"])
    assert len(list(cache)) == 12, "the old sequence protocol ends where the rows do"


def test_accelerate_does_what_the_plain_loop_does(cache: LogitCache) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a Trainer of an earlier test in this process leaves its precision there
    accelerator = Accelerator(cpu=True)
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(cache, batch_size=4, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        accelerator.backward(loss_of(model(**model_inputs(batch, model)).logits, batch))
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(weights(accelerator.unwrap_model(model)), weights(by_hand(cache, 3))) < 1e-6


def test_our_trainer_does_what_the_plain_loop_does(cache: LogitCache, tmp_path: Path) -> None:
    model = student()
    args = arguments(tmp_path)
    DistillationTrainer(model, args, cache, temperature=2.0, ce_weight=0.1).train()
    expected = weights(by_hand(cache, 3, rows_at(np.arange(len(cache)), len(cache), args.seed)))
    assert largest_difference(weights(model), expected) < 1e-5
    assert largest_difference(weights(student()), expected) > 1e-2, "nothing was learned"


def test_trls_trainer_does_what_the_plain_loop_does(cache: LogitCache, tmp_path: Path) -> None:
    """SFTTrainer takes nothing but a `datasets.Dataset`: give it row numbers, and let the collator fetch the rows.

    Our labels are what transformers calls shift_labels. Without that name Trainer would not count the first position of
    every row among those that the loss is averaged over.
    """
    trl = pytest.importorskip("trl")

    class Distiller(trl.SFTTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**model_inputs(inputs, model))
            loss = loss_of(outputs.logits, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    settings = arguments(tmp_path).to_dict()
    wanted = {
        key: settings[key] for key in ("max_steps", "learning_rate", "optim", "max_grad_norm", "output_dir", "seed")
    }
    args = trl.SFTConfig(
        **wanted,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    model = student()

    def fetch(part: list[dict[str, int]]) -> dict[str, Any]:
        batch = cache.batch([item["row"] for item in part])
        return {**batch, "shift_labels": batch["labels"]}

    Distiller(
        model,
        args,
        train_dataset=datasets.Dataset.from_dict({"row": range(len(cache))}),
        data_collator=fetch,
        processing_class=AutoTokenizer.from_pretrained(cache.tokenizer_dir),
    ).train()
    assert largest_difference(weights(model), weights(by_hand(cache, 3))) < 1e-5


def test_dropped_columns_are_explained(cache: LogitCache, tmp_path: Path) -> None:
    trainer = Trainer(student(), arguments(tmp_path), train_dataset=cache, data_collator=collate)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


def test_lora_students_train_their_adapters_only(cache: LogitCache, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = student(layers=2)
    before = weights(base)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    batch = cache.batch([0, 1])
    with torch.no_grad():
        hidden = body_hidden(model, batch["input_ids"], batch["segment_ids"])
        assert torch.equal(OutputLayer.of(model).logits(hidden), model(**model_inputs(batch, model)).logits)
    DistillationTrainer(model, arguments(tmp_path, learning_rate=1.0), cache, temperature=2.0).train()
    after = weights(base)
    changed = {name for name in after if "lora" in name and float(after[name].abs().max()) > 0}
    assert any("lora_B" in name for name in changed), "no adapter has learned anything"
    for name, tensor in before.items():
        kept = next(value for key, value in after.items() if key.replace("base_layer.", "") == name)
        assert torch.equal(kept, tensor), name


def test_a_lora_student_of_a_recipe(cache: LogitCache, tmp_path: Path) -> None:
    """Trained by the stage, adapters folded into a plain model that evaluation can load."""
    pytest.importorskip("peft")
    settings: dict[str, Any] = {
        "architecture": {"model_type": "llama", **SHAPE},
        "steps": 2,
        "warmup_steps": 0,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "dtype": "float32",
    }
    config = StudentConfig(**settings, lora={"r": 4, "target_modules": ["q_proj"]})
    train_student(config, "adapted", cache, tmp_path / "adapted", seed=0)
    final = load_file(tmp_path / "adapted/final/model.safetensors")
    start = weights(build_student(config, StudentPaths(tmp_path), seed=0))
    assert final.keys() == start.keys()
    changed = {name for name in start if not torch.equal(start[name], final[name])}
    assert changed and all("q_proj" in name for name in changed)
    with pytest.raises(RecipeError, match=r"students\.bad\.lora: .*rank"):
        train_student(StudentConfig(**settings, lora={"rank": 4}), "bad", cache, tmp_path / "bad", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_student_learns_the_same(cache: LogitCache, tmp_path: Path, backend: str) -> None:
    models = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        torch._dynamo.reset()
        model = student()
        DistillationTrainer(model, arguments(tmp_path, **settings), cache, temperature=2.0).train()
        models.append(weights(model))
    assert largest_difference(*models) < 1e-6


@pytest.mark.slow
def test_a_compiled_model_in_a_plain_loop(cache: LogitCache) -> None:
    torch._dynamo.reset()
    model = student()
    batch = cache.batch([0, 1])
    compiled = torch.compile(model, backend="aot_eager")
    losses = [loss_of(m(**model_inputs(batch, m)).logits, batch) for m in (model, compiled)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


@pytest.mark.parametrize("vocab_size", [VOCAB, VOCAB + 3, VOCAB + 20])
def test_padded_vocabularies_of_any_size(cache: LogitCache, tmp_path: Path, vocab_size: int) -> None:
    """The teacher has 56 logits, the tokenizer 50 ids: a student may have any number from 50 up."""
    model = student(vocab_size)
    before = weights(model)
    DistillationTrainer(model, arguments(tmp_path, max_steps=1), cache).train()
    assert largest_difference(before, weights(model)) > 1e-4
    assert all(torch.isfinite(tensor).all() for tensor in weights(model).values())


def test_a_student_that_lacks_tokens_is_refused(cache: LogitCache, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="49 logits"):
        DistillationTrainer(student(VOCAB - 1), arguments(tmp_path), cache)


def test_views_go_where_a_cache_goes(cache: LogitCache, tmp_path: Path) -> None:
    view = Mixture([ShorterRows(cache, 8), ShorterRows(make_cache(tmp_path / "other", seed=9), 8)], [1, 2], seed=1)
    model = student()
    before = weights(model)
    DistillationTrainer(model, arguments(tmp_path), view, temperature=2.0).train()
    assert largest_difference(before, weights(model)) > 1e-3
