"""Stage two: a student trained from the cache with transformers' Trainer; the teacher's weights are not needed."""

from __future__ import annotations

import json
import math
import shutil
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline import divergences, models, processes
from pipeline.cache import Batch, collate
from pipeline.config import StudentConfig
from pipeline.durable import TEMPORARY, publish_directory, read_json, write_bytes, write_json
from pipeline.errors import IncompleteError, MismatchError, RecipeError
from pipeline.losses import TAILS, DistillationOutput, check_settings, fused_distillation_loss, fused_online_loss
from pipeline.matching import Matching
from pipeline.order import StepBatches
from pipeline.progress import Meter, say
from pipeline.provenance import PROVENANCE, provenance
from pipeline.rows import IGNORE, tokenizer_digest
from pipeline.schedules import as_function
from pipeline.signals import Tap, visible_pairs
from pipeline.teacher import Teacher, auto_class, clear_errors, load_tokenizer, quiet
from pipeline.views import Rows, student_rows

MODES = ("cached", "ce", "online")
CHECKPOINTS, FINAL, METRICS, RUN = "checkpoints", "final", "metrics.jsonl", "run.json"
_WORKERS = 2  # fetch and decode the next rows while a step is computed


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
        models.check_vocabulary(model, cache.vocab_size, "the student", tokens)
        models.check_model(model)
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
            body = models.causal_model(model).base_model
            body.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
            args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        self._mode, self._teacher, self._objective = mode, teacher, cache.objective
        self._matching = matching if mode == "cached" and matching is not None and matching.weights else None
        self._part_names: tuple[str, ...] = _PARTS
        if self._matching is not None:
            config = models.causal_model(model).config
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
            return _parts(self._output_loss(model, models.body_hidden(model, *rows), batch, positions))
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
            int(models.causal_model(model).config.get_text_config().num_attention_heads),
            getattr(model, PROJECTION, None),
            causal=self._objective == "causal",
            positions=None if positions is None else positions[2],
            pair_count=None if positions is None else positions[3],
        )
        for name, weight in self._matching.weights.items():
            result["loss"] = result["loss"] + weight * matched[name]
        return {**result, **{name: value.detach() for name, value in matched.items()}}

    def _output_loss(self, model: Any, hidden: Tensor, batch: Batch, positions: Tensor | None) -> DistillationOutput:
        head = models.OutputHead.of(model)
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
                return teacher.head.logits(teacher_hidden_ND[rows])

            settings |= self._divergence
            return fused_online_loss(hidden, head.weight, teacher_logits, targets.mask, labels, **settings)
        if self._mode == "ce":
            return fused_distillation_loss(hidden, head.weight, None, labels, **settings)
        targets = targets.within(head.weight.shape[0])
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


