"""Every argument of transformers' Trainer is followed, or refused by its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from logit_cache import DistillationTrainer, LogitCache, distillation_loss, model_inputs
from logit_cache.distill.fused import default_chunk_size
from logit_cache.distill.refused_arguments import REFUSED, REFUSED_CALLABLES, check_arguments
from logit_cache.lab.bench_step import StepLosses
from logit_cache.models.taps import Tap
from logit_cache.recipe.student import StudentConfig
from logit_cache.store.order import rows_at
from logit_cache.store.samplers import EvaluationBatches
from logit_cache.store.views import Subset
from transformers import TrainerCallback, TrainingArguments

from tests.distill.test_ecosystem import SHAPE, arguments, largest_difference, student, weights
from tests.helpers.synthetic import make_cache

ROWS, LENGTH = 12, 16
FOLLOWED = """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    auto_find_batch_size average_tokens_across_devices bf16 bf16_full_eval data_seed dataloader_in_order
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict do_train enable_jit_checkpoint
    eval_accumulation_steps eval_delay eval_on_start eval_steps eval_strategy fp16 fp16_full_eval fsdp fsdp_config
    full_determinism gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs greater_is_better
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
    include_num_input_tokens_seen learning_rate load_best_model_at_end local_rank log_level log_level_replica
    log_on_each_node logging_first_step logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs
    lr_scheduler_type max_grad_norm max_steps metric_for_best_model neftune_noise_alpha num_train_epochs optim optim_args
    optim_target_modules output_dir per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project
    push_to_hub remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name
    save_on_each_node save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics tf32
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id train_sampling_strategy use_cpu warmup_steps weight_decay
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Rows with very different numbers of learned positions."""
    mask = (np.arange(LENGTH) < np.linspace(1, LENGTH, ROWS)[:, None]).astype(np.int32)
    folder = tmp_path_factory.mktemp("arguments") / "cache"
    return make_cache(folder, rows=ROWS, length=LENGTH, vocab_size=SHAPE["vocab_size"], loss_mask=mask)


def trained(cache: LogitCache, folder: Path, model: Any = None, **settings: Any) -> dict[str, torch.Tensor]:
    model = student() if model is None else model
    DistillationTrainer(model, arguments(folder, **settings), cache, temperature=2.0).train()
    return weights(model)


def test_every_argument_of_the_installed_transformers_is_known() -> None:
    """A new one must be looked at: does the trainer follow it?"""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    followed = set(FOLLOWED.split())
    assert followed | set(REFUSED) == names
    assert not followed & set(REFUSED)


OTHER: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "dataloader_drop_last": True,
    "label_names": ["labels"],
    "length_column_name": "size",
    "parallelism_config": object(),
    "deepspeed": "config.json",
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "train_sampling_strategy": "group_by_length",
    "accelerator_config": {"split_batches": True},
}


@pytest.mark.parametrize("name", [*REFUSED, "train_sampling_strategy", "accelerator_config"])
def test_an_argument_that_would_be_ignored_is_refused_by_name(cache: LogitCache, tmp_path: Path, name: str) -> None:
    args = arguments(tmp_path, **({} if name == "deepspeed" else {name: OTHER[name]}))
    setattr(args, name, OTHER[name] if name == "deepspeed" else getattr(args, name))
    with pytest.raises(ValueError, match=f"TrainingArguments.{name}.* cannot be used: ") as caught:
        DistillationTrainer(student(), args, cache)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", REFUSED_CALLABLES)
def test_functions_of_whole_logits_are_refused(cache: LogitCache, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be used: "):
        DistillationTrainer(student(), arguments(tmp_path), cache, **{name: lambda *_: {}})


@pytest.mark.parametrize(("name", "value"), [("auto_find_batch_size", True), ("average_tokens_across_devices", False)])
def test_what_several_processes_cannot_do_is_refused(tmp_path: Path, name: str, value: bool) -> None:
    class Several(TrainingArguments):
        world_size = 2

    alone = arguments(tmp_path, **{name: value})
    check_arguments(alone, {}, matches_layers=False)
    several = Several(**{field.name: getattr(alone, field.name) for field in dataclasses.fields(alone) if field.init})
    with pytest.raises(ValueError, match=name):
        check_arguments(several, {}, matches_layers=False)


def test_inner_states_exclude_what_hides_them(tmp_path: Path) -> None:
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    for settings in ({"torch_compile": True, "torch_compile_backend": "eager"}, reentrant):
        check_arguments(arguments(tmp_path, **settings), {}, matches_layers=False)
        with pytest.raises(ValueError, match="cannot be used"):
            check_arguments(arguments(tmp_path, **settings), {}, matches_layers=True)


# --- evaluation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cached", "ce"])
@pytest.mark.parametrize("batch", [1, 5, 7, 12])
def test_the_loss_of_an_evaluation_is_the_mean_over_all_positions(
    cache: LogitCache, tmp_path: Path, mode: str, batch: int
) -> None:
    model, options = student(), {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3}
    everything = cache.batch(range(ROWS))
    with torch.no_grad():
        logits = model(**model_inputs(everything, model)).logits
    expected = distillation_loss(logits, everything["targets"], everything["labels"], **options)
    args = arguments(tmp_path, per_device_eval_batch_size=batch)
    found = DistillationTrainer(model, args, cache, mode=mode, eval_dataset=cache, **options).evaluate()
    assert found["eval_loss"] == pytest.approx(float(expected.ce if mode == "ce" else expected.loss), rel=1e-6)
    for name in ("kd", "ce", "coverage", "agreement"):
        assert found[f"eval_{name}"] == pytest.approx(float(getattr(expected, name)), rel=1e-6), name


@pytest.mark.parametrize(("rows", "batch", "world"), [(12, 5, 1), (12, 5, 2), (12, 2, 5), (1, 4, 3), (7, 7, 2)])
def test_processes_evaluate_each_row_once_in_as_many_batches(rows: int, batch: int, world: int) -> None:
    shares = [EvaluationBatches(rows, batch, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    seen = [row for share in shares for part, own in zip(share, share.counted, strict=True) if own for row in part]
    assert sorted(seen) == list(range(rows))
    assert all(1 <= len(part) <= batch for share in shares for part in share)


def test_a_loss_that_is_no_number_is_left_out_of_an_evaluation(cache: LogitCache, tmp_path: Path) -> None:
    """As Trainer's logging_nan_inf_filter says, by default."""
    broken = int(cache.batch([3])["input_ids"][0, 0])
    with_it = [row for row in range(ROWS) if broken in cache.batch([row])["input_ids"]]
    assert 0 < len(with_it) < ROWS
    found = {}
    for filtered in (True, False):
        args = arguments(tmp_path, per_device_eval_batch_size=1, logging_nan_inf_filter=filtered)
        model = student()
        trainer = DistillationTrainer(model, args, cache)
        model.get_input_embeddings().weight.data[broken] = torch.nan
        found[filtered] = trainer.evaluate(cache)
    others = Subset(cache, [row for row in range(ROWS) if row not in with_it])
    clean = DistillationTrainer(student(), arguments(tmp_path), cache, eval_dataset=others).evaluate()
    assert found[True]["eval_loss"] == pytest.approx(clean["eval_loss"], rel=1e-6)
    assert np.isnan(found[False]["eval_loss"])


