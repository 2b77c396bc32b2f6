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


def document_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens before and after every document: the tokenizer's own prefix, and its end of sequence.

    Raises RecipeError for a tokenizer without an end-of-sequence token.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    prefix = framed[: framed.index(bare[0])] if bare and bare[0] in framed else []
    if tokenizer.eos_token_id is None:
        raise RecipeError("the teacher's tokenizer has no end-of-sequence token to separate documents with")
    return list(prefix), [int(tokenizer.eos_token_id)]


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
