"""Rows of a corpus for the fidelity table, with what the teacher makes of them, and students of its layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..capture.teacher_pass import check_numbers
from ..corpus.labels import Columns, labels_of, target_mask
from ..corpus.rows import Int64Array, PackedRows
from ..models.rows import body_hidden
from ..models.student_layers import student_from_layers
from ..models.teacher import Teacher
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support, row_seeds
from .target_error import States

_CHUNK = 64
"""Positions whose logits are reduced at once, for all supports."""


@dataclass(frozen=True)
class Sample:
    """Some rows with the states of the teacher."""

    rows: Int64Array
    """Their numbers in the corpus."""
    columns: Columns
    labels_BL: Tensor
    mask_BL: Tensor
    """Positions with a target."""
    hidden_BLD: Tensor
    """That the teacher's output layer reads; in main memory."""
    seconds: float
    """Of the teacher's pass."""

    @property
    def states(self) -> Tensor:
        """The teacher's states [N, D] at the positions with a target."""
        return self.hidden_BLD[self.mask_BL]


def split_rows(rows: int, learned: int, measured: int) -> tuple[Int64Array, Int64Array]:
    """Rows to learn from and rows to measure on, both spread over a corpus of `rows`; of a smaller one in proportion.

    One row serves both.
    """
    spread = np.unique(np.linspace(0, rows - 1, min(learned + measured, rows)).astype(np.int64))
    count = max(len(spread) * measured // (learned + measured), 1)
    chosen = np.zeros(len(spread), bool)
    chosen[((np.arange(count) + 0.5) * len(spread) / count).astype(np.int64)] = True
    return spread[~chosen] if len(spread) > 1 else spread, spread[chosen]


def run_teacher(teacher: Teacher, corpus: PackedRows, rows: Int64Array, batch_rows: int, targets_on: str) -> Sample:
    """The sample of these rows."""
    columns = corpus.columns(rows)
    labels = labels_of(columns)
    mask = target_mask(labels, columns["segment_ids"], targets_on if corpus.objective == "masked" else None)
    start = time.perf_counter()
    hidden_BLD = _hidden(teacher.model, columns, batch_rows, teacher)
    return Sample(
        rows, columns, torch.from_numpy(labels), torch.from_numpy(mask), hidden_BLD, time.perf_counter() - start
    )


def student_states(teacher: Teacher, sample: Sample, layers: int | list[int], batch_rows: int) -> States:
    """States of a student of some of the teacher's layers, which has the teacher's output layer, at the positions of a
    sample that have a target. Raises RecipeError as `student_from_layers`."""
    student = student_from_layers(teacher.model, layers).to(teacher.placement.device).eval()
    hidden_BLD = _hidden(student, sample.columns, batch_rows, teacher)
    return States(hidden_BLD[sample.mask_BL].to(teacher.placement.device), teacher.output_layer)


@torch.inference_mode()
def _hidden(model: object, columns: Columns, batch_rows: int, teacher: Teacher) -> Tensor:
    ids, segments = (torch.from_numpy(columns[name]).long() for name in ("input_ids", "segment_ids"))
    device, parts = teacher.placement.device, []
    for first in range(0, len(ids), batch_rows):
        some = slice(first, first + batch_rows)
        parts.append(body_hidden(model, ids[some].to(device), segments[some].to(device)).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def reduce_sample(
    teacher: Teacher, sample: Sample, supports: Sequence[Support], knots: tuple[float, ...], seed: int
) -> tuple[dict[Support, SparseTargets], float]:
    """Targets [B, L] of the sample by support, and the seconds of the first. The logits are computed once.

    Raises RecipeError where the teacher's output is no distribution.
    """
    shape = sample.mask_BL.shape
    hidden_ND, mask_N, labels_N = (x.flatten(0, 1) for x in (sample.hidden_BLD, sample.mask_BL, sample.labels_BL))
    seeds_N = row_seeds(seed, sample.rows, shape[1]).flatten()
    parts: dict[Support, list[SparseTargets]] = {support: [] for support in supports}
    seconds = 0.0
    for first in range(0, len(hidden_ND), _CHUNK):
        some = slice(first, first + _CHUNK)
        start = time.perf_counter()
        logits_NV = teacher.output_layer.logits(hidden_ND[some].to(teacher.placement.device))
        mask, labels = (x[some].to(logits_NV.device) for x in (mask_N, labels_N))
        for support, found in parts.items():
            targets = SparseTargets.from_logits(logits_NV, support=support, knots=knots, seed=seeds_N[some], mask=mask)
            found.append(targets.to("cpu"))
            if support == supports[0]:
                seconds += time.perf_counter() - start
        log_p_N = logits_NV.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        label_log_probs = torch.where(labels >= 0, log_p_N, 0.0).cpu()
        for found in parts.values():
            found[-1] = replace(found[-1], label_log_probs=label_log_probs)
    whole = {support: SparseTargets.cat(found).unflatten(tuple(shape)).trim() for support, found in parts.items()}
    for targets in whole.values():
        check_numbers(targets, torch.zeros(shape[0]), sample.rows, "plan")
    return whole, seconds


def at_knots(targets: SparseTargets, knots: tuple[float, ...]) -> SparseTargets:
    """The same targets with some of their knots."""
    places = [targets.knots.index(knot) for knot in knots]
    return replace(targets, tail_curve=targets.tail_curve[..., places], knots=knots)
