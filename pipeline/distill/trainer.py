"""transformers' Trainer on the rows of a cache."""

from __future__ import annotations

from typing import Any, cast, get_args

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ..models.loading import load_tokenizer
from ..models.output_layer import check_vocabulary
from ..models.packing import unwrap_peft
from ..models.placement import to_device
from ..models.probe import check_model
from ..models.teacher import Teacher
from ..recipe.choices import Mode
from ..store.batch import collate
from ..store.row_source import RowSource
from ..store.samplers import EvaluationBatches, StepBatches, training_order
from .evaluation_sums import EvaluationSums
from .loss_forward import LossForward
from .loss_settings import LossSettings, ScheduledSettings, Weight
from .matching import Matching
from .refused_arguments import check_arguments
from .row_loader import row_loader
from .stopping import StopAndSave, StopRequest, StopVotes
from .student_loss import PROJECTION, DeviceBatch, StudentLoss

MODES: tuple[str, ...] = get_args(Mode)


class DistillationTrainer(Trainer):
    """transformers' Trainer with the fused distillation loss on rows of a LogitCache, or of any view of one.

    mode "cached" learns from the cache's targets and labels, "ce" from the labels alone, "online" from a `teacher` in
    memory. Everything else (accumulation, checkpoints, schedulers, loggers) is Trainer's own. KD and CE are averaged
    over the positions of the whole optimizer step, across micro-batches and processes. The loss is part of the model's
    forward only while the trainer trains or evaluates.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        cache: RowSource,
        *,
        mode: str = "cached",
        temperature: float = 1.0,
        kd_weight: Weight = 1.0,
        ce_weight: Weight = 0.1,
        tail: str | None = None,
        divergence: str = "kl",
        alpha: float | None = None,
        chunk_size: int | None = None,
        matching: Matching | None = None,
        teacher: Teacher | None = None,
        step_rows: int | None = None,
        stop: StopRequest | None = None,
        window: int | None = None,
        **kwargs: Any,
    ) -> None:
        """All processes share the `step_rows` of an optimizer step; by default each has as many as `args` says. Once
        `stop` says so in one of them, the training ends after the step, with a checkpoint.

        Rows are shuffled as a whole, of caches on an object store 64 shards at a time, and with `window` as many shards
        at a time (`store.shard_order`).

        `tail` None is `shape` where the cache has one, else `bucket`. A weight may be a function of the training's
        progress, from 0 to 1. `matching` adds losses on the signals of a cache; where they need a projection, the model
        carries it as `PROJECTION` during training.

        Raises ValueError for settings that do not fit together, MismatchError for a student too small for the cache.
        """
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: one of {', '.join(MODES)}")
        if mode == "online" and teacher is None:
            raise ValueError("mode 'online' needs the teacher: pass teacher=load_teacher(...)")
        settings = LossSettings(temperature, tail_mode=tail, divergence=divergence, alpha=alpha)
        if mode == "cached" and len(cache):
            settings.fit(cache.batch([0])["targets"], cache.vocab_size)
        _check_student(model, cache, mode)
        kd_weight, ce_weight = (0.0, 1.0) if mode == "ce" else (kd_weight, ce_weight)
        self._settings = ScheduledSettings(settings, kd_weight, ce_weight)
        matching = matching if mode == "cached" and matching is not None and matching.weights else None
        if matching is not None:
            _add_projection(model, matching, cache)
        self._loss = StudentLoss(mode, cache.objective, self._settings.has_weight, chunk_size, matching, teacher)
        self._loss_forward = LossForward(model, self._batch_loss)
        self._logged: list[Tensor] = []
        """The loss's parts of every micro-batch since the last line of the log."""
        self._step_rows, self._window = step_rows, window
        self._evaluation: EvaluationSums | None = None
        """While it evaluates."""
        check_arguments(args, kwargs, matches_layers=matching is not None)
        _prepare_arguments(args, model)
        self._votes = StopVotes(stop)
        super().__init__(model=model, args=args, train_dataset=cache, data_collator=collate, **kwargs)
        self.add_callback(StopAndSave(self._votes))
        # The loss is a mean over the whole accumulated batch already.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's own, with FSDP also on CPUs, where accelerate omits it silently."""
        super().create_accelerator_and_postprocess()
        plugin = self.args.fsdp_plugin_args
        if plugin is not None and getattr(self.accelerator.state, "fsdp_plugin", None) is None:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's share of every step, in an order that depends on seed and step alone."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        own = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._step_rows = self._step_rows or own * args.world_size
        source: Any = self.train_dataset
        batches = StepBatches(
            training_order(source, None if args.train_sampling_strategy == "sequential" else seed, self._window),
            self._step_rows,
            self._train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            source=source,
        )
        # The step has the same rows where auto_find_batch_size divides it into more batches.
        args.gradient_accumulation_steps = batches.micro_batches
        self._logged = []
        return row_loader(self.train_dataset, batches, self.data_collator, args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's share of the rows of an evaluation, each of which is evaluated once."""
        named = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        rows: Any = self.eval_dataset if named is None else named
        if rows is None:
            raise ValueError("there is nothing to evaluate on: pass eval_dataset, a cache or a view of one")
        args = self.args
        batches = EvaluationBatches(
            len(rows), args.per_device_eval_batch_size, rank=args.process_index, world_size=args.world_size
        )
        return row_loader(rows, batches, self.data_collator, args)

    get_test_dataloader = get_eval_dataloader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; afterwards the model has its own forward again."""
        with self._loss_forward:
            return super().train(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's own, with means over all positions; afterwards the model has its own forward again."""
        rows, batches = cast(Any, dataloader.dataset), cast(Any, dataloader.batch_sampler)
        sums = self._evaluation = EvaluationSums.of(self._loss, self._present_settings, rows)
        try:
            with self._loss_forward:
                output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        finally:
            self._evaluation = None
        totals = sums.totals(batches.counted, self.args.logging_nan_inf_filter)
        means = sums.means(self.accelerator.reduce(totals, "sum"))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of one batch of an evaluation, summed over its positions."""
        if self._evaluation is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        rows = self._evaluation.loss.on_device(self.model, inputs, self._evaluation.settings, self.args.device)
        with torch.no_grad():
            parts = model(distillation=rows, positions=None)
        self._evaluation.add(parts, inputs)
        return parts["loss"].detach(), None, None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch, as its share of the optimizer step."""
        # Through the wrapped model's forward: data parallel training synchronises gradients only there.
        rows = self._loss.on_device(self.model, inputs, self._present_settings, self.args.device)
        with self._loss_forward:
            output = model(distillation=rows, positions=num_items_in_batch)
        if model.training:
            self._logged.append(torch.stack([output[name].to(output["ce"].dtype) for name in self._loss.part_names]))
        # Gradients are averaged over processes, and the positions were counted over all of them.
        loss = output["loss"] * self.args.world_size if self.args.world_size > 1 else output["loss"]
        return (loss, output) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """`StudentLoss.position_counts` over all micro-batches and processes of a step."""
        counts = to_device(torch.stack([self._loss.position_counts(batch) for batch in batch_samples]).sum(0), device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(torch.cat([counts, self._votes.own(counts)]), "sum")
            counts, votes = counts[:-1], counts[-1:]
            self._votes.take(votes)
        return counts

    def _progress(self, step: int) -> float:
        """Of the training in a step, counted from 0; after the training that of the last step."""
        return min(step / float(max(self.state.max_steps - 1, 1)), 1.0)

    @property
    def _present_settings(self) -> LossSettings:
        return self._settings.at(self._progress(self.state.global_step))

    def _batch_loss(self, model: Any, rows: DeviceBatch, positions: Tensor | None) -> dict[str, Tensor]:
        if self._evaluation is not None:
            return self._evaluation.part_sums(model, rows)
        return self._loss(model, rows, self._present_settings, positions)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As they are: `StudentLoss.on_device` moves them."""
        return inputs

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Trainer's own; padding is what belongs to no document."""
        super()._track_num_input_tokens({**inputs, "attention_mask": inputs["segment_ids"] >= 0})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss's parts, per position, to Trainer's log; only here are they read off the device."""
        if "loss" in logs and self._logged:
            steps = len(self._logged) / self.args.gradient_accumulation_steps
            # Shares of this process; Trainer reduces the loss itself.
            shares = self.accelerator.reduce(torch.stack(self._logged).sum(0) / steps, "sum")
            parts = self._loss.named(shares.tolist())
            # global_step counts the logged step already: its weights are those of the step before.
            logs = {**logs, **parts, **self._settings.changing(self._progress(self.state.global_step - 1))}
            self._logged = []
        super().log(logs, *args, **kwargs)


def _check_student(model: Any, cache: RowSource, mode: str) -> None:
    """Raises MismatchError for a student too small for the cache, RecipeError for an architecture that cannot be used.

    Raises ValueError for adapters that act outside the layers: the loss takes hidden states from the model inside.
    """
    tokens = None if mode == "online" else (lambda: len(load_tokenizer(str(cache.tokenizer_dir))))
    check_vocabulary(model, cache.vocab_size, "the student", tokens)
    check_model(model)
    for config in getattr(model, "peft_config", {}).values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or kind == "XLORA" or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(f"peft's {kind} acts outside the model's layers: use adapters inside them, such as LoRA")


def _add_projection(model: Any, matching: Matching, cache: RowSource) -> None:
    """Attach the map from the student's width to the teacher's, where the matched layers need one."""
    config = unwrap_peft(model).config
    matching.check(config, cache.signals, cache.row_length)
    projection = matching.projection(config, cache.signals)
    if projection is not None:
        setattr(model, PROJECTION, projection)


def _prepare_arguments(args: TrainingArguments, model: Any) -> None:
    """Adapt Trainer's settings to rows of a cache and a loss inside forward."""
    # Trainer would drop targets and segment ids.
    args.remove_unused_columns = False
    # Several GPUs need several processes (torchrun): torch's DataParallel cannot split these batches.
    args._n_gpu = min(args.n_gpu, 1)
    if args.torch_compile:
        # The body alone, in place: the fused loss computes its own gradient and gains nothing, and the names of the
        # weights in checkpoints stay the same.
        body = unwrap_peft(model).base_model
        body.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
