"""Masked rows: documents framed as a masked model expects them, and the draw of what it has to fill in.

The draw is made once, from the seed and the row's number, and kept with the rows (Devlin et al. 2018, arXiv 1810.04805,
section 3.1, there drawn once for the data as well): what the teacher said of a row holds for that row only. Several
draws of the same text are so many rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.errors import RecipeError
from ..recipe.schema import CorpusConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from .labels import IGNORE, PADDING

_SHORTEST = 8  # room that is worth another piece of text, with its frame
IntArray = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Masking:
    """How rows of one tokenizer are masked."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    fraction: float = 0.15
    draws: int = 1
    """Rows that are made of the same text, each with its own masks."""
    seed: int = 0

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: CorpusConfig, seed: int) -> Masking:
        """Raises RecipeError for a tokenizer without the tokens that a masked model needs."""
        names = ("cls_token_id", "sep_token_id", "pad_token_id", "mask_token_id")
        ids = [getattr(tokenizer, name) for name in names]
        missing = [name.removesuffix("_id") for name, value in zip(names, ids, strict=True) if value is None]
        if missing:
            raise RecipeError(
                f"corpus.objective = 'masked': the teacher's tokenizer has no {missing[0]}: it is not that of a masked model"
            )
        special = tuple(sorted(int(number) for number in tokenizer.all_special_ids))
        cls_id, sep_id, pad_id, mask_id = (int(number) for number in ids)
        return cls(
            cls_id, sep_id, pad_id, mask_id, special, len(tokenizer), config.mask_fraction, config.mask_draws, seed
        )


def mask_rows(tokens: IntArray, first_row: int, masking: Masking) -> tuple[IntArray, IntArray]:
    """Rows [R, L] numbered from `first_row` -> what the model sees [R, L], and labels [R, L].

    Of a row's tokens that are not special, `fraction` (rounded, one at least) are chosen; 80 % of them are replaced by the
    mask, 10 % by any token that is not special, 10 % left. The label of a chosen token is itself, of all others -100.
    """
    input_ids, labels = tokens.copy(), np.full(tokens.shape, IGNORE, np.int32)
    ordinary = np.setdiff1d(np.arange(masking.vocab_size, dtype=np.int32), masking.special_ids)
    maskable = ~np.isin(tokens, masking.special_ids)
    for number, row in enumerate(tokens):
        random = np.random.default_rng([masking.seed, first_row + number])
        places = np.flatnonzero(maskable[number])
        count = min(max(round(masking.fraction * len(places)), 1), len(places))
        chosen = random.permutation(places)[:count]
        fate = random.random(count)
        replaced = np.where(fate < 0.8, masking.mask_id, random.choice(ordinary, count))
        labels[number, chosen] = row[chosen]
        input_ids[number, chosen] = np.where(fate < 0.9, replaced, row[chosen])
    return input_ids, labels


class Framer:
    """Cuts documents into framed pieces, [CLS] ... [SEP], and lays them end to end into rows.

    A piece fills what room its row has left; a room too small for one is padded.
    """

    def __init__(self, row_length: int, masking: Masking) -> None:
        self._length, self._masking = row_length, masking
        self._tokens: list[int] = []
        self._segments: list[int] = []

    def add(self, tokens: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
        """One document -> the rows that it completes, each with its segments, both [L]."""
        ids, masking = tokens.tolist(), self._masking
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
                yield np.asarray(self._tokens, np.int32), np.asarray(self._segments, np.int32)
                self._tokens, self._segments = [], []

    def _append(self, tokens: list[int], segment: int) -> None:
        self._tokens += tokens
        self._segments += [segment] * len(tokens)
