"""Documents -> token ids: the frame of a text, conversations through the chat template, what a teacher cannot take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..base.errors import RecipeError
from ..recipe.schema import CorpusConfig
from .chat import encode_chat
from .documents import Document
from .labels import IntArray
from .packers import places_of
from .special_tokens import SpecialTokens
from .tokenizer import document_frame, row_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """Documents end to end."""

    tokens: IntArray
    """[N]"""
    lengths: IntArray
    """[documents]"""
    loss_mask: IntArray | None
    """[N]; None: all tokens are learned."""

    def of(self, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Encoded:
        """The documents that `chosen` [documents] names."""
        if chosen.all():
            return self
        here = np.repeat(chosen, self.lengths)
        mask = None if self.loss_mask is None else self.loss_mask[here]
        return Encoded(self.tokens[here], self.lengths[chosen], mask)


class Encoder:
    """Encodes the documents of one corpus, and counts what `prepare` says about them."""

    def __init__(self, config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
        """`vocab_size`: rows of the teacher's embedding, where they are known.

        Raises RecipeError for a tokenizer without the tokens that the recipe asks for.
        """
        self.tokenizer, self._config, self._vocab_size = tokenizer, config, vocab_size
        self._prefix, self._suffix = document_frame(tokenizer) if config.objective == "causal" else ([], [])
        self.row_start = row_start(tokenizer, config.row_bos) if config.objective == "causal" else []
        """The tokens with which a row begins that continues a document."""
        if config.row_bos == "always":
            self._prefix = self.row_start
        self.special_tokens = SpecialTokens(tokenizer, as_text=config.special_tokens_in_text == "text")
        self.roles: Counter[str] = Counter()
        """Turns of the conversations, by role."""

    def restart(self) -> None:
        """Count from 0 again."""
        self.roles.clear()
        self.special_tokens.documents.clear()

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """Tokens of documents, end to end, with the loss mask of those that have one.

        Raises RecipeError for token ids beyond the teacher's embedding, and as `encode_chat`.
        """
        texts = [document.text for document in documents if document.is_text]
        of_texts = iter(self.special_tokens.encode(texts))
        found: list[tuple[list[int], Sequence[int] | None]] = []
        for document in documents:
            if document.is_text:
                found.append(_with_prefix(self._prefix, *self._framed(next(of_texts))))
            else:
                found.append(self._encode_other(document))
        lengths = np.array([len(ids) for ids, _ in found], np.int32)
        tokens = np.fromiter(chain.from_iterable(ids for ids, _ in found), np.int32, int(lengths.sum()))
        if self._vocab_size is not None and len(tokens) and int(tokens.max()) >= self._vocab_size:
            for document, place in zip(documents, places_of(lengths, len(tokens)), strict=True):
                self.check(tokens[place], document.where)
        loss_mask = None
        if any(mask is not None for _, mask in found):
            masks = (repeat(1, len(ids)) if mask is None else mask for ids, mask in found)
            loss_mask = np.fromiter(chain.from_iterable(masks), np.int32, len(tokens))
        return Encoded(tokens, lengths, loss_mask)

    def _encode_other(self, document: Document) -> tuple[list[int], Sequence[int] | None]:
        """Token ids and loss mask of a conversation, or of token ids."""
        mask: Sequence[int] | None
        if document.messages is not None:
            self.roles.update(str(message["role"]) for message in document.messages)
            ids, mask = encode_chat(
                self.tokenizer,
                document.messages,
                document.where,
                self.special_tokens,
                self._config.loss_on,
                tools=document.tools,
                **self._config.template_arguments,
            )
            return _with_prefix(self.row_start if self._config.row_bos == "always" else [], ids, mask)
        return _with_prefix(self.row_start, list(document.token_ids or ()), document.loss_mask)

    def _framed(self, ids: list[int]) -> tuple[list[int], None]:
        """The token ids of a text in their frame; where names in it are tokens, it may bring its own."""
        own = self._config.special_tokens_in_text == "control"
        if not (own and ids[: len(self._prefix)] == self._prefix):
            ids = [*self._prefix, *ids]
        return ids if own and ids[-len(self._suffix) :] == self._suffix else [*ids, *self._suffix], None

    def check(self, tokens: IntArray, where: str) -> None:
        """Raises RecipeError for token ids beyond the teacher's embedding."""
        if self._vocab_size is not None and len(tokens) and (largest := int(tokens.max())) >= self._vocab_size:
            raise RecipeError(
                f"corpus: {where}: the teacher has no embedding for token {largest} "
                f"({self.tokenizer.decode([largest])!r}), its {self._vocab_size:,} end at {self._vocab_size - 1}: use "
                "the tokenizer that it was trained with, or resize its embedding"
            )

    def said(self) -> list[str]:
        """Lines for `prepare` about names of special tokens inside texts, and the start of rows."""
        lines = []
        if self.row_start and self._config.long_documents == "whole":
            lines.append(
                f"rows that continue a document begin with {self.tokenizer.decode(self.row_start)!r}, if it does"
            )
        if names := self.special_tokens.documents:
            some = ", ".join(f"{name!r} in {count:,}" for name, count in names.most_common(3))
            taken = {"text": "as text, 'control' takes them as tokens", "control": "as tokens, 'text' as text"}
            how = taken[self._config.special_tokens_in_text]
            lines.append(
                f"documents with names of special tokens: {some}: they are taken {how} (corpus.special_tokens_in_text)"
            )
        return lines


def _with_prefix(
    prefix: list[int], ids: list[int], mask: Sequence[int] | None
) -> tuple[list[int], Sequence[int] | None]:
    """Ids and mask behind a prefix, which ids may begin with already; its tokens are not learned."""
    if ids[: len(prefix)] != prefix:
        ids, mask = [*prefix, *ids], None if mask is None else [*[0] * len(prefix), *mask]
    if mask is None and len(prefix) > 1:
        mask = [*[0] * len(prefix), *[1] * (len(ids) - len(prefix))]
    return ids, mask
