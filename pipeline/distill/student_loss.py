"""The loss of a batch of rows, from a student's forward pass: distillation, labels, and matched layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..corpus.labels import IGNORE
from ..models.output_layer import OutputLayer
from ..models.packing import Pass, unwrap_peft
from ..models.placement import to_device
from ..models.rows import row_passes
from ..models.sizes import ModelSizes
from ..models.states import run_passes
from ..models.taps import Tap, visible_pair_count
from ..models.teacher import Teacher
from ..store.batch import Batch, map_batch
from .fused import fused_loss, fused_online_loss
from .loss import DistillationOutput
from .loss_settings import LossSettings
from .matching import Matching

PROJECTION = "distillation_projection"
"""Attribute of a student in training: the map to the teacher's width, trained with it."""
_PARTS = ("kd", "ce", "coverage", "agreement")


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on a student's device, with what depends on its values and so was found before it went there."""

    batch: Batch
    passes: list[Pass]
    """The rows as the student reads them."""
    learned_N: Tensor | None
    """Places of the positions that the output layer is needed for, in the flattened rows; None: all of them."""
    host_rows: tuple[Tensor, Tensor]
    """Token ids and segment ids [B, L] as they came, for a teacher beside the student."""


@dataclass(frozen=True)
class StudentLoss:
    """The loss of a student in one mode, "cached", "ce" or "online", with the losses of matched layers."""

    mode: str
    objective: str
    """causal or masked: what labels and targets predict."""
    uses_output_layer: bool
    """Whether KD or CE can have a weight in any step; otherwise the student skips its output layer."""
    chunk_size: int | None
    """Positions whose logits exist at once; None: what `fused` chooses for device and dtype."""
    matching: Matching | None = None
    teacher: Teacher | None = None
    """For mode "online"."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the loss's parts."""
        return _PARTS if self.matching is None else (*_PARTS, *self.matching.weights)

    def named(self, values: list[float]) -> dict[str, float]:
        """Values of the parts by name, without those that say nothing in this mode."""
        parts = dict(zip(self.part_names, values, strict=True))
        if self.mode == "ce":
            return {"ce": parts["ce"]}
        if self.mode == "online":
            del parts["coverage"]
        return parts

    def position_counts(self, batch: Batch) -> Tensor:
        """The divisors of the means: positions with a target and with a label [2].

        With matched layers also positions that are not padding, and pairs of positions that see each other [4].
        """
        counts = [batch["targets"].mask.sum(), (batch["labels"] != IGNORE).sum()]
        if self.matching is not None:
            segments = batch["segment_ids"]
            counts += [(segments >= 0).sum(), visible_pair_count(segments, causal=self.objective == "causal")]
        return torch.stack(counts)

    def on_device(self, model: Any, batch: Batch, settings: LossSettings, device: torch.device) -> DeviceBatch:
        """A batch of the CPU, also in page-locked memory, on the student's device: nobody waits for it there."""
        learned = None
        if self.objective == "masked" and self.mode != "online" and settings.divergence != "tail_aware_kl":
            # Most positions of masked rows can be without label and target: they skip the output layer.
            mask = batch["labels"] != IGNORE
            mask = mask if self.mode == "ce" else mask | batch["targets"].mask
            learned = to_device(mask.flatten().nonzero().squeeze(-1), device)
        rows = batch["input_ids"], batch["segment_ids"]
        moved = map_batch(batch, lambda value: value.to(device, non_blocking=True))
        return DeviceBatch(moved, row_passes(model, *rows, device), learned, rows)

    def __call__(
        self, model: Any, rows: DeviceBatch, settings: LossSettings, positions: Tensor | None
    ) -> dict[str, Tensor]:
        """The differentiable "loss" and its detached parts, by name.

        `positions`: the counts of the step, by default the batch's.
        """
        batch = rows.batch
        if self.matching is None:
            hidden = run_passes(unwrap_peft(model), rows.passes, batch["input_ids"].shape)
            return _parts(self._output_loss(model, hidden, rows, settings, positions))
        tap = Tap(self.matching.student_names())
        hidden = tap.hidden(model, batch["input_ids"], batch["segment_ids"], rows.passes)
        if self.uses_output_layer:
            result = _parts(self._output_loss(model, hidden, rows, settings, positions))
        else:
            zero = torch.zeros((), device=hidden.device)
            result = {"loss": zero, **dict.fromkeys(_PARTS, zero)}
        matched = self.matching.losses(
            tap.values,
            cast(dict[str, Any], batch),
            ModelSizes.of(unwrap_peft(model).config).heads or 0,
            getattr(model, PROJECTION, None),
            causal=self.objective == "causal",
            positions=None if positions is None else positions[2],
            pair_count=None if positions is None else positions[3],
        )
        for name, weight in self.matching.weights.items():
            result["loss"] = result["loss"] + weight * matched[name]
        return {**result, **{name: value.detach() for name, value in matched.items()}}

    def _output_loss(
        self, model: Any, hidden: Tensor, rows: DeviceBatch, settings: LossSettings, positions: Tensor | None
    ) -> DistillationOutput:
        batch, index_N = rows.batch, rows.learned_N
        layer, labels, targets = OutputLayer.of(model), batch["labels"], batch["targets"]
        counts: dict[str, Any] = {"chunk_size": self.chunk_size}
        if positions is not None:
            counts |= {"kd_positions": positions[0], "ce_positions": positions[1]}
        if self.mode == "online":
            teacher = self.teacher
            assert teacher is not None
            teacher_hidden_ND = teacher.hidden(*rows.host_rows).flatten(0, 1)

            def teacher_logits(some: slice) -> Tensor:
                return teacher.output_layer.logits(teacher_hidden_ND[some])

            return fused_online_loss(hidden, layer, teacher_logits, targets.mask, labels, settings, **counts)
        if index_N is not None:
            hidden, labels, targets = (
                hidden.flatten(0, 1)[index_N],
                labels.flatten()[index_N],
                targets.flatten()[index_N],
            )
        if self.mode == "ce":
            return fused_loss(hidden, layer, None, labels, settings, **counts)
        targets = targets.restrict_vocabulary(layer.weight.shape[0])
        return fused_loss(hidden, layer, targets, labels, settings, **counts)


def _parts(output: DistillationOutput) -> dict[str, Tensor]:
    return {"loss": output.loss, **{name: getattr(output, name) for name in _PARTS}}
