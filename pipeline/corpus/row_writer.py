"""Documents -> packed rows in an Arrow file, staged and then published, alone or as a whole corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base.durable import file_digest, publish_file, remove_tree, staging_path
from ..base.places import Place
from .corpus_files import DATA, data_name, publish_corpus
from .labels import LABELS, LOSS_MASK, IntArray
from .masking import Framer, Masking, mask_rows
from .packers import EndToEnd, Packer, RowBlock, places_of
from .row_file import ROWS_PER_BATCH, RowFile, features_of, stored_columns
from .tokenizer import TOKENIZER


class RowWriter:
    """Packs documents into rows and streams them to an Arrow file in a staging directory."""

    def __init__(
        self,
        path: Place,
        row_length: int,
        limit: int | None = None,
        masked: bool = False,
        masking: Masking | None = None,
        packer: Callable[[], Packer] | None = None,
        vocab_size: int | None = None,
        portion: int = 0,
    ) -> None:
        """At most `limit` rows. `masked`: rows carry a loss mask; `masking`: documents are framed and tokens hidden, by
        draws for this `portion`. `packer` makes what packs the documents, by default end to end. `vocab_size`: tokens are
        below it, where that is known."""
        self.path, self._row_length, self._limit = path, row_length, limit
        self._masking, self._portion = masking, portion
        if masking is not None:
            self.packer: Packer = Framer(row_length, masking)
        else:
            self.packer = packer() if packer is not None else EndToEnd(row_length)
        third = LABELS if masking is not None else LOSS_MASK if masked else None
        kinds = stored_columns(vocab_size, third)
        self._features = features_of(kinds, row_length)
        self.staged = staging_path(path / f"{DATA}-{portion:05}")
        """A directory for what is published with the rows."""
        self.staged.mkdir(parents=True)
        info = json.dumps({"info": {"features": self._features}})  # `datasets` reads its features there
        self._file = RowFile(self.staged / DATA, row_length, kinds, {"huggingface": info})
        self._waiting: list[RowBlock] = []
        self.rows = 0
        """Packed so far."""
        self.documents = self.tokens = 0
        """Added."""

    @property
    def learned(self) -> int:
        """Positions with a label in the rows that are written."""
        return self._file.learned

    @property
    def padding(self) -> int:
        """Positions of padding in the rows that are written."""
        return self._file.padding

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
        if self.rows - self._file.rows >= ROWS_PER_BATCH:
            self._flush(ROWS_PER_BATCH)

    def publish(self) -> dict[str, Any]:
        """Publish the file of the rows beside others; returns what `portions.json` says of it."""
        self.finish()
        facts = self._file.close()
        name = data_name(self._portion, facts["sha256"])
        target = self.path / name
        # A file of this name has this content, unless it was damaged: a whole one stays as it is.
        if not (isinstance(target, Path) and target.exists() and file_digest(target) == facts["sha256"]):
            publish_file(self.staged / DATA, target)
        return {"name": name, **facts}

    def commit(self, settings: dict[str, Any], row_start: Sequence[int] = ()) -> None:
        """Publish the rows as a whole corpus, with the tokenizer that is in `staged`. `row_start`: the tokens with which
        rows begin that continue a document."""
        meta = {
            "settings": settings,
            "row_length": self._row_length,
            "documents": self.documents,
            "row_start": list(row_start),
        }
        try:
            facts = self.publish()
            publish_corpus(self.path, meta, [facts], self._features, self.staged / TOKENIZER)
        finally:
            self.discard()

    def discard(self) -> None:
        self._file.discard()
        remove_tree(self.staged)

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
        third = loss_mask
        if self._masking is not None:
            tokens, third = mask_rows(tokens, self._file.rows, self._masking, self._portion)
        self._file.write(tokens, segments, third)