def test_several_evaluations_the_best_model_and_a_scheduler_that_reads_them(cache: LogitCache, tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []

    class Keep(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            lines.append(metrics)

    model = student()
    args = arguments(
        tmp_path,
        max_steps=4,
        learning_rate=30.0,  # it diverges: the first is the best
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="a_kd",
        lr_scheduler_type="reduce_lr_on_plateau",
        greater_is_better=False,
        eval_on_start=True,
    )
    sets = {"a": cache, "b": Subset(cache, [0, 5])}
    trainer = DistillationTrainer(model, args, cache, eval_dataset=sets, callbacks=[Keep()])
    trainer.train()
    kd = [line["eval_a_kd"] for line in lines if "eval_a_kd" in line]
    assert len(kd) == 5 and len(lines) == 10
    best = trainer.evaluate(cache)["eval_kd"]
    assert best == pytest.approx(min(kd[1:]), rel=1e-5) and best < kd[-1]


def test_an_evaluation_in_half_precision(cache: LogitCache, tmp_path: Path) -> None:
    found = [
        DistillationTrainer(student(), arguments(tmp_path, **half), cache, eval_dataset=cache).evaluate()["eval_loss"]
        for half in ({}, {"bf16_full_eval": True}, {"fp16_full_eval": True}, {"bf16": True})
    ]
    assert found[1:] == [pytest.approx(found[0], rel=0.02)] * 3
    assert len(set(found)) == 4


# --- batches ------------------------------------------------------------------------------------------------------------


def test_a_batch_that_fits_is_found_and_the_step_keeps_its_rows(cache: LogitCache, tmp_path: Path) -> None:
    class Small(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["labels"]) > 3:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = student()
    settings = {"per_device_train_batch_size": 6, "logging_strategy": "steps", "logging_steps": 1}
    trainer = Small(model, arguments(tmp_path, auto_find_batch_size=True, **settings), cache, temperature=2.0)
    trainer.train()
    assert trainer.state.global_step == 3
    assert largest_difference(weights(model), trained(cache, tmp_path, **settings)) < 1e-6
    for line in trainer.state.log_history[:3]:
        assert line["loss"] == pytest.approx(4 * line["kd"] + 0.1 * line["ce"], rel=2e-3)


def test_rows_in_their_order(cache: LogitCache, tmp_path: Path) -> None:
    seen: list[int] = []

    class Recorder(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend(inputs["input_ids"][:, 0].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(tmp_path, train_sampling_strategy="sequential", per_device_train_batch_size=5, max_steps=4)
    Recorder(student(), args, cache).train()
    first = cache.batch(range(ROWS))["input_ids"][:, 0].tolist()
    assert seen == (2 * first)[:20]
    assert rows_at(np.arange(26), 12, None).tolist() == [*range(12), *range(12), 0, 1]


@pytest.mark.slow
def test_workers_of_any_kind_read_the_same_rows(cache: LogitCache, tmp_path: Path) -> None:
    settings = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn", "dataloader_in_order": True}
    model = student()
    trainer = DistillationTrainer(model, arguments(tmp_path, **settings), cache, temperature=2.0)
    loader = trainer.get_train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "spawn" and loader.in_order
    trainer.train()
    assert largest_difference(weights(model), trained(cache, tmp_path)) == 0


def test_the_chunk_of_the_loss_is_that_of_the_benchmark(
    cache: LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take the default, which is chosen in one place by device, dtype and vocabulary."""
    asked: list[tuple[torch.device, torch.dtype, int]] = []

    def recorded(device: torch.device, dtype: torch.dtype, vocab_size: int) -> int:
        asked.append((device, dtype, vocab_size))
        return default_chunk_size(device, dtype, vocab_size)

    monkeypatch.setattr("logit_cache.distill.fused.default_chunk_size", recorded)
    DistillationTrainer(student(), arguments(tmp_path, bf16=True, max_steps=1), cache).train()
    by_trainer, asked[:] = set(asked), []
    model, config = student(), StudentConfig(architecture={"model_type": "llama", **SHAPE})
    with torch.autocast("cpu", torch.bfloat16):
        StepLosses(model, cast(Any, None), config, "bucket").cached(cast(Any, cache.batch([0, 1])))
    cpu = torch.device("cpu")
    assert by_trainer == set(asked) == {(cpu, torch.bfloat16, cache.vocab_size)}
    assert default_chunk_size(cpu, torch.bfloat16, 300) > default_chunk_size(cpu, torch.float32, 300)


# --- the forward pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_give_the_same_student(
    cache: LogitCache, tmp_path: Path, name: str, reentrant: bool
) -> None:
    calls: list[int] = []
    model = student(layers=2)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    settings = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}, "max_steps": 1}
    found = trained(cache, tmp_path, model, **settings)
    assert len(calls) >= 2 + 2  # the checks of the model, the step, and the step's layer again
    assert largest_difference(found, trained(cache, tmp_path, student(layers=2), max_steps=1)) < 1e-6


def test_checkpointed_activations_with_adapters(cache: LogitCache, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for settings in ({}, {"activation_checkpointing": True}):
        torch.manual_seed(0)
        model = peft.get_peft_model(student(layers=2), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        found.append(trained(cache, tmp_path, model, **settings))
    assert largest_difference(*found) < 1e-6
    assert any("lora_B" in name and float(tensor.abs().max()) > 0 for name, tensor in found[1].items())


def test_noise_on_the_embeddings_reaches_the_loss_and_ends_with_the_training(cache: LogitCache, tmp_path: Path) -> None:
    model = student()
    found = trained(cache, tmp_path, model, neftune_noise_alpha=20.0)
    assert largest_difference(found, trained(cache, tmp_path)) > 1e-5
    assert largest_difference(found, trained(cache, tmp_path, neftune_noise_alpha=20.0)) == 0
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(("how", "tokens"), [("all", 3 * 4 * LENGTH), (True, 3 * 4 * LENGTH)])
def test_tokens_are_counted(cache: LogitCache, tmp_path: Path, how: Any, tokens: int) -> None:
    trainer = DistillationTrainer(student(), arguments(tmp_path, include_num_input_tokens_seen=how), cache)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == tokens


def test_tokens_of_padding_are_not_counted(cache: LogitCache, tmp_path: Path) -> None:
    class Padded(LogitCache):
        def batch(self, indices: Any) -> Any:
            batch = super().batch(indices)
            segment_ids = batch["segment_ids"].clone()
            segment_ids[:, -3:] = -1
            return {**batch, "segment_ids": segment_ids}

    args = arguments(tmp_path, include_num_input_tokens_seen="non_padding")
    trainer = DistillationTrainer(student(), args, Padded(cache.path))
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 3 * 4 * (LENGTH - 3)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_inner_states_have_their_gradient_through_checkpointed_activations(cache: LogitCache, kernel: str) -> None:
    """Queries and keys are recorded inside a layer, which forgets its activations."""
    batch, found = cache.batch([0, 9]), []
    for checkpointed in (False, True):
        model = student(layers=2).train()
        model.set_attn_implementation(kernel)
        if checkpointed:
            model.activation_checkpointing_enable()
        tap = Tap(["hidden.1", "qk.1"])
        last = tap.hidden(model, batch["input_ids"], batch["segment_ids"])
        (last.sin().sum() + tap.values["hidden.1"].cos().sum() + tap.values["qk.1"].square().sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert "model.layers.1.self_attn.q_proj.weight" in found[0]
    assert largest_difference(*found) < 1e-6
