"""Tokens as text that a reader sees: characters that no font shows by a sign, parts of a character by their bytes.

A token of a byte-level vocabulary is a piece of UTF-8, which may begin or end inside a character. In a row the first of
the tokens of a character shows it, and the later ones their place in it (②, ③); alone such a token shows its bytes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..corpus.tokenizer import BYTE_VALUES

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_JOINERS = "\u200c\u200d"
"""Format characters that shape the text around them: emoji and Indic scripts are wrong without."""
_PLACES = "②③④"


@dataclass(frozen=True)
class RowText:
    """The tokens of a row as text."""

    tokens: list[str]
    """What each token shows; a line break follows its sign."""
    notes: dict[int, str] = field(default_factory=dict)
    """Of tokens that are parts of characters: which bytes of what."""


class TokenTexts:
    """The texts of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._size = len(tokenizer)
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False) if backend is not None else ""
        self._byte_level, self._word_pieces = '"ByteLevel"' in decoder, '"WordPiece"' in decoder
        self._spaces_marked = "▁" in decoder or '"Metaspace"' in decoder
        self._suffix = '"BPEDecoder"' in decoder

    def of(self, token_id: int) -> str:
        """One token alone; line breaks are signs only."""
        return "".join(_shown(text) for text, _ in _characters(self.bytes_of(token_id))).replace("\n", "")

    def row(self, token_ids: Sequence[int]) -> RowText:
        """Tokens that follow each other."""
        pieces = [self.bytes_of(token) for token in token_ids]
        ends, end = [], 0
        for piece in pieces:
            ends.append(end := end + len(piece))
        tokens = [""] * len(pieces)
        notes: dict[int, str] = {}
        place, begin = 0, 0
        for text, size in _characters(b"".join(pieces)):
            while ends[place] <= begin:
                place += 1
            last = place
            while ends[last] < begin + size:
                last += 1
            tokens[place] += _shown(text)
            parts = [number for number in range(place, last + 1) if pieces[number]]
            for number, part in enumerate(parts if len(parts) > 1 else ()):
                if number:
                    tokens[part] += _PLACES[number - 1]
                first = max(begin, ends[part] - len(pieces[part]))
                data = b"".join(pieces[place : last + 1])
                offset = first - (ends[place] - len(pieces[place]))
                data = data[offset : offset + min(ends[part], begin + size) - first]
                notes[part] = f"{notes[part]}; " if part in notes else ""
                notes[part] += f"{data.hex(' ').upper()}: part {number + 1} of {len(parts)} of {_shown(text)}"
            begin += size
        return RowText([token or "∅" for token in tokens], notes)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, in UTF-8."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < self._size else None
        if token is None:
            return f"⟨id {token_id}⟩".encode()
        if self._byte_level and all(character in BYTE_VALUES for character in token):
            return bytes(BYTE_VALUES[character] for character in token)
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes([int(byte[1], 16)])
        if self._spaces_marked:
            return str(token.replace("▁", " ")).encode()
        if self._suffix:
            return str(token.replace("</w>", " ")).encode()
        if self._word_pieces and token.startswith("##"):
            return str(token[2:]).encode()
        return f" {token}".encode()


def _characters(data: bytes) -> list[tuple[str, int]]:
    """The characters of some bytes, each with its number of bytes; what is no UTF-8, byte by byte in ⟨⟩."""
    found: list[tuple[str, int]] = []
    begin = 0
    while begin < len(data):
        try:
            text = data[begin:].decode()
            stop = len(data)
        except UnicodeDecodeError as error:
            text = data[begin : begin + error.start].decode()
            stop = begin + error.start
        found += [(character, len(character.encode())) for character in text]
        if stop < len(data):
            found.append((f"⟨{data[stop]:02X}⟩", 1))
            stop += 1
        begin = stop
    return found


def _shown(text: str) -> str:
    """A character, or a sign for one that cannot be seen or that would turn the text around it."""
    if text == "\n":
        return "↵\n"
    if len(text) > 1:  # a byte
        return text
    if text == "\t":
        return "⇥\t"
    if text < " ":
        return chr(0x2400 + ord(text))
    if unicodedata.category(text) in ("Cc", "Cf", "Zl", "Zp", "Cn", "Co") and text not in _JOINERS:
        return f"⟨U+{ord(text):04X}⟩"
    return text
