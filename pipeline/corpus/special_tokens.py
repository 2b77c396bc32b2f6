"""Names of special tokens inside texts: "<|im_end|>" in a page about chat models is text, and ends no turn.

A tokenizer makes the token of every such name, wherever it stands. Text that others wrote could thus end a document or
begin a turn, so by default a name inside text is written with the tokens of its characters. Tokens that a chat template
or the document's frame puts in place stay what they are: in the messages that go through a template, each name is
replaced by a few noncharacters, which are encoded as the name's characters afterwards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK, _ZERO = "\ufdd0", 0xFDD1
_PLACEHOLDER = re.compile("\ufdd0[\ufdd1-\ufde0]{4}")
"""The number of a name in noncharacters, which Unicode keeps out of all text: a mark and four digits to base 16."""
_PART = re.compile("\ufdd0[\ufdd1-\ufde0]{4}|(?:(?!\ufdd0[\ufdd1-\ufde0]{4}).)+", re.DOTALL)
"""One placeholder, or the text up to the next one."""
Offsets = list[tuple[int, int]]


class SpecialTokens:
    """The special tokens of a tokenizer, and what their names inside text are (`corpus.special_tokens_in_text`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, as_text: bool) -> None:
        self._tokenizer, self._as_text = tokenizer, as_text
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = sorted(added | set(map(str, tokenizer.all_special_tokens)), key=len, reverse=True)
        names = [name for name in names if name]
        self._names = names
        self._any = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._shielded_names = [_MARK, *names]  # the mark too, so that no text is taken for a placeholder
        self._to_shield = re.compile("|".join(map(re.escape, self._shielded_names)))
        self.documents: Counter[str] = Counter()
        """Name -> documents with it in their text."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the texts of documents, without a frame."""
        found = [self._names_in(text) for text in texts]
        for names in found:
            self.documents.update(names)
        apart = [bool(names) and self._as_text for names in found]
        plain = iter(self._encoded_all([text for text, alone in zip(texts, apart, strict=True) if not alone]))
        return [self._as_characters(text) if alone else next(plain) for text, alone in zip(texts, apart, strict=True)]

    def _names_in(self, text: str) -> set[str]:
        # To look for each name is far quicker than the pattern, and nearly all texts have none.
        return set(self._any.findall(text)) if any(name in text for name in self._names) else set()

    def _encoded_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each of these texts, by the tokenizer's own threads."""
        if not texts:
            return []
        if self._is_plain:
            self._encoded("")  # sets what is to be cut off, padded or split
            backend = self._tokenizer.backend_tokenizer
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        ids: list[list[int]] = self._encoded(texts, return_attention_mask=False)["input_ids"]
        return ids

    @cached_property
    def _is_plain(self) -> bool:
        """Whether a call of the tokenizer does nothing but ask its backend, which is quicker alone: it makes no lists of
        what else it knows of a text."""
        from transformers import PreTrainedTokenizerFast

        kind = type(self._tokenizer)
        own = (
            getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
        )
        return all(own)

    def shield(self, messages: Any) -> Any:
        """Messages whose names of special tokens are placeholders, for the chat template, where they are to be text."""
        found: set[str] = set()
        shielded = self._shielded(messages, found)
        self.documents.update(found - {_MARK})
        return shielded if self._as_text else messages

    def encode_shielded(self, text: str) -> tuple[list[int], Offsets]:
        """Token ids of a text that was rendered from shielded messages, and the place of each token in that text; of a
        tokenizer that is not fast no places."""
        ids: list[int] = []
        offsets: Offsets = []
        for match in _PART.finditer(text):
            if _PLACEHOLDER.fullmatch(match.group()):
                literal = self._as_characters(self.unshield(match.group()))
                ids += literal
                offsets += [match.span()] * len(literal)
            else:
                places = {"return_offsets_mapping": True} if self._tokenizer.is_fast else {}
                part = self._encoded(match.group(), **places)
                ids += part["input_ids"]
                offsets += [
                    (match.start() + begin, match.start() + end) for begin, end in part.get("offset_mapping", ())
                ]
        return ids, offsets

    def unshield(self, text: str) -> str:
        """The text with the names themselves."""
        return _PLACEHOLDER.sub(lambda match: self._shielded_names[_number(match.group())], text)

    def _shielded(self, value: Any, found: set[str]) -> Any:
        if isinstance(value, str):
            return self._to_shield.sub(lambda match: self._shield_of(match.group(), found), value)
        if isinstance(value, dict):
            return {key: self._shielded(part, found) for key, part in value.items()}
        return [self._shielded(part, found) for part in value] if isinstance(value, list) else value

    def _shield_of(self, name: str, found: set[str]) -> str:
        found.add(name)
        return _placeholder(self._shielded_names.index(name))

    def _as_characters(self, text: str) -> list[int]:
        """Token ids of a text in which names of special tokens are characters."""
        ids = self._encoded(text, split_special_tokens=True)["input_ids"]
        return [part for token in ids for part in self._spelling.get(token, [token])]

    @cached_property
    def _spelling(self) -> dict[int, list[int]]:
        """Special token -> the tokens of its name's characters. Unigram models have special tokens in their vocabulary,
        and find them in text by themselves."""
        spelling = {}
        for name in self._names:
            number, *characters = self._tokenizer.convert_tokens_to_ids([name, *name])
            if not {None, self._tokenizer.unk_token_id} & set(characters):
                spelling[number] = characters
        return spelling

    def _encoded(self, text: str | list[str], **options: Any) -> Any:
        # verbose=False: no warning for texts longer than the model's positions, they are cut into rows.
        off: dict[str, Any] = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        return self._tokenizer(text, **off, **options)


def _placeholder(number: int) -> str:
    return _MARK + "".join(chr(_ZERO + int(digit, 16)) for digit in f"{number:04x}")


def _number(placeholder: str) -> int:
    return int("".join(f"{ord(digit) - _ZERO:x}" for digit in placeholder[1:]), 16)
