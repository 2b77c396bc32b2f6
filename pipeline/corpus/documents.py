"""The documents of a corpus.

A document is text, a conversation (rendered by the tokenizer's chat template), or token ids. The latter two may carry a
mask of the tokens to learn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base.errors import RecipeError
from ..recipe.schema import CorpusConfig
from .chat import apply_template
from .formats import check_characters
from .sources import Sources, find_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Document:
    """One document of the source."""

    text: str
    """Its text, or a text form of its tokens; a hash of it decides whether the document is held out."""
    where: str
    """Its place in the source, for error messages."""
    messages: list[dict[str, Any]] | None = None
    token_ids: Sequence[int] | None = None
    loss_mask: Sequence[int] | None = None


def read_documents(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, sources: Sources | None = None
) -> Iterator[Document]:
    """The non-empty documents of a corpus, in order; `sources` where they are known."""
    for value, where in (sources or find_sources(config)).documents(config):
        if isinstance(value, str):
            if value.strip():
                yield Document(value, where)
        elif config.messages_column is not None:
            yield _conversation(value[config.messages_column], where, config, tokenizer)
        else:
            yield _ready_tokens(value, where, config, len(tokenizer))


def _conversation(messages: Any, where: str, config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> Document:
    valid = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    if not valid or not messages:
        raise RecipeError(
            f"corpus: {where} has no conversation in column {config.messages_column!r}: it must be a list of "
            "{role, content}"
        )
    if not tokenizer.chat_template:
        raise RecipeError("corpus.messages_column: the teacher's tokenizer has no chat template")
    text = check_characters(apply_template(tokenizer, messages, where, tokenize=False), where)
    return Document(text, where, messages=messages)


def _ready_tokens(record: dict[str, Any], where: str, config: CorpusConfig, vocab_size: int) -> Document:
    assert config.ids_column is not None
    ids = record[config.ids_column]
    whole = isinstance(ids, list) and set(map(type, ids)) == {int}
    if not whole or min(ids) < 0 or max(ids) >= vocab_size:
        raise RecipeError(
            f"corpus: {where} has no token ids of this tokenizer (0 to {vocab_size - 1}) in column {config.ids_column!r}"
        )
    mask = record[config.mask_column] if config.mask_column is not None else None
    if mask is not None and not (isinstance(mask, list) and all(entry in (0, 1) for entry in mask)):
        raise RecipeError(f"corpus: {where} has no list of 0 and 1 in column {config.mask_column!r}")
    if mask is not None and len(mask) != len(ids):
        raise RecipeError(
            f"corpus: {where}: {config.mask_column!r} has {len(mask)} entries and {config.ids_column!r} {len(ids)}"
        )
    return Document(json.dumps(ids), where, token_ids=ids, loss_mask=mask)


def texts(config: CorpusConfig) -> Iterator[str]:
    """The documents of a plain-text corpus. Raises RecipeError for conversations and token ids."""
    if config.content_columns() != [config.text_column]:
        raise RecipeError("corpus: this command reads plain text: remove messages_column and ids_column")
    for text, _ in find_sources(config).documents(config):
        yield text
