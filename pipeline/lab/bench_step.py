"""A student's optimizer step from the cache against the same step by other ways of training.

The cached step has the tail of recipe and cache; its other treatment, a bucket where the cache has a shape and a shape
where it has none, is measured beside it. A shape that is made up for that costs what a real one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

from ..base.errors import RecipeError
from ..corpus.labels import IGNORE
from ..distill.fused import fused_loss, fused_online_loss
from ..distill.loss_settings import LossSettings
from ..distill.student import build_student
from ..distill.trainer import DistillationTrainer
from ..distill.training_arguments import loader_workers
from ..models.loading import quiet_transformers
from ..models.output_layer import OutputLayer
from ..models.placement import choose_placement
from ..models.rows import body_hidden, model_inputs
from ..models.student_layers import student_from_layers
from ..models.teacher import Teacher
from ..recipe.paths import StudentPaths
from ..recipe.schema import Recipe
from ..recipe.student import StudentConfig
from ..store.batch import text_batch
from ..store.reader import LogitCache
from ..store.views import Subset
from ..targets.basis import TailBasis
from .timing import in_turns, peak_bytes, ratios, wait_for

MADE_UP_RANK = 32
"""Coordinates of the shape that targets without one get."""
Rows = dict[str, Any]
"""A batch on the student's device: input_ids, segment_ids, labels [B, L] and, where the loss needs them, targets."""


class StepLosses:
    """The loss of one student by each way of training."""

    def __init__(self, student: Any, teacher: Teacher, config: StudentConfig, other_tail: str) -> None:
        self._student, self._teacher = student, teacher
        self._layer = OutputLayer.of(student)
        kd, ce = (w if isinstance(w, float) else w.peak for w in (config.kd_weight, config.ce_weight))
        self._cached = LossSettings(config.temperature, kd, ce, config.tail, config.divergence, config.alpha)
        self._other = replace(self._cached, tail_mode=other_tail)
        self._online = LossSettings(config.temperature, kd, ce)
        self._ce = LossSettings(kd_weight=0.0, ce_weight=1.0)

    def _hidden(self, rows: Rows) -> Tensor:
        return body_hidden(self._student, rows["input_ids"], rows["segment_ids"])

    def cached(self, rows: Rows) -> Tensor:
        return self._from_cache(rows, self._cached)

    def other_tail(self, rows: Rows) -> Tensor:
        return self._from_cache(rows, self._other)

    def _from_cache(self, rows: Rows, settings: LossSettings) -> Tensor:
        targets = rows["targets"].restrict_vocabulary(self._layer.weight.shape[0])
        return fused_loss(self._hidden(rows), self._layer, targets, rows["labels"], settings).loss

    def ce(self, rows: Rows) -> Tensor:
        return fused_loss(self._hidden(rows), self._layer, None, rows["labels"], self._ce).loss

    def hf(self, rows: Rows) -> Tensor:
        """The student's own cross-entropy, with the logits of all positions at once."""
        loss: Tensor = self._student(**model_inputs(rows, self._student), labels=rows["input_ids"]).loss
        return loss

    def online(self, rows: Rows) -> Tensor:
        labels = rows["labels"]
        teacher_ND = self._teacher.hidden(rows["input_ids"], rows["segment_ids"]).flatten(0, 1)

        def teacher_logits(part: slice) -> Tensor:
            return self._teacher.output_layer.logits(teacher_ND[part])

        hidden = self._hidden(rows)
        return fused_online_loss(hidden, self._layer, teacher_logits, labels != IGNORE, labels, self._online).loss


