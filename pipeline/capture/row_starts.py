"""What a BOS in front of the rows that continue a document is worth to the teacher, in nats.

A row that continues a document lacks the tokens before it, and with them the BOS that a teacher may have been trained
with, without which it is much worse. `corpus.row_bos` decides; here the teacher runs over a few such rows both ways.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from ..corpus.labels import IGNORE, LOSS_MASK, labels_of
from ..corpus.rows import Int64Array, PackedRows
from ..corpus.tokenizer import TOKENIZER, bos_tokens
from ..models.loading import load_tokenizer
from ..models.teacher import Teacher
from ..targets.supports import Support
from .teacher_pass import TeacherPass

logger = logging.getLogger(__name__)

_POSITIONS, _ROWS = 1024, 4
"""At least so many of each: the same tokens are predicted both ways, so that a few tell 0.05 nats."""
_WARN_NATS = 0.05


@dataclass(frozen=True)
class RowStarts:
    """The teacher's loss on documents that a row continues, with a BOS in front of the row and without."""

    bos: str
    rows: int
    labels: int
    chosen: bool
    """Whether the rows have it."""
    nats_with: float
    nats_without: float
    """Mean over the labels."""

    @property
    def cost(self) -> float:
        """Nats that the choice made costs; below 0 where it is the better one."""
        difference = self.nats_with - self.nats_without
        return difference if self.chosen else -difference

    def __str__(self) -> str:
        return (
            f"documents that go on in a new row: the teacher's loss is {self.nats_with:.3f} nats with {self.bos!r} in "
            f"front of the row, {self.nats_without:.3f} without ({self.rows} rows)"
        )


def log_row_starts(teacher: Teacher, corpus: PackedRows, batch_rows: int) -> RowStarts | None:
    """Measure (`measure_row_starts`), say so, and warn in one line where the choice made costs more than 0.05 nats."""
    found = measure_row_starts(teacher, corpus, batch_rows)
    if found is None:
        return None
    if found.cost > _WARN_NATS:
        remedy = "never" if found.chosen else "always"
        logger.warning(
            f"warning: {found}: the rows are prepared {'with' if found.chosen else 'without'} it, which costs "
            f"{found.cost:.2f} nats: set corpus.row_bos = '{remedy}' and another run_dir"
        )
    else:
        logger.info(str(found))
    return found


def measure_row_starts(teacher: Teacher, corpus: PackedRows, batch_rows: int) -> RowStarts | None:
    """Run the teacher over a few rows both ways; None for masked rows, for a tokenizer without BOS, and for a corpus
    without such rows.

    A row without the BOS starts with the next token; a row that gets one loses as many tokens at its end.
    """
    tokenizer = load_tokenizer(str(corpus.local / TOKENIZER))
    start = np.asarray(corpus.row_start or bos_tokens(tokenizer), np.int64)
    if corpus.objective == "masked" or not len(start) or corpus.row_length < len(start) + 2:
        return None
    rows, chosen = _continuing_rows(corpus, start)
    if not len(rows):
        return None
    columns = corpus.columns(rows)
    ids, segments = columns["input_ids"].astype(np.int64), columns["segment_ids"].astype(np.int64)
    labels = np.where(segments == 0, labels_of(columns), IGNORE)
    size = len(start)
    bare = slice(size, None) if chosen else slice(None, -size)
    ids, segments, labels = ids[:, bare], segments[:, bare], labels[:, bare]
    count = int((labels != IGNORE).sum())
    if not count:
        return None
    with_start = [
        np.concatenate([np.broadcast_to(front, (len(rows), size)), values], 1)
        for front, values in ((start, ids), (np.zeros(size, np.int64), segments), (np.full(size, IGNORE), labels))
    ]
    nats = [_nats(teacher, variant, batch_rows) / count for variant in (with_start, [ids, segments, labels])]
    return RowStarts(tokenizer.decode(start.tolist()), len(rows), count, chosen, *nats)


def _continuing_rows(corpus: PackedRows, start: Int64Array) -> tuple[Int64Array, bool]:
    """Some rows, spread over the corpus, that continue a document, and whether they begin with `start`."""
    wanted = max(-(-_POSITIONS // corpus.row_length), _ROWS)
    rows = np.unique(np.linspace(0, corpus.rows - 1, min(4 * wanted, corpus.rows)).astype(np.int64))
    columns = corpus.columns(rows)
    begins = (columns["input_ids"][:, : len(start)] == start).all(1)
    # Where it was put in front of a row, the token after it is not learned.
    inserted = begins & (columns[LOSS_MASK][:, len(start)] == 0) if corpus.row_start else np.zeros_like(begins)
    found: Int64Array = rows[inserted if inserted.any() else ~begins]
    some: Int64Array = found[np.linspace(0, len(found) - 1, min(wanted, len(found))).astype(np.int64)]
    return some, bool(inserted.any())


def _nats(teacher: Teacher, variant: list[Int64Array], batch_rows: int) -> float:
    """The teacher's loss summed over the labels of rows, given as ids, segment ids and labels [B, L]."""
    run = TeacherPass(teacher, Support("topk", k=1), (1.0,))
    tensors = [torch.from_numpy(np.ascontiguousarray(values)) for values in variant]
    return sum(
        float(run(*(part[first : first + batch_rows] for part in tensors)).nats_B.sum())
        for first in range(0, len(tensors[0]), batch_rows)
    )
