"""The loop over the shards of a cache: run the teacher, encode, commit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..base.background import Background
from ..base.processes import cores
from ..base.progress import Meter, duration
from ..corpus.labels import Columns, labels_of
from ..corpus.rows import PackedRows
from ..models.teacher import Teacher
from ..store.draft import ShardDraft
from ..store.manifest import Manifest
from ..store.writer import CacheWriter
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import row_seeds
from .learning import learn
from .teacher_pass import TeacherPass, check_numbers

logger = logging.getLogger(__name__)


_PIECE_POSITIONS = 2**15
"""Positions that are encoded together, while the teacher computes the next ones."""
_PIECE_BYTES = 2**28
"""Memory of their targets and signals. At most three pieces exist: one is computed, one waits, one is encoded."""


@dataclass(frozen=True)
class Piece:
    """The teacher's output for some rows of one shard. On a GPU, targets and losses may still be computing."""

    rows: range
    """Their numbers in the corpus."""
    targets: SparseTargets
    """[rows, L]"""
    columns: Columns
    """Of the corpus, [rows, L]."""
    nats_B: Tensor
    """The teacher's loss on the labels, summed over each row."""
    signals: dict[str, Tensor]
    """Rounded signals [rows, L, ...], by the names of their stored arrays."""


def fill_shards(
    teacher: Teacher,
    corpus: PackedRows,
    writer: CacheWriter,
    *,
    batch_rows: int,
    task: int = 0,
    num_tasks: int = 1,
) -> None:
    """Fill the shards of this task that are not committed yet.

    Batches never cross shards, so the bytes do not depend on where an earlier run stopped. The first task that starts
    learns what the cache needs before its first shard (`learning`).

    Raises RecipeError where the teacher's output is no distribution.
    """
    if not writer.begun:
        writer.begin(*learn(teacher, corpus, writer.manifest, f"cache: {writer.path}"))
    manifest, stored = writer.manifest, writer.basis()
    own = len(range(task, manifest.num_shards, num_tasks))
    pending = writer.pending(task, num_tasks)
    which = f" of task {task} of {num_tasks}" if num_tasks > 1 else ""
    logger.info(f"cache: {writer.path}: {own - len(pending)} of {own} shards{which} found, {len(pending)} to do")
    rows = sum(stop - start for start, stop in map(manifest.shard_range, pending))
    signals = [signal.name for signal in manifest.signals]
    run = TeacherPass(teacher, manifest.codec.support, manifest.codec.knots, signals, stored)
    with ExitStack() as opened:
        meter = opened.enter_context(Meter(f"cache: {writer.path}", rows * manifest.row_length))
        drafts: list[ShardDraft] = []
        opened.callback(_close, drafts)
        background = opened.enter_context(Background(_device_of_thread(teacher.placement.device)))
        write_in_background = _has_spare_core(teacher) or not isinstance(writer.path, Path)
        copies = _copy_stream(teacher.placement.device)
        add = background.add if write_in_background else lambda job: job()
        for number, shard in enumerate(pending, 1):
            note = f"shard {number} of {len(pending)}"
            draft = writer.draft(shard)
            drafts[:] = [*(open_one for open_one in drafts if not open_one.closed), draft]
            for piece in _run_shard(run, corpus, manifest, shard, batch_rows, meter, note):
                add(partial(_write, draft, piece, _recorded(piece.targets.mask.device), copies))
                del piece  # free its memory before the next one is computed
            add(partial(writer.commit, draft))
    if pending:
        logger.info(f"cache: {writer.path}: {len(pending)} shards written in {duration(meter.seconds)}")


def _close(drafts: list[ShardDraft]) -> None:
    for draft in drafts:
        draft.close()


def _run_shard(
    run: TeacherPass, corpus: PackedRows, manifest: Manifest, shard: int, batch_rows: int, meter: Meter, note: str
) -> Iterator[Piece]:
    """The teacher over the rows of a shard; a piece has whole batches."""
    start, stop = manifest.shard_range(shard)
    positions = min(_PIECE_POSITIONS, _PIECE_BYTES // _position_bytes(manifest))
    batches = max(positions // (batch_rows * manifest.row_length), 1)
    for begin in range(start, stop, batches * batch_rows):
        end = min(begin + batches * batch_rows, stop)
        parts, nats = [], []
        signals: dict[str, list[Tensor]] = {}
        columns = corpus.columns(np.arange(begin, end))
        labels = labels_of(columns)
        for first in range(begin, end, batch_rows):
            rows_B = np.arange(first, min(first + batch_rows, end))
            here = slice(first - begin, first - begin + len(rows_B))
            segment_ids = columns["segment_ids"][here]
            result = run(
                torch.from_numpy(columns["input_ids"][here]).long(),
                torch.from_numpy(segment_ids).long(),
                torch.from_numpy(labels[here]),
                seeds=row_seeds(manifest.identity.get("seed", 0), rows_B, manifest.row_length),
                mask=torch.from_numpy(manifest.target_mask(labels[here], segment_ids)),
            )
            parts.append(result.targets)
            nats.append(result.nats_B)
            for signal in manifest.signals:
                for name, values in signal.rounded(result.signals[signal.name]).items():
                    signals.setdefault(name, []).append(values)
            meter.advance(segment_ids.size, note)
        rounded = {name: torch.cat(values) for name, values in signals.items()}
        yield Piece(range(begin, end), SparseTargets.cat(parts), columns, torch.cat(nats), rounded)


def _position_bytes(manifest: Manifest) -> int:
    """Memory of one position's targets and signals between the teacher and the encoding."""
    codec = manifest.codec
    entry = 20 if codec.support.has_samples else 12  # id, log-probability, draws
    others = len(codec.knots) + 8 + (0 if codec.coordinates is None else codec.coordinates.rank)
    signals = sum(signal.bytes_per_position for signal in manifest.signals)
    return entry * min(codec.support.entry_limit, codec.vocab_size) + 4 * others + signals


def _write(
    draft: ShardDraft, piece: Piece, computed: torch.cuda.Event | None, copies: torch.cuda.Stream | None
) -> None:
    """Encode a piece of a shard, on any thread; on a GPU after the event `computed`, copied by the stream `copies`."""
    targets, nats_B, signals = piece.targets, piece.nats_B, piece.signals
    if computed is not None and copies is not None:
        # The stream waits for this piece only, not for the next one.
        with torch.cuda.stream(copies):
            copies.wait_event(computed)
            targets, nats_B = targets.to("cpu", non_blocking=True), nats_B.to("cpu", non_blocking=True)
            signals = {name: values.to("cpu", non_blocking=True) for name, values in signals.items()}
        copies.synchronize()
    check_numbers(targets, nats_B, piece.rows, f"shard {draft.shard} of {draft.cache}")
    arrays = {name: values.numpy() for name, values in signals.items()}
    draft.add(targets.trim(), piece.columns, nats_B.tolist(), arrays)


def _device_of_thread(device: torch.device) -> Callable[[], None] | None:
    """Threads begin with the first GPU as the current one, where each process would take memory for nothing."""
    return partial(torch.cuda.set_device, device) if device.type == "cuda" and device.index is not None else None


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _has_spare_core(teacher: Teacher) -> bool:
    """Whether encoding may overlap with the teacher's next shard.

    Where the teacher uses every core, each matrix product waits for the thread that encoding delays: on two cores stage
    one took 1.16 times the bare forward with overlap and 1.04 without.
    """
    if teacher.placement.device.type != "cpu":
        return True
    return torch.get_num_threads() < cores()


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event that marks the end of the work queued on a GPU so far; None for a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
