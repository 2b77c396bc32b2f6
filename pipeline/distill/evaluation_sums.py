"""The losses of an evaluation: sums over all positions of all batches, divided once, whatever the size of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..models.placement import to_device
from ..store.batch import Batch
from ..store.row_source import RowSource
from .loss_settings import LossSettings
from .student_loss import DeviceBatch, StudentLoss

_DIVISOR = {"kd": 0, "coverage": 0, "agreement": 0, "ce": 1, "cosine": 2, "hidden": 2, "attention": 3}
"""Part of the loss -> the number of its divisor in `StudentLoss.position_counts`."""


@dataclass
class EvaluationSums:
    """Sums of the loss's parts over the batches of one evaluation."""

    loss: StudentLoss
    settings: LossSettings
    """With the weights of the training's present step."""
    _batches: list[Tensor] = field(default_factory=list)
    """Of every batch the parts' sums, then the counts of positions."""

    @classmethod
    def of(cls, training: StudentLoss, settings: LossSettings, rows: RowSource) -> EvaluationSums:
        """The training's loss on other rows: against their targets also where it learns from labels alone, and without
        the losses on signals that they lack."""
        matching = training.matching
        if matching is not None and not all(set(names) & set(rows.signals) for names in matching.teacher_names()):
            matching = None
        mode = "cached" if training.mode == "ce" else training.mode
        return cls(replace(training, mode=mode, matching=matching, uses_output_layer=True), settings)

    def part_sums(self, model: Any, rows: DeviceBatch) -> dict[str, Tensor]:
        """The loss's parts of a batch, summed over positions instead of averaged."""
        settings = self.settings
        if settings.tail_mode == "shape" and getattr(rows.batch["targets"], "basis", True) is None:
            settings = replace(settings, tail_mode=None)  # held-out rows have a bucket
        ones = torch.ones(len(set(_DIVISOR.values())), dtype=torch.long, device=rows.batch["labels"].device)
        return self.loss(model, rows, settings, ones)

    def add(self, parts: dict[str, Tensor], batch: Batch) -> None:
        """Take what `part_sums` returned for a batch, which may be that of the CPU."""
        counts = to_device(self.loss.position_counts(batch), parts["ce"].device)
        sums = torch.stack([parts[name].detach() for name in self.loss.part_names])
        self._batches.append(torch.cat([sums.double(), counts.double()]))

    def totals(self, counted: list[bool], finite_only: bool) -> Tensor:
        """Sums and counts of the batches that count; with `finite_only` of those whose sums are numbers."""
        kept = torch.stack(self._batches)[torch.tensor(counted, device=self._batches[0].device)]
        if finite_only and bool((finite := kept.isfinite().all(1)).any()):
            kept = kept[finite]
        return kept.sum(0)

    def means(self, totals: Tensor) -> dict[str, float]:
        """Name -> mean, of the totals of all processes; "loss" is their weighted sum."""
        names = self.loss.part_names
        sums, counts = totals[: len(names)], totals[len(names) :].clamp(min=1)
        found = {name: float(sums[i] / counts[_DIVISOR[name]]) for i, name in enumerate(names)}
        settings = self.settings
        weights = {"kd": settings.kd_weight * settings.temperature**2, "ce": settings.ce_weight}
        if self.loss.matching is not None:
            weights |= self.loss.matching.weights
        left_out = {"coverage"} if self.loss.mode == "online" else set()
        if not totals[len(names)]:
            left_out = {"kd", "coverage", "agreement"}  # no position has a target
        loss = sum(weight * found[name] for name, weight in weights.items() if name not in left_out)
        return {"loss": loss, **{name: value for name, value in found.items() if name not in left_out}}