def measure_step(recipe: Recipe, teacher: Teacher, cache: LogitCache, rounds: int) -> dict[str, list[float]]:
    """Time and memory of steps of the recipe's first cached student on the same rows, each way of training in turn.

    Raises RecipeError for a recipe without a cached student.
    """
    config = next((s for s in recipe.students.values() if s.mode == "cached"), None)
    if config is None:
        raise RecipeError("bench of a step needs a student with mode = 'cached' in the recipe")
    placement = choose_placement(config.device, config.dtype)
    device = placement.device
    student = student_of(config, recipe, teacher).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    rows = np.arange(min(config.batch_rows, len(cache)))
    autocast = torch.autocast(device.type, placement.dtype, enabled=placement.dtype != torch.float32)
    has_shape = cache.batch([0])["targets"].basis is not None
    other = "bucket" if has_shape else "shape"
    losses = StepLosses(student, teacher, config, other)
    basis = None if has_shape else _made_up_basis(cache.vocab_size)

    def with_targets() -> Rows:
        return _moved(cache.batch(rows), device)

    def with_other_tail() -> Rows:
        batch: Rows = {**cache.batch(rows)}
        if basis is not None:
            shape = (*batch["targets"].mask.shape, MADE_UP_RANK)
            batch["targets"] = replace(batch["targets"], tail_coordinates=torch.randn(shape), basis=basis)
        return _moved(batch, device)

    def without_targets() -> Rows:
        return _moved(text_batch(cache.columns(rows)), device)

    def step(loss: Callable[[Rows], Tensor], fetch: Callable[[], Rows]) -> None:
        optimizer.zero_grad(set_to_none=True)
        batch = fetch()
        with autocast:
            value = loss(batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        wait_for(device)

    jobs: dict[str, Callable[[], None]] = {
        "cached": partial(step, losses.cached, with_targets),
        other: partial(step, losses.other_tail, with_other_tail),
        "ce": partial(step, losses.ce, without_targets),
        "hf": partial(step, losses.hf, without_targets),
        "online": partial(step, losses.online, without_targets),
    }
    seconds = in_turns(jobs, rounds)
    tokens = len(rows) * cache.row_length
    peaks = [
        {name: peak_over_gradients(jobs[name], student, device) for name in ("cached", other, "hf")}
        for _ in range(rounds)
    ]
    return {
        "step_vs_ce": ratios(seconds["cached"], seconds["ce"]),
        "step_vs_hf": ratios(seconds["cached"], seconds["hf"]),
        "online_vs_cached": ratios(seconds["online"], seconds["cached"]),
        "cached_step_tokens_per_second": [tokens / s for s in seconds["cached"]],
        "online_step_tokens_per_second": [tokens / s for s in seconds["online"]],
        "memory_vs_hf": [peak["cached"] / peak["hf"] for peak in peaks],
        f"{other}_step_vs_ce": ratios(seconds[other], seconds["ce"]),
        f"{other}_step_vs_hf": ratios(seconds[other], seconds["hf"]),
        f"{other}_memory_vs_hf": [peak[other] / peak["hf"] for peak in peaks],
        "data_wait": data_wait(
            student,
            cache,
            config.batch_rows,
            loader_workers(config, [str(cache.path)], device),
            lambda batch: step(losses.cached, partial(_moved, batch, device)),
            rounds,
        ),
    }


def _moved(batch: Any, device: torch.device) -> Rows:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _made_up_basis(vocab_size: int) -> TailBasis:
    return TailBasis(torch.randn(vocab_size), torch.randn(MADE_UP_RANK, vocab_size).T)


def peak_over_gradients(step: Callable[[], None], student: Any, device: torch.device) -> float:
    """Peak of a step beyond parameters, optimizer state and gradients, which every step allocates again."""
    student.zero_grad(set_to_none=True)
    peak = peak_bytes(step, device)
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    return peak - float(sum(grad.numel() * grad.element_size() for grad in grads))


def data_wait(
    student: Any,
    cache: LogitCache,
    batch_rows: int,
    workers: int,
    step: Callable[[dict[str, Any]], None],
    rounds: int,
) -> list[float]:
    """Share of each step that waits for the batch, with the loader of training."""
    args = TrainingArguments(
        output_dir=str(cache.path / "trainer"),
        per_device_train_batch_size=batch_rows,
        use_cpu=next(student.parameters()).device.type == "cpu",
        dataloader_num_workers=workers,
        report_to="none",
    )
    # Two batches more: the first step starts the loader, and the last of an epoch waits for nothing.
    rows = Subset(cache, np.arange((rounds + 3) * batch_rows) % len(cache))
    with quiet_transformers():
        batches = iter(DistillationTrainer(student, args, rows).get_train_dataloader())
    shares: list[float] = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter()
        step(batch)
        shares.append((waited - begin) / (time.perf_counter() - begin))
    return shares[1:]


def student_of(config: StudentConfig, recipe: Recipe, teacher: Teacher) -> Any:
    """A student in training mode; one of teacher layers is made of this teacher, without files."""
    if config.layers is None:
        return build_student(config, StudentPaths(recipe.run_dir), recipe.seed).train()
    return student_from_layers(teacher.model, config.layers).float().train()
