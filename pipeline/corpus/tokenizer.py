"""What `prepare` and the identity need to know of a tokenizer."""

from __future__ import annotations

import json
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
    """Digest of everything that turns text into ids: vocabulary, merges, normalisation, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = json.loads(backend.to_str())
        # Truncation and padding belong to a call, not to the tokenizer.
        definition.pop("truncation", None)
        definition.pop("padding", None)
    else:
        definition = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_digest({"definition": definition, "specials": specials})