def build_student(config: StudentConfig, start_dir: Path, seed: int, objective: str = "causal") -> Any:
    """The student as it starts: layers exported by stage one, a fresh architecture, or a model by path or hub name.

    float32 weights, whatever precision training computes in. Raises IncompleteError where stage one exported no layers.
    """
    from transformers import AutoConfig

    torch.manual_seed(seed)
    if config.architecture is not None:
        settings = dict(config.architecture)
        with clear_errors("architecture"):
            kind = settings.pop("model_type")
            return auto_class(objective).from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    source = str(start_dir) if config.layers is not None else str(config.model)
    if config.layers is not None:
        try:
            exported = json.loads((start_dir / "start.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            exported = {}
        if exported.get("layers") != config.layers or exported.get("token_types", "keep") != config.token_types:
            raise IncompleteError(
                f"{start_dir}: the student's first layers ({config.layers}) are not there: run `logit-cache cache` where "
                "the teacher is; it exports them"
            )
    with quiet(), clear_errors(source):
        return auto_class(objective).from_pretrained(source, dtype=torch.float32, use_safetensors=True)


def loader_workers(config: StudentConfig, sources: Iterable[str], device: torch.device) -> int:
    """Processes that read rows: none where a step on the same cores would only be slowed down by them."""
    if config.loader_workers is not None:
        return config.loader_workers
    return _WORKERS if device.type != "cpu" or any("://" in source for source in sources) else 0


def train(
    config: StudentConfig, name: str, cache: Rows, folder: Path, *, seed: int, teacher: Teacher | None = None
) -> None:
    """Train one student to the end, continuing from its last checkpoint.

    Leaves in `folder`: final/ (model and tokenizer), metrics.jsonl, run.json (settings and cache), provenance.json (what
    computed it), tensorboard/ where that is installed. Raises MismatchError for a finished or
    begun student that was made with other settings or from another cache.
    """
    sources = config.caches or config.teachers or [str(getattr(cache, "path", ""))]
    cache = student_rows(config, cache, seed)
    try:
        divergences.check(config.divergence, config.alpha)
        if config.mode == "cached" and len(cache):
            targets = cache.batch([0])["targets"]
            check_settings(targets, cache.vocab_size, config.temperature, config.tail, config.divergence, config.alpha)
    except ValueError as error:
        raise RecipeError(f"students.{name}: {error}") from error
    final = folder / FINAL
    run: dict[str, Any] = {"config": config.model_dump(mode="json"), "cache": cache.digest, "seed": seed}
    previous = read_json(folder / RUN, f"delete {folder} and train again")
    if previous is not None and previous != run:
        changed = [key for key in run["config"] if previous["config"].get(key) != run["config"][key]]
        changed += [key for key in ("cache", "seed") if previous[key] != run[key]]
        raise MismatchError(
            f"{folder}: this student was begun with other settings ({', '.join(changed)} differ): give the new one another "
            "name, or delete that directory"
        )
    if (final / "config.json").exists():
        say(f"train {name}: done, {final}")
        return
    report_to = _loggers(config.report_to, name)
    tokenizer = _student_tokenizer(config, cache)
    placement = models.choose_placement(config.device, config.dtype)
    model = build_student(config, folder / "start", seed, cache.objective)
    matching = Matching(**{field: getattr(config, field) for field in Matching.__dataclass_fields__})
    if config.mode == "cached":
        matching.check(model.config, cache.signals, cache.row_length, f"students.{name}: ")
        if config.lora is not None and matching.projection(model.config, cache.signals) is not None:
            raise RecipeError(
                f"students.{name}: lora leaves the student's width as it is, and the map from it to the teacher's would be lost "
                "with every checkpoint: match layers of the same width, or train without lora"
            )
    if config.lora is not None:
        model = _with_adapters(model, config.lora, name)
    placement = replace(placement, attention=model.config._attn_implementation)
    say(f"train {name}: mode {config.mode}, {placement}")
    step_rows, world_size = config.batch_rows * config.accumulate, processes.world_size()
    if step_rows % world_size:
        raise RecipeError(
            f"students.{name}: a step of {step_rows} rows (batch_rows x accumulate) cannot be shared evenly by "
            f"{world_size} processes: make it a multiple of {world_size}"
        )
    if config.parallel == "fsdp" and not processes.launched():
        raise RecipeError(f"students.{name}: parallel = 'fsdp' needs torchrun, also for one process")
    if config.parallel == "fsdp" and config.lora is not None:
        raise RecipeError(f"students.{name}: adapters (lora) are small and trained with parallel = 'ddp'")
    if config.parallel == "fsdp" and (shared := _shared_beside_embeddings(model)):
        raise RecipeError(
            f"students.{name}: parallel = 'fsdp' cannot shard what this model shares between modules ({', '.join(shared)}): "
            "use 'ddp'"
        )
    # The step is the recipe's, whatever the number of processes: each takes its part of the rows, batch_rows at once.
    steps = config.steps if config.epochs is None else max(math.ceil(config.epochs * len(cache) / step_rows), 1)
    share = step_rows // world_size
    micro_batches = -(-share // config.batch_rows)
    args = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=-(-share // micro_batches),
        gradient_accumulation_steps=micro_batches,
        fsdp=config.parallel == "fsdp",
        fsdp_config={"version": 2} if config.parallel == "fsdp" else None,
        # Without KD and CE the output layer has no part in the loss.
        ddp_find_unused_parameters=config.kd_weight == 0.0 == config.ce_weight,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=placement.dtype == torch.bfloat16,
        fp16=placement.dtype == torch.float16,
        use_cpu=placement.device.type == "cpu",
        seed=seed,
        data_seed=seed,
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        dataloader_num_workers=loader_workers(config, sources, placement.device),
        dataloader_pin_memory=placement.device.type == "cuda",
        report_to=[target for target in report_to if target != "tensorboard"],
        run_name=name,
        project="logit-cache",
        disable_tqdm=True,
    )
    callbacks: list[TrainerCallback] = []
    if args.should_save:
        write_json(folder / RUN, run)
        write_json(folder / PROVENANCE, {**provenance(), "placement": str(placement), "cache": cache.digest})
        if "tensorboard" in report_to:
            callbacks.append(_tensorboard(folder / "tensorboard"))
    trainer = DistillationTrainer(
        model,
        args,
        cache,
        mode=config.mode,
        temperature=config.temperature,
        kd_weight=as_function(config.kd_weight),
        ce_weight=as_function(config.ce_weight),
        tail=config.tail,
        divergence=config.divergence,
        alpha=config.alpha,
        matching=matching,
        teacher=teacher,
        step_rows=step_rows,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    last = _last_checkpoint(folder / CHECKPOINTS)
    if last is not None:
        say(f"train {name}: continuing from {last}")
    # However the training ends, the terminal gets its cursor back.
    with ExitStack() as shown, quiet():
        trainer.add_callback(_StepLog(name, folder / METRICS, step_rows * cache.row_length, shown))
        trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    if hasattr(model, PROJECTION):
        delattr(model, PROJECTION)  # it served the training; checkpoints keep it
    aside = final.with_name(final.name + TEMPORARY)
    if args.should_save:
        shutil.rmtree(aside, ignore_errors=True)
    with quiet():
        if config.lora is None:
            trainer.save_model(str(aside))  # every process has a part in it where the weights are sharded
        elif args.should_save:
            # A plain model, adapters folded in: evaluation and inference need no peft.
            model.merge_and_unload().save_pretrained(aside)
    if args.should_save:
        tokenizer.save_pretrained(aside)
        publish_directory(aside, final)
    trainer.accelerator.wait_for_everyone()
    say(f"train {name}: done, {final}")


def _shared_beside_embeddings(model: Any) -> list[str]:
    """Names under which a parameter that is no embedding is shared with another module: FSDP takes it for two."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    embeddings = model.get_input_embeddings().weight
    return [
        name for parameter, of_it in names.items() if len(of_it) > 1 and parameter is not embeddings for name in of_it
    ]


def _loggers(wanted: list[str] | None, name: str) -> list[str]:
    """The loggers to report to: those of the recipe, else TensorBoard where it is installed."""
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    missing = [logger for logger in wanted or [] if logger not in available]
    if missing:
        raise RecipeError(
            f"students.{name}.report_to: {missing[0]!r} is not installed, or no logger that transformers knows "
            f"(here are: {', '.join(available) or 'none'})"
        )
    return wanted if wanted is not None else [logger for logger in available if logger == "tensorboard"]


def _tensorboard(folder: Path) -> TrainerCallback:
    """Trainer's own TensorBoard logger, writing beside the run instead of below its checkpoints."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


def _with_adapters(model: Any, settings: dict[str, Any], name: str) -> Any:
    """The model with LoRA adapters, its own weights frozen (Hu et al. 2021, arXiv 2106.09685)."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError(f"students.{name}.lora needs peft: pip install 'logit-cache[lora]'") from error
    try:
        # peft knows no task of masked models; its plain wrapper serves them.
        task = {} if models.is_masked(model) else {"task_type": "CAUSAL_LM"}
        return get_peft_model(model, LoraConfig(**{**task, **settings}))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"students.{name}.lora: {str(error).splitlines()[0]}") from error


def _student_tokenizer(config: StudentConfig, cache: Rows) -> Any:
    """The tokenizer that the student will be saved with: the cache's own.

    Raises MismatchError if the student was trained on text in another tokenizer, where cached ids mean other text.
    """
    if config.model is not None:
        own = tokenizer_digest(load_tokenizer(config.model))
        expected = cache.tokenizer_digest
        if own != expected:
            raise MismatchError(
                f"student {config.model!r} has another tokenizer (digest {own[:16]}) than the cache (digest "
                f"{expected[:16]}): cached token ids would mean other text; start from a model with the teacher's tokenizer"
            )
    return load_tokenizer(str(cache.tokenizer_dir))


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: trainer_state.json is what Trainer writes last, and ends as JSON does."""
    for state in sorted(folder.glob("checkpoint-*/trainer_state.json"), key=_step_of, reverse=True):
        try:
            json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            continue
        return state.parent
    return None


def _step_of(state: Path) -> int:
    return int(state.parent.name.rpartition("-")[2])


class _StepLog(TrainerCallback):
    """metrics.jsonl beside the run, and how far it is, on a bar that `shown` closes."""

    def __init__(self, name: str, file: Path, tokens_per_step: int, shown: ExitStack) -> None:
        self._name, self._file, self._tokens, self._shown = name, file, tokens_per_step, shown
        self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen = state.global_step
        left = (state.max_steps - state.global_step) * self._tokens
        self._meter = self._shown.enter_context(Meter(f"train {self._name}", left))
        if not state.is_world_process_zero:
            return
        # Steps after the checkpoint that is continued from are run again: their lines would stand twice.
        kept = [line for line in read_metrics(self._file) if line["step"] <= state.global_step]
        write_bytes(self._file, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note = f"step {state.global_step} of {state.max_steps}"
        if state.log_history:
            note += "".join(
                f"  {key} {state.log_history[-1][key]:.3f}" for key in ("kd", "ce") if key in state.log_history[-1]
            )
        self._meter.advance((state.global_step - self._seen) * self._tokens, note)
        self._seen = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a line cut short by a crash is left out."""

    def lines() -> Iterator[dict[str, float]]:
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                yield json.loads(line)
            except ValueError:
                continue

    return list(lines())
