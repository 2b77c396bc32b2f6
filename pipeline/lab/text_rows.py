"""Rows without targets, for training on the text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from ..corpus.rows import PackedRows
from ..corpus.tokenizer import TOKENIZER, tokenizer_digest
from ..models.loading import load_tokenizer
from ..store.arrays import RowIndices
from ..store.batch import Batch, text_batch
from ..store.row_source import RowSource
from ..targets.sparse_targets import SparseTargets


class TextRows(RowSource):
    """The rows of a corpus with labels and no targets, in the form of a cache."""

    def __init__(self, corpus: PackedRows) -> None:
        self._corpus = corpus
        self.tokenizer_dir = corpus.local / TOKENIZER
        tokenizer = load_tokenizer(str(self.tokenizer_dir))
        self.vocab_size = len(tokenizer)
        self.tokenizer_digest = tokenizer_digest(tokenizer)
        self.row_length, self.objective = corpus.row_length, corpus.objective
        self.signals, self.knots = {}, (1.0,)

    @property
    def digest(self) -> str:
        return str(self._corpus.meta["digest"])

    def __len__(self) -> int:
        return self._corpus.rows

    def segment_ids(self, indices: RowIndices) -> np.ndarray[Any, Any]:
        return self._corpus.take(indices)[1]

    def batch(self, indices: Sequence[int] | RowIndices) -> Batch:
        """Rows in the order asked for; no position has a target."""
        text = text_batch(self._corpus.columns(np.asarray(indices, np.int64)))
        mask = torch.zeros_like(text["labels"], dtype=torch.bool)
        unused = mask.unsqueeze(-1)
        targets = SparseTargets(
            token_ids=torch.full(unused.shape, -1),
            log_probs=torch.full(unused.shape, -torch.inf),
            tail_curve=torch.full(unused.shape, -torch.inf),
            mask=mask,
            knots=self.knots,
            vocab_size=self.vocab_size,
        )
        return cast(Batch, {**text, "targets": targets})
