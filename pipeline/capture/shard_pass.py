"""The loop over the shards of a cache: run the teacher, encode, commit."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.background import Background
from ..base.errors import RecipeError
from ..base.progress import Meter, duration
from ..corpus.labels import IGNORE, IntArray
from ..corpus.rows import PackedRows
from ..models.teacher import Teacher
from ..store.arrays import Arrays
from ..store.writer import CacheWriter
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import row_seeds
from .teacher_pass import TeacherPass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardOutput:
    """The teacher's output for the rows of one shard. On a GPU, targets and losses may still be computing."""

    targets: SparseTargets
    """[rows, L]"""
    input_ids: IntArray
    """[rows, L]"""
    nats_B: Tensor
    """The teacher's loss on the labels, summed over each row."""
    signals: Arrays
    """Encoded signals, by the names of their stored arrays."""


def fill_shards(
    teacher: Teacher, corpus: PackedRows, writer: CacheWriter, *, batch_rows: int, task: int = 0, num_tasks: int = 1
) -> None:
    """Fill the shards of this task that are not committed yet.

    Batches never cross shards, so the bytes do not depend on where an earlier run stopped. The codec learns from the
    first shard: the first task that starts runs the teacher over it, even where another task writes it.

    Raises RecipeError where the teacher's output is no distribution.
    """
    manifest = writer.manifest
    own = len(range(task, manifest.num_shards, num_tasks))
    pending = writer.pending(task, num_tasks)
    which = f" of task {task} of {num_tasks}" if num_tasks > 1 else ""
    logger.info(f"cache: {writer.path}: {own - len(pending)} of {own} shards{which} found, {len(pending)} to do")
    first = None if writer.begun or not manifest.num_shards else 0
    shards = {*pending, *([] if first is None else [first])}
    rows = sum(stop - start for start, stop in map(manifest.shard_range, shards))
    signals = [signal.name for signal in manifest.signals]
    run = TeacherPass(teacher, manifest.codec.support, manifest.codec.knots, signals)
    with Meter(f"cache: {writer.path}", rows * manifest.row_length) as meter:
        learned_from = None
        if not writer.begun:
            codec = manifest.codec
            if first is not None:
                learned_from = _run_shard(run, corpus, writer, first, batch_rows, meter, "first shard")
                _check_numbers(learned_from.targets, learned_from.nats_B, first)
                codec = codec.learn(
                    learned_from.targets.trim(), learned_from.input_ids, corpus.rows * corpus.row_length
                )
            writer.begin(codec)
        write_in_background = _has_spare_core(teacher) or not isinstance(writer.path, Path)
        with Background() as background:
            for number, shard in enumerate(pending, 1):
                output = learned_from if shard == first else None
                if output is None:
                    note = f"shard {number} of {len(pending)}"
                    output = _run_shard(run, corpus, writer, shard, batch_rows, meter, note)
                write = partial(_write, writer, corpus, shard, output, _recorded(output.targets.mask.device))
                if write_in_background:
                    background.add(write)
                else:
                    write()
                learned_from = None
                del output, write  # free their memory before the next shard is computed
        if pending:
            logger.info(f"cache: {writer.path}: {len(pending)} shards written in {duration(meter.seconds)}")


def _run_shard(
    run: TeacherPass, corpus: PackedRows, writer: CacheWriter, shard: int, batch_rows: int, meter: Meter, note: str
) -> ShardOutput:
    manifest = writer.manifest
    start, stop = manifest.shard_range(shard)
    parts, nats, ids = [], [], []
    signals: dict[str, list[Any]] = {}
    for first in range(start, stop, batch_rows):
        rows_B = np.arange(first, min(first + batch_rows, stop))
        input_ids, segment_ids, labels = corpus.examples(rows_B)
        result = run(
            torch.from_numpy(input_ids).long(),
            torch.from_numpy(segment_ids).long(),
            torch.from_numpy(labels),
            seeds=row_seeds(manifest.identity.get("seed", 0), rows_B, manifest.row_length),
            mask=torch.from_numpy(manifest.target_mask(labels, segment_ids)),
        )
        parts.append(result.targets)
        ids.append(input_ids)
        nats.append(result.nats_B)
        for signal in manifest.signals:
            for name, values in signal.encode(result.signals[signal.name]).items():
                signals.setdefault(name, []).append(values)
        meter.advance(input_ids.size, note)
    arrays = {name: np.concatenate(values) for name, values in signals.items()}
    return ShardOutput(SparseTargets.cat(parts), np.concatenate(ids), torch.cat(nats), arrays)


def _write(
    writer: CacheWriter, corpus: PackedRows, shard: int, output: ShardOutput, computed: torch.cuda.Event | None
) -> None:
    """Encode and commit a shard, on any thread; on a GPU after the event `computed`."""
    targets, nats_B = output.targets, output.nats_B
    if computed is not None:
        # A separate stream waits for this shard only, not for the next one.
        stream = torch.cuda.Stream(targets.mask.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(computed)
            targets, nats_B = targets.to("cpu", non_blocking=True), nats_B.to("cpu", non_blocking=True)
        stream.synchronize()
    _check_numbers(targets, nats_B, shard)
    start, stop = writer.manifest.shard_range(shard)
    labels = corpus.labels(np.arange(start, stop)) if writer.manifest.objective == "masked" else None
    count = None if labels is None else int((labels != IGNORE).sum())
    # fsum is exact, so the sum does not depend on the batch size.
    nats = math.fsum(nats_B.tolist())
    writer.write(shard, targets.trim(), output.input_ids, corpus.digest(start, stop), nats, output.signals, count)


def _has_spare_core(teacher: Teacher) -> bool:
    """Whether encoding may overlap with the teacher's next shard.

    Where the teacher uses every core, each matrix product waits for the thread that encoding delays: on two cores stage
    one took 1.16 times the bare forward with overlap and 1.04 without.
    """
    if teacher.placement.device.type != "cpu":
        return True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.get_num_threads() < cores


def _check_numbers(targets: SparseTargets, nats_B: Tensor, shard: int) -> None:
    """Raise RecipeError for logits that are no distribution: after quantisation nobody could tell."""
    first_BL, curve_BLC = targets.log_probs[..., 0], targets.tail_curve
    # -inf is valid: an empty tail, or the first entry of a support without a head.
    numbers_BL = (first_BL < torch.inf) & (curve_BLC < torch.inf).all(-1)
    wrong = int((targets.mask & ~numbers_BL).sum())
    if wrong:
        raise RecipeError(
            f"the teacher's logits are not finite numbers at {wrong} of {int(targets.mask.sum())} positions of shard {shard}: "
            "set another teacher.dtype, float16 may have overflowed"
        )
    if not torch.isfinite(nats_B).all():
        raise RecipeError(
            f"the teacher gives a token of shard {shard} probability 0: is it the right model and tokenizer for this text?"
        )


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event that marks the end of the work queued on a GPU so far; None for a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
