"""Tokens -> packed rows in an Arrow file, staged and published as a whole (see `rows` for what is on disk)."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..base.durable import file_digest, publish_directory, staging_path
from ..base.places import Place, files_in
from .labels import IGNORE, LABELS, LOSS_MASK, PADDING, IntArray, labels_of, row_bytes
from .masking import Framer, Masking, mask_rows
from .packers import EndToEnd, Packer, RowBlock, places_of
from .rows import CHECKSUMS, DATA, META, ROWS_PER_BATCH, row_checksum
from .source_record import SOURCES


class RowWriter:
    """Packs documents into rows, streams them to an Arrow file in a staging directory, and publishes it by `commit`."""

    def __init__(
        self,
        path: Place,
        row_length: int,
        limit: int | None = None,
        masked: bool = False,
        masking: Masking | None = None,
        packer: Callable[[], Packer] | None = None,
    ) -> None:
        """At most `limit` rows. `masked`: rows carry a loss mask; `masking`: documents are framed and tokens hidden.
        `packer` makes what packs the documents, by default end to end."""
        self.path, self._row_length, self._limit = path, row_length, limit
        self._masking = masking
        if masking is not None:
            self._new_packer: Callable[[], Packer] = lambda: Framer(row_length, masking)
        else:
            self._new_packer = packer or (lambda: EndToEnd(row_length))
        kinds = {"input_ids": "int32", "segment_ids": "int32"}
        if masked or masking is not None:
            kinds |= {LOSS_MASK: "int8"} if masking is None else {LABELS: "int32"}
        self._features = {
            name: {"feature": {"dtype": kind, "_type": "Value"}, "length": row_length, "_type": "List"}
            for name, kind in kinds.items()
        }
        info = json.dumps({"info": {"features": self._features}})  # `datasets` reads its features there
        columns = {name: pa.list_(pa.type_for_alias(kind), row_length) for name, kind in kinds.items()}
        self._schema = pa.schema(columns, metadata={"huggingface": info})
        self.staged = staging_path(path)
        self._writer: Any = None
        self.restart()

    def restart(self) -> None:
        self.discard()
        self.staged.mkdir(parents=True)
        self._writer = pa.ipc.new_stream(str(self.staged / DATA), self._schema)
        self.packer = self._new_packer()
        self._waiting: list[RowBlock] = []
        self.rows = 0
        """Packed so far."""
        self._written = 0
        self._sha = hashlib.sha256()
        self._checksums: list[int] = []
        self.documents = self.tokens = 0
        """Added."""
        self.learned = self.padding = 0
        """Positions with a label and positions of padding in the rows that are written."""

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._limit is not None and self.rows >= self._limit

    @property
    def missing(self) -> float:
        """Tokens up to the limit, infinite without one."""
        if self._limit is None:
            return math.inf
        return max((self._limit - self.rows) * self._row_length - self.packer.left, 0 if self.full else 1)

    def add(self, tokens: IntArray, loss_mask: IntArray | None = None, lengths: IntArray | None = None) -> None:
        """Append documents end to end, tokens [N] and loss mask [N], of these lengths; without a mask all tokens are
        learned, without lengths they are one document. What follows the last row of the limit does not count.
        """
        mask = np.ones(len(tokens), np.int32) if loss_mask is None else loss_mask
        lengths = np.array([len(tokens)]) if lengths is None else lengths
        may_end = self._limit is not None and (
            self.rows + self.packer.most_rows(len(tokens), len(lengths)) >= self._limit
        )
        if not may_end:
            self._add(tokens, mask, lengths)
            return
        for number, place in enumerate(places_of(lengths, len(tokens))):
            if self.full:
                break
            self._add(tokens[place], mask[place], lengths[number : number + 1])

    def _add(self, tokens: IntArray, loss_mask: IntArray, lengths: IntArray) -> None:
        self.documents += len(lengths)
        self.tokens += len(tokens)
        for block in self.packer.add(tokens, loss_mask, lengths):
            self._append(block)
            if self.full:
                break

    def finish(self) -> None:
        """Write all rows, those too that are still open. No document may follow."""
        if not self.full:
            for block in self.packer.finish():
                self._append(block)
                if self.full:
                    break
        self._flush(1)

    def _append(self, block: RowBlock) -> None:
        """Append rows, up to the limit."""
        if self._limit is not None:
            room = self._limit - self.rows
            block = (block[0][:room], block[1][:room], block[2][:room])
        self._waiting.append(block)
        self.rows += len(block[0])
        if self.rows - self._written >= ROWS_PER_BATCH:
            self._flush(ROWS_PER_BATCH)

    def commit(self, settings: dict[str, Any], row_start: Sequence[int] = ()) -> None:
        """Publish the rows. `row_start`: the tokens with which rows begin that continue a document."""
        self.finish()
        self._writer.close()
        self._writer = None
        meta = {
            "settings": settings,
            "rows": self._written,
            "row_length": self._row_length,
            "documents": self.documents,
            "row_start": list(row_start),
            "digest": self._sha.hexdigest(),
        }
        files = {
            "dataset_info.json": {"features": self._features},
            "state.json": {
                "_data_files": [{"filename": DATA}],
                "_fingerprint": self._sha.hexdigest()[:16],
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            },
        }
        for name, value in files.items():
            (self.staged / name).write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
        np.array(self._checksums, "<u4").tofile(self.staged / CHECKSUMS)
        written = {
            name: {"size": size, "sha256": file_digest(self.staged / name)}
            for name, size in files_in(self.staged).items()
            if name != SOURCES  # times of files, which are no part of what the corpus is
        }
        content = json.dumps({**meta, "files": written}, indent=1, sort_keys=True).encode()
        (self.staged / META).write_bytes(content)
        publish_directory(self.staged, self.path, last=META)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        shutil.rmtree(self.staged, ignore_errors=True)

    def _flush(self, multiple: int) -> None:
        """Write the waiting rows, in a multiple of `multiple`, and keep the rest."""
        if not self._waiting:
            return
        columns = [np.concatenate(parts) for parts in zip(*self._waiting, strict=True)]
        whole = len(columns[0]) // multiple * multiple
        for first in range(0, whole, ROWS_PER_BATCH):
            part = slice(first, min(first + ROWS_PER_BATCH, whole))
            self.write_rows(*(column[part] for column in columns))
        tokens, segments, loss_mask = (column[whole:] for column in columns)
        self._waiting = [(tokens, segments, loss_mask)]

    def write_rows(self, tokens: IntArray, segments: IntArray, loss_mask: IntArray) -> None:
        """Write complete rows [B, L], at most one Arrow batch; every batch but the last must be full."""
        segments = np.where(segments == PADDING, PADDING, segments - segments[:, :1])  # from 0 in every row
        third = loss_mask
        if self._masking is not None:
            tokens, third = mask_rows(tokens, self._written, self._masking)
        columns = [tokens, segments, third][: len(self._schema)]
        batch = [
            pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), self._row_length)
            for values, kind in zip(columns, self._schema.types, strict=True)
        ]
        self._writer.write_batch(pa.record_batch(batch, schema=self._schema))
        self._written += len(tokens)
        named = dict(zip(self._schema.names, columns, strict=True))
        self.padding += int((segments == PADDING).sum())
        self.learned += int((labels_of(named) != IGNORE).sum())
        self._sha.update(row_bytes(named))
        self._checksums += [row_checksum(row_CL) for row_CL in np.stack(columns, 1)]
