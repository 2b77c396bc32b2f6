"""Documents -> rows: one pass over documents, encoded in batches on a thread of its own while others are read and packed.

A batch is encoded by the tokenizer's own threads. Its size is bounded, so that memory does not grow with the corpus, and
by the rows that are missing, so that little more is encoded than a limit needs.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from .documents import Document
from .encoding import Encoded, Encoder
from .row_writer import RowWriter

BATCH_CHARACTERS = 2**20
"""Of the texts that are encoded by one call; tokens of so many take some tens of megabytes."""
_AHEAD = 2
"""Batches that are encoded or wait for it."""


class Draws(NamedTuple):
    """What a pass has seen of its documents."""

    documents: int
    """Those that are not empty."""
    lowest: float
    """Lowest draw of a document (`heldout_draw`); infinite where there is none."""


def pack(
    documents: Iterable[Document],
    encoder: Encoder,
    writers: Mapping[str, RowWriter],
    is_heldout: Callable[[float], bool],
    seed: int,
    advance: Callable[[int, int], None] = lambda characters, tokens: None,
) -> Draws:
    """Give every document to the writer of its side, "train" or "heldout" by its draw, until both are full.

    `advance(characters, tokens)` is called for what was packed. Raises as `Encoder.encode`.
    """
    return _Pass(documents, encoder, writers, is_heldout, seed, advance).run()


def heldout_draw(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed only."""
    digest = hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class _Batch(NamedTuple):
    documents: list[Document]
    heldout: list[bool]
    characters: int
    encoded: Future[Encoded]


class _Pass:
    def __init__(
        self,
        documents: Iterable[Document],
        encoder: Encoder,
        writers: Mapping[str, RowWriter],
        is_heldout: Callable[[float], bool],
        seed: int,
        advance: Callable[[int, int], None],
    ) -> None:
        self._documents: Iterator[Document] = iter(documents)
        self._encoder, self._writers, self._is_heldout, self._seed = encoder, writers, is_heldout, seed
        self._advance = advance
        self._waiting: deque[_Batch] = deque()
        self._count, self._lowest = 0, math.inf
        self._more = True

    def run(self) -> Draws:
        # One thread: settings of a tokenizer are its state, so that no two calls may run at once.
        with ThreadPoolExecutor(1) as thread:
            while self._more and not all(writer.full for writer in self._writers.values()):
                missing = self._missing()
                if self._waiting and (len(self._waiting) == _AHEAD or missing <= 0):
                    self._pack(self._waiting.popleft())
                else:
                    self._read(min(missing, BATCH_CHARACTERS), thread)
            while self._waiting:
                self._pack(self._waiting.popleft())
        return Draws(self._count, self._lowest)

    def _missing(self) -> float:
        """Tokens that the writers still take, less the characters of those that are being encoded: a character is
        hardly ever more than a token."""
        missing = sum(writer.missing for writer in self._writers.values())
        return missing - sum(batch.characters for batch in self._waiting)

    def _read(self, most: float, thread: ThreadPoolExecutor) -> None:
        """Read documents of about `most` characters, and have them encoded."""
        documents, heldout, characters = list[Document](), list[bool](), 0
        while characters < most:
            document = next(self._documents, None)
            if document is None:
                self._more = False
                break
            draw = heldout_draw(document.text, self._seed)
            self._count, self._lowest = self._count + 1, min(self._lowest, draw)
            held = self._is_heldout(draw)
            if not self._writers["heldout" if held else "train"].full:
                documents.append(document)
                heldout.append(held)
                characters += len(document.text) + 1
        if documents:
            encoded = thread.submit(self._encoder.encode, documents)
            self._waiting.append(_Batch(documents, heldout, characters, encoded))

    def _pack(self, batch: _Batch) -> None:
        encoded, heldout = batch.encoded.result(), np.array(batch.heldout)
        for side, chosen in (("train", ~heldout), ("heldout", heldout)):
            if chosen.any():
                part = encoded.of(chosen)
                self._writers[side].add(part.tokens, part.loss_mask, part.lengths)
        self._advance(batch.characters, len(encoded.tokens))
