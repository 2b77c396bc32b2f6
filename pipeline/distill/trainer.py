"""trainer."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ..corpus.labels import IGNORE
from ..models.loading import load_tokenizer
from ..models.output_layer import OutputLayer, check_vocabulary
from ..models.packing import body_hidden, unwrap_peft
from ..models.probe import check_model
from ..models.taps import Tap, visible_pairs
from ..models.teacher import Teacher
from ..store.batch import Batch, collate
from ..store.order import StepBatches
from ..store.row_source import Rows
from . import divergences
from .fused import fused_distillation_loss, fused_online_loss
from .loss import TAILS, DistillationOutput, check_settings
from .matching import Matching

MODES = ("cached", "ce", "online")


class DistillationTrainer(Trainer):
    """transformers' Trainer with the fused distillation loss on rows of a LogitCache, or of any view of one.

    mode "cached" learns from the cache's targets and labels, "ce" from the labels alone, "online" from a `teacher` that
    runs beside the student. Everything else (accumulation, checkpoints, schedulers, loggers) is Trainer's own. KD and CE
    are averaged over the positions of the whole optimizer step, across micro-batches and processes.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        cache: Rows,
        *,
        mode: str = "cached",
        temperature: float = 1.0,
        kd_weight: float | Callable[[float], float] = 1.0,
        ce_weight: float | Callable[[float], float] = 0.1,
        tail: str = "bucket",
        divergence: str = "kl",
        alpha: float | None = None,
        chunk_size: int = 256,
        matching: Matching | None = None,
        teacher: Teacher | None = None,
        step_rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        """`step_rows` of an optimizer step are shared by all processes; by default as many as `args` gives each of them.

        A weight may be a function of the share of the training that is behind, from 0 to 1. `matching` adds losses on the
        signals of a cache; where they need a projection, the model carries it as `PROJECTION` while it is trained.

        Raises ValueError for settings that do not fit together, MismatchError for a student too small for the cache.
        """
        if mode not in MODES or tail not in TAILS:
            raise ValueError(f"mode {mode!r} and tail {tail!r} must be of {MODES} and {TAILS}")
        if mode == "online" and teacher is None:
            raise ValueError("mode 'online' needs the teacher")
        divergences.check(divergence, alpha)
        if mode == "cached" and len(cache):
            check_settings(cache.batch([0])["targets"], cache.vocab_size, temperature, tail, divergence, alpha)
        tokens = None if mode == "online" else (lambda: len(load_tokenizer(str(cache.tokenizer_dir))))
        check_vocabulary(model, cache.vocab_size, "the student", tokens)
        check_model(model)
        # The rows carry columns of our own.
        args.remove_unused_columns = False
        # Several GPUs are for several processes (torchrun): torch's DataParallel cannot split our batches.
        args._n_gpu = min(args.n_gpu, 1)
        given = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._order = StepBatches(
            len(cache),
            step_rows or given,
            args.per_device_train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            world_size=args.world_size,
        )
        if args.torch_compile:
            # The body alone, in place: the loss writes its gradient itself and has nothing to gain, and the names of the
            # weights in checkpoints stay what they are.
            body = unwrap_peft(model).base_model
            body.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
            args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        self._mode, self._teacher, self._objective = mode, teacher, cache.objective
        self._matching = matching if mode == "cached" and matching is not None and matching.weights else None
        self._part_names: tuple[str, ...] = _PARTS
        if self._matching is not None:
            config = unwrap_peft(model).config
            self._matching.check(config, cache.signals, cache.row_length)
            projection = self._matching.projection(config, cache.signals)
            if projection is not None:
                setattr(model, PROJECTION, projection)
            self._part_names = (*_PARTS, *self._matching.weights)
        self._sums: list[Tensor] = []
        self._weights = {
            "kd_weight": 0.0 if mode == "ce" else kd_weight,
            "ce_weight": 1.0 if mode == "ce" else ce_weight,
        }
        self._loss = {"temperature": temperature, "chunk_size": chunk_size}
        self._tail = tail
        self._divergence: dict[str, Any] = {"divergence": divergence, "alpha": alpha}
        _install_loss(model, self._row_loss)
        super().__init__(model=model, args=args, train_dataset=cache, data_collator=collate, **kwargs)
        # Our loss is already averaged over the whole accumulated batch.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's own; and FSDP also on CPUs, where accelerate leaves it out without a word."""
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
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=self._order,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # Shared out already; accelerate has only to place the batches.
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
        )
        return prepared

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch, as its share of the optimizer step."""
        # Through the wrapped model's own forward: only so does data parallel training synchronise gradients.
        output = model(distillation=inputs, positions=num_items_in_batch)
        if model.training:
            self._sums.append(torch.stack([output[name].to(output["ce"].dtype) for name in self._part_names]))
        loss = output["loss"]
        if self.args.world_size > 1:
            # Gradients are averaged over processes, and the positions were counted over all of them.
            loss = loss * self.args.world_size
        return (loss, output) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Positions with a target and positions with a label, over all micro-batches and processes of a step [2].

        With matched layers also positions that are not padding and pairs that see each other [4].
        """
        masks = [[batch["targets"].mask, batch["labels"] != IGNORE] for batch in batch_samples]
        if self._matching is not None:
            for columns, batch in zip(masks, batch_samples, strict=True):
                segments = batch["segment_ids"]
                columns += [segments >= 0, visible_pairs(segments, causal=self._objective == "causal")]
        # Summed where the batches are: reading the numbers here would stop a GPU at every step.
        counts = torch.stack([sum(part.sum() for part in column) for column in zip(*masks, strict=True)]).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def _weights_at(self, step: int) -> dict[str, float]:
        """Loss weights of a step, the first of which is 0; after the training those of the last."""
        progress = min(step / max(self.state.max_steps - 1, 1), 1.0)
        return {name: weight(progress) if callable(weight) else weight for name, weight in self._weights.items()}

    def _row_loss(self, model: Any, batch: Batch, positions: Tensor | None) -> dict[str, Tensor]:
        """The loss of a batch, and its parts for the log."""
        rows = batch["input_ids"], batch["segment_ids"]
        if self._matching is None:
            return _parts(self._output_loss(model, body_hidden(model, *rows), batch, positions))
        tap = Tap(self._matching.student_names())
        hidden = tap.hidden(model, *rows)
        if any(callable(weight) or weight > 0 for weight in self._weights.values()):
            result = _parts(self._output_loss(model, hidden, batch, positions))
        else:
            # Nothing is asked of the output layer.
            nothing = torch.zeros((), device=hidden.device)
            result = {"loss": nothing, **dict.fromkeys(_PARTS, nothing)}
        matched = self._matching.losses(
            tap.values,
            cast(dict[str, Any], batch),
            int(unwrap_peft(model).config.get_text_config().num_attention_heads),
            getattr(model, PROJECTION, None),
            causal=self._objective == "causal",
            positions=None if positions is None else positions[2],
            pair_count=None if positions is None else positions[3],
        )
        for name, weight in self._matching.weights.items():
            result["loss"] = result["loss"] + weight * matched[name]
        return {**result, **{name: value.detach() for name, value in matched.items()}}

    def _output_loss(self, model: Any, hidden: Tensor, batch: Batch, positions: Tensor | None) -> DistillationOutput:
        head = OutputLayer.of(model)
        settings: dict[str, Any] = {
            **self._loss,
            **self._weights_at(self.state.global_step),
            "bias": head.bias,
            "logit_scale": head.scale,
            "softcap": head.softcap,
            "kd_positions": None if positions is None else positions[0],
            "ce_positions": None if positions is None else positions[1],
        }
        labels, targets = batch["labels"], batch["targets"]
        if self._objective == "masked" and self._mode != "online" and self._divergence["divergence"] != "tail_aware_kl":
            # Most positions of masked rows may have nothing to learn: the output layer is spared them.
            keep = labels != IGNORE if self._mode == "ce" else targets.mask | (labels != IGNORE)
            # Counted once for all: each mask would stop a GPU to count.
            kept = keep.flatten().nonzero().squeeze(-1)
            hidden, labels, targets = hidden.flatten(0, 1)[kept], labels.flatten()[kept], targets.flatten()[kept]
        if self._mode == "online":
            teacher = self._teacher
            assert teacher is not None
            teacher_hidden_ND = teacher.hidden(batch["input_ids"], batch["segment_ids"]).flatten(0, 1)

            def teacher_logits(rows: slice) -> Tensor:
                return teacher.output_layer.logits(teacher_hidden_ND[rows])

            settings |= self._divergence
            return fused_online_loss(hidden, head.weight, teacher_logits, targets.mask, labels, **settings)
        if self._mode == "ce":
            return fused_distillation_loss(hidden, head.weight, None, labels, **settings)
        targets = targets.restrict_vocabulary(head.weight.shape[0])
        return fused_distillation_loss(
            hidden, head.weight, targets, labels, tail=self._tail, **self._divergence, **settings
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss's parts, per position, to what Trainer logs; read off the device only here."""
        if "loss" in logs and self._sums:
            steps = len(self._sums) / self.args.gradient_accumulation_steps
            # Shares of this process, as is the loss, which Trainer puts together itself.
            shares = self.accelerator.reduce(torch.stack(self._sums).sum(0) / steps, "sum")
            parts = dict(zip(self._part_names, shares.tolist(), strict=True))
            if self._mode == "ce":
                parts = {"ce": parts["ce"]}
            elif self._mode == "online":
                del parts["coverage"]
            # The step is counted already; its line tells the weights that it used.
            used = self._weights_at(self.state.global_step - 1)
            scheduled = {name: used[name] for name, weight in self._weights.items() if callable(weight)}
            logs = {**logs, **parts, **scheduled}
            self._sums = []
        super().log(logs, *args, **kwargs)


_PARTS = ("kd", "ce", "coverage", "agreement")
PROJECTION = "distillation_projection"


def _parts(output: DistillationOutput) -> dict[str, Tensor]:
    return {"loss": output.loss, **{name: getattr(output, name) for name in _PARTS}}


def _install_loss(model: Any, row_loss: Callable[[Any, Batch, Tensor | None], dict[str, Tensor]]) -> None:
    """Let `model(distillation=batch)` give the loss, and every other call what it gave before.

    The loss needs hidden states and output layer together; taking it inside forward keeps wrappers (data parallel,
    autocast, compile) around all of it.
    """
    plain = model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "distillation" not in kwargs:
            return plain(*args, **kwargs)
        return row_loss(self, kwargs["distillation"], kwargs["positions"])

    model.forward = types.MethodType(forward, model)
