"""Masked rows: documents framed by special tokens, and the tokens that a masked model predicts.

The masks are drawn once, from the seed, the portion of the corpus and the row's number in it, and stored with the rows, since the teacher's targets hold
for these masks only (Devlin et al. 2018, arXiv 1810.04805, section 3.1, also draws once). Several draws of one text are
several rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import RecipeError
from ..recipe.schema import CorpusConfig
from .labels import IGNORE, PADDING, IntArray
from .packers import RowBlock, places_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST = 8
"""Positions, frame included, that another piece of text is worth; a shorter rest of a row is padded."""


@dataclass(frozen=True)
class Masking:
    """The special tokens of a tokenizer, and the settings of the draw."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    fraction: float = 0.15
    draws: int = 1
    """Rows made of the same text, each with its own masks."""
    seed: int = 0

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: CorpusConfig, seed: int) -> Masking:
        """Raises RecipeError for a tokenizer without the tokens that a masked model needs."""
        names = ("cls_token_id", "sep_token_id", "pad_token_id", "mask_token_id")
        ids = [getattr(tokenizer, name) for name in names]
        missing = [name.removesuffix("_id") for name, value in zip(names, ids, strict=True) if value is None]
        if missing:
            raise RecipeError(
                f"corpus.objective = 'masked': the teacher's tokenizer has no {missing[0]}: choose a masked model as teacher"
            )
        special = tuple(sorted(int(number) for number in tokenizer.all_special_ids))
        cls_id, sep_id, pad_id, mask_id = (int(number) for number in ids)
        return cls(
            cls_id, sep_id, pad_id, mask_id, special, len(tokenizer), config.mask_fraction, config.mask_draws, seed
        )


def mask_rows(tokens: IntArray, first_row: int, masking: Masking, portion: int = 0) -> tuple[IntArray, IntArray]:
    """Rows [B, L] of a portion, numbered from `first_row` -> input ids [B, L] with hidden tokens, and labels [B, L].

    Of the ordinary (not special) tokens of a row, the share `fraction` is chosen, at least one. 80 % of the chosen
    tokens become the mask token, 10 % a random ordinary token, 10 % stay. Their labels are the original tokens, all
    other labels -100.
    """
    input_ids, labels = tokens.copy(), np.full(tokens.shape, IGNORE, np.int32)
    ordinary = np.setdiff1d(np.arange(masking.vocab_size, dtype=np.int32), masking.special_ids)
    maskable = ~np.isin(tokens, masking.special_ids)
    for number, row in enumerate(tokens):
        random = np.random.default_rng([masking.seed, first_row + number, portion])
        places = np.flatnonzero(maskable[number])
        count = min(max(round(masking.fraction * len(places)), 1), len(places))
        chosen = random.permutation(places)[:count]
        fate = random.random(count)
        replaced = np.where(fate < 0.8, masking.mask_id, random.choice(ordinary, count))
        labels[number, chosen] = row[chosen]
        input_ids[number, chosen] = np.where(fate < 0.9, replaced, row[chosen])
    return input_ids, labels


class Framer:
    """Cuts documents into framed pieces, [CLS] ... [SEP], and joins the pieces to rows.

    A piece fills the rest of its row; a rest that is too short for a piece is padded.
    """

    def __init__(self, row_length: int, masking: Masking) -> None:
        self._length, self._masking = row_length, masking
        self._tokens: list[int] = []
        self._segments: list[int] = []

    def add(self, tokens: IntArray, loss_mask: IntArray, lengths: IntArray | None = None) -> Iterator[RowBlock]:
        """Documents -> the rows that they complete, each `draws` times; the draw chooses what is learned, so
        `loss_mask` does not count."""
        for place in places_of(lengths, len(tokens)):
            yield from self._add(tokens[place].tolist())

    def most_rows(self, tokens: int, documents: int) -> int:
        # A piece has at least 6 tokens, but the last one of its document.
        return (self.left + 2 * tokens + 10 * documents) // self._length * self._masking.draws

    def _add(self, ids: list[int]) -> Iterator[RowBlock]:
        masking = self._masking
        done = 0
        while done < len(ids):
            room = self._length - len(self._tokens)
            if room < min(_SHORTEST, self._length):
                self._append([masking.pad_id] * room, PADDING)
            else:
                piece = ids[done : done + room - 2]
                done += len(piece)
                document = self._segments[-1] + 1 if self._segments else 0
                self._append([masking.cls_id, *piece, masking.sep_id], document)
            if len(self._tokens) == self._length:
                row = np.asarray([self._tokens, self._segments, [1] * self._length], np.int32)
                tokens_BL, segments_BL, mask_BL = np.repeat(row[:, None], masking.draws, 1)
                yield tokens_BL, segments_BL, mask_BL
                self._tokens, self._segments = [], []

    def finish(self) -> Iterator[RowBlock]:
        yield from ()

    @property
    def left(self) -> int:
        return len(self._tokens)

    def _append(self, tokens: list[int], segment: int) -> None:
        self._tokens += tokens
        self._segments += [segment] * len(tokens)
