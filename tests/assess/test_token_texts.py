"""Tokens as text: whatever a token is, a reader sees it, and sees what it is a part of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_cache.assess.token_texts import TokenTexts
from logit_cache.corpus.tokenizer import BYTE_VALUES
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from tests.helpers.synthetic import word_tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """A token for every byte, and an end of text."""
    backend = Tokenizer(BPE({character: byte for character, byte in BYTE_VALUES.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def pieces(vocabulary: list[str], *, decoder: object) -> PreTrainedTokenizerFast:
    ids = {token: number for number, token in enumerate(vocabulary)}
    backend = Tokenizer(BPE(ids, []) if isinstance(decoder, decoders.Sequence) else WordPiece(ids, unk_token="[UNK]"))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTES = TokenTexts(byte_level())


def test_parts_of_a_character() -> None:
    row = BYTES.row([*" 한a".encode(), 0xED, 0x95])
    assert row.tokens == [" ", "한", "②", "③", "a", "⟨ED⟩", "⟨95⟩"]
    assert row.notes == {
        1: "ED: part 1 of 3 of 한",
        2: "95: part 2 of 3 of 한",
        3: "9C: part 3 of 3 of 한",
    }
    assert BYTES.of(0xED) == "⟨ED⟩" and BYTES.of(256) == "<|end|>" and BYTES.of(9999) == "⟨id 9999⟩"


@given(st.lists(st.integers(0, 255), max_size=30))
def test_any_bytes(data: list[int]) -> None:
    row = BYTES.row(data)
    assert len(row.tokens) == len(data) and all(row.tokens)


@given(st.text(max_size=20))
def test_text_stays_text(text: str) -> None:
    """Every letter and digit is shown as itself, in its place among the others."""
    shown = iter("".join(BYTES.row(list(text.encode(errors="ignore"))).tokens))
    assert all(letter in shown for letter in text if letter.isalnum())


def test_signs_for_what_is_not_seen() -> None:
    row = BYTES.row(list("a\n\t\x00\u202e\u200d".encode()))
    assert row.tokens == ["a", "↵\n", "⇥\t", "␀", "⟨U+202E⟩", "②", "③", "\u200d", "②", "③"]
    assert BYTES.of(ord("\n")) == "↵"


def test_other_vocabularies() -> None:
    sentencepiece = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = TokenTexts(pieces(["▁the", "re", "<0xED>", "<0x95>", "<0x9C>", "▁"], decoder=sentencepiece))
    assert texts.row([0, 1, 5, 2, 3, 4]).tokens == [" the", "re", " ", "한", "②", "③"]
    texts = TokenTexts(pieces(["[UNK]", "play", "##ing", "it"], decoder=decoders.WordPiece()))
    assert texts.row([1, 2, 3]).tokens == [" play", "ing", " it"]
    assert TokenTexts(word_tokenizer()).row([1, 2]).tokens == [" w1", " w2"]


@pytest.mark.parametrize("ids", [[], [65]])
def test_short_rows(ids: list[int]) -> None:
    assert BYTES.row(ids).tokens == ["A"] * len(ids)
