"""The arguments of transformers' Trainer that `DistillationTrainer` cannot follow; it follows all others."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

REFUSED = {
    "label_smoothing_factor": "the loss on the labels is their plain cross-entropy",
    "use_liger_kernel": "the loss is fused already, and liger's would replace it: give liger's other kernels to the model",
    "liger_kernel_config": "the loss is fused already, and liger's would replace it",
    "use_cache": "whole rows need no cache of keys and values",
    "dataloader_drop_last": "every step has all its rows, and an evaluation takes every row",
    "label_names": "rows of a cache have their own labels",
    "length_column_name": "all rows have one length",
    "parallelism_config": "rows are not divided over devices: use fsdp",
    "deepspeed": "the loss reads the output layer's weights outside its module: use fsdp",
    "include_for_metrics": "an evaluation keeps no logits for compute_metrics",
    "batch_eval_metrics": "an evaluation keeps no logits for compute_metrics",
    "eval_do_concat_batches": "an evaluation keeps no logits to concatenate",
    "eval_use_gather_object": "an evaluation keeps no logits to gather",
}
"""Argument -> why no value but the default can be used."""
REFUSED_CALLABLES = {
    "compute_loss_func": "the loss is the trainer's own: see its mode, divergence and weights",
    "compute_metrics": "logits exist for some positions at a time: read eval_kd, eval_ce and eval_agreement",
    "preprocess_logits_for_metrics": "logits exist for some positions at a time",
}
"""Argument of Trainer itself -> why it cannot be used."""


def check_arguments(args: TrainingArguments, trainer: dict[str, Any], *, matches_layers: bool) -> None:
    """Raises ValueError, naming the argument, for those of `args`, or of Trainer itself, that would be ignored.

    `matches_layers`: whether the loss reads the student's inner states.
    """
    for name, reason in REFUSED_CALLABLES.items():
        if trainer.get(name) is not None:
            raise ValueError(f"{name} cannot be used: {reason}")
    for field in fields(TrainingArguments):
        value = getattr(args, field.name)
        if field.name in REFUSED and value != _default(field):
            raise _refusal(field.name, value, REFUSED[field.name])
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise _refusal("train_sampling_strategy", args.train_sampling_strategy, "all rows have one length")
    config = args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(config, name, None):
            raise _refusal(f"accelerator_config.{name}", True, "every process reads its own rows of a step")
    if args.world_size > 1:
        if args.auto_find_batch_size:
            raise _refusal("auto_find_batch_size", True, "processes would find different ones: set the batch size")
        if not args.average_tokens_across_devices:
            raise _refusal(
                "average_tokens_across_devices", False, "losses are averaged over the positions of all processes"
            )
    if matches_layers:
        if args.torch_compile:
            raise _refusal("torch_compile", True, "losses on inner states need the layers as they are")
        if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise _refusal(
                "activation_checkpointing_kwargs['use_reentrant']", True, "inner states would have no gradient"
            )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _refusal(name: str, value: Any, reason: str) -> ValueError:
    return ValueError(f"TrainingArguments.{name} = {value!r} cannot be used: {reason}")
