"""A student's gradient from any targets, compared with that from the teacher's full distribution, over one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distill.fused import fused_loss, fused_online_loss
from ..distill.loss_settings import LossSettings
from ..models.output_layer import OutputLayer
from ..models.placement import input_device
from ..models.rows import body_hidden
from ..models.teacher import Teacher
from ..targets.sparse_targets import SparseTargets


class GradientProbe:
    """One forward pass of a student over rows [B, L]; its graph serves the gradients of all settings.

    `batch["mask"]` [B, L] marks the positions with a target.
    """

    def __init__(self, student: Any, batch: Mapping[str, Any], teacher_hidden_BLD: Tensor) -> None:
        self._output_layer = OutputLayer.of(student)
        device = input_device(student)
        self._weights = [weight for weight in student.parameters() if weight.requires_grad]
        self._hidden_BLD = body_hidden(student, batch["input_ids"].to(device), batch["segment_ids"].to(device))
        self._labels_BL, self._mask_BL = batch["labels"].to(device), batch["mask"].to(device)
        self._teacher_hidden_ND = teacher_hidden_BLD.flatten(0, 1)

    def gradient(
        self, targets: SparseTargets | None, teacher: Teacher, temperature: float, tail: str | None = None
    ) -> list[Tensor]:
        """Gradient of the KD loss, by weight, for targets [B or more, L] or, for None, the full distribution."""
        hidden, labels, layer = self._hidden_BLD, self._labels_BL, self._output_layer
        settings = LossSettings(temperature, tail_mode=tail)
        if targets is None:

            def logits(rows: slice) -> Tensor:
                with torch.no_grad():
                    return teacher.output_layer.logits(self._teacher_hidden_ND[rows].to(teacher.placement.device))

            output = fused_online_loss(hidden, layer, logits, self._mask_BL, labels, settings)
        else:
            on_rows = targets[: len(labels)].to(hidden.device).restrict_vocabulary(layer.weight.shape[0])
            output = fused_loss(hidden, layer, on_rows, labels, settings)
        gradients = torch.autograd.grad(output.loss, self._weights, allow_unused=True, retain_graph=True)
        return [gradient for gradient in gradients if gradient is not None]


def compare_gradients(gradients: list[Tensor], full: list[Tensor]) -> tuple[float, float]:
    """Angle in degrees between two gradients, and the first one's length over the second's."""
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(gradients, full, strict=True))
    lengths = [math.sqrt(sum(float(part.double().square().sum()) for part in parts)) for parts in (gradients, full)]
    cosine = dot / max(lengths[0] * lengths[1], 1e-300)
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0))), lengths[0] / max(lengths[1], 1e-300)
