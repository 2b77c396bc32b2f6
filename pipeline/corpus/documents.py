"""The documents of a corpus.

A document is text, a conversation (rendered by the tokenizer's chat template), or token ids. The latter two may carry a
mask of the tokens to learn.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base.errors import RecipeError
from ..recipe.schema import CorpusConfig
from .chat import apply_template, template_text
from .conversations import Messages, read_conversation, with_json_arguments
from .formats import check_characters
from .parts import Sources
from .sources import find_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """One document of the source."""

    text: str
    """Its text, or a text form of its tokens; a hash of it decides whether the document is held out."""
    where: str
    """Its place in the source, for error messages."""
    messages: Messages | None = None
    tools: Messages | None = None
    token_ids: Sequence[int] | None = None
    loss_mask: Sequence[int] | None = None

    @property
    def is_text(self) -> bool:
        """Whether its text is what is encoded."""
        return self.messages is None and self.token_ids is None


def read_documents(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, sources: Sources | None = None
) -> Iterator[Document]:
    """The non-empty documents of a corpus, in order; `sources` where they are known."""
    chat = _Chat(config, tokenizer)
    for value, where in (sources or find_sources(config)).documents(config):
        if isinstance(value, str):
            if value.strip():
                yield Document(value, where)
        elif config.messages_column is not None:
            yield chat.document(value, where)
        else:
            yield _ready_tokens(value, where, config, len(tokenizer))


class _Chat:
    """Reads the conversations of one corpus, and says once what of them the chat template does not read."""

    def __init__(self, config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._told: set[str] = set()

    def document(self, record: dict[str, Any], where: str) -> Document:
        """The conversation of a record. Raises RecipeError where it is none, or the template refuses it."""
        messages, tools = read_conversation(record, where, self._config)
        template = template_text(self._tokenizer, tools)
        calls = any("tool_calls" in message for message in messages)
        if calls and "tool_calls" not in template:
            raise RecipeError(
                f"corpus: {where} has calls of tools, which the tokenizer's chat template leaves out: give it a template that "
                "writes `tool_calls`"
            )
        if tools and "tools" not in template:
            self._tell(f"corpus: {where} has tools, which the tokenizer's chat template leaves out")
        if any("reasoning_content" in m for m in messages) and not re.search("reasoning|thinking", template):
            self._tell(f"corpus: {where} has reasoning, which the tokenizer's chat template leaves out")
        if "strftime_now" in template:
            self._tell(
                "corpus: the tokenizer's chat template may write today's date, so that another day gives other rows: a "
                "template argument often sets it (corpus.template_arguments, date_string)"
            )
        options = {"tokenize": False, "tools": tools, **self._config.template_arguments}
        try:
            text = apply_template(self._tokenizer, messages, where, **options)
        except RecipeError:
            if not calls:
                raise
            messages = with_json_arguments(messages)  # some templates join them to other text
            text = apply_template(self._tokenizer, messages, where, **options)
        return Document(check_characters(str(text), where), where, messages=messages, tools=tools)

    def _tell(self, line: str) -> None:
        kind = line.rpartition(" has ")[2]
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(f"warning: {line}")


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
