"""What `prepare` and the identity need to know of a tokenizer."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from ..base.durable import json_digest
from ..base.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer"
"""Directory of the tokenizer inside a corpus directory."""


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts in front of every text, such as a BOS; often none."""
    special = set(tokenizer.all_special_ids)
    bare, framed = list(tokenizer("a", add_special_tokens=False)["input_ids"]), list(tokenizer("a")["input_ids"])
    # Some put tokens in front even where they are asked for the bare text, whose last token may be the unknown one.
    text = next((token for token in bare[:-1] if token not in special), bare[-1] if bare else None)
    return framed[: framed.index(text)] if text in framed else []


def document_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens before and after every text: the tokenizer's own prefix, and its end of sequence.

    Raises RecipeError for a tokenizer without an end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise RecipeError("the teacher's tokenizer has no end-of-sequence token to separate documents with")
    return text_prefix(tokenizer), [int(tokenizer.eos_token_id)]


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What may stand in front of a row: the tokenizer's own prefix, else its BOS token, else nothing."""
    bos = tokenizer.bos_token_id
    return text_prefix(tokenizer) or ([] if bos is None else [int(bos)])


def row_start(tokenizer: PreTrainedTokenizerBase, row_bos: str) -> list[int]:
    """The tokens with which rows begin that continue a document, by `corpus.row_bos`.

    Raises RecipeError for "always" and a tokenizer without BOS.
    """
    if row_bos == "always" and not bos_tokens(tokenizer):
        raise RecipeError("corpus.row_bos = 'always': the teacher's tokenizer has no BOS token: leave the key out")
    return {"auto": text_prefix, "always": bos_tokens}.get(row_bos, lambda _: [])(tokenizer)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what a tokenizer does: its tokens by id, its special ids, and the ids of fixed texts and of the text of
    every token.

    Not of its files, which another version of a library may write in another way. A token's text is there twice, with a
    line break between, so that merges are seen with and without what some tokenizers put in front of a text.
    """
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    specials = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    specials["all"] = sorted(tokenizer.all_special_ids)
    added = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    texts = [f"{text}\n{text}" for text in (_text(token) for _, token in vocabulary)]
    texts += [*_TEXTS, *(f"a {token} b{token}c" for token in added)]
    ids: list[list[int]] = []
    for first in range(0, len(texts), _BATCH):
        given = texts[first : first + _BATCH]
        ids += tokenizer(given, add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]
    ids += tokenizer(list(_TEXTS), padding=False, truncation=False, verbose=False)["input_ids"]
    return json_digest({"ids": ids, "specials": specials, "vocabulary": vocabulary})


_BATCH = 4096
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_TEXTS = (
    "The quick brown fox doesn't jump; it's 3.14159 or 1,234,567 -- \"quoted\" 'text' (e.g. U.S.A.)?!",
    "def f(x):\n\tif x != 0:\n        return [x**2, {'a': 1}]  # comment\r\n\r\n\n\n   ",
    "  two  three   four    spaces\u00a0no-break\u2003em\u200bzero\u3000wide\ttab\x0b\x0cend ",
    "ÀÉÎõü ﬁ ﬀ Ⅷ ½ ² №  e\u0301 \u1e9b\u0323 ŉ İstanbul STRASSE straße ΣΑΣ",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم ۱۲۳ नमस्ते दुनिया สวัสดีชาวโลก გამარჯობა Բարեւ",
    "你好，世界。こんにちは世界 コンニチハ ﾊﾝｶｸ 안녕하세요 세계 ＡＢＣ１２３ 𠮷野家",
    "😀 👩\u200d👩\u200d👧 🇩🇪 ❤\ufe0f ☃ → ∑ ≤ € \ufffd \x00\x01\x7f \ufeff",
    "<s> </s> <unk> <pad> <|endoftext|> <|im_start|>user<|im_end|> [CLS] [SEP] [MASK] <bos><eos> <0x0A> ▁ Ġ ##ing",
    "",
)
"""Texts of many scripts, of whitespace, control characters, and names of control tokens."""


def _byte_values() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary (Radford et al. 2019)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


BYTE_VALUES = _byte_values()
"""Character of a byte-level vocabulary -> the byte that it stands for."""


def _text(token: str) -> str:
    """A text that a token of the vocabulary may stand for, whatever kind of vocabulary it is."""
    if not all(character in BYTE_VALUES for character in token):
        return token.replace("▁", " ")
    data = bytes(BYTE_VALUES[character] for character in token)
    for before, after in _COMPLETIONS:
        with suppress(UnicodeDecodeError):
            return (before + data + after).decode()
    return token


_COMPLETIONS = [
    (before, byte * count)
    for before in (b"", b"\xc3", b"\xe4", b"\xe4\xb8", b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x98")
    for count in range(4)
    for byte in (b"\x80", b"\x9f", b"\xa0")
]
"""Bytes before and after those of a token that make whole characters of the parts of some at its ends."""
