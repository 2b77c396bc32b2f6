"""The digest of a tokenizer is of what it does, not of how a version of a library writes it down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from logit_cache.corpus.tokenizer import tokenizer_digest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

LINES = ["the quick brown fox jumps over the lazy dog", "déjà vu, naïve café", "x = [1, 2, 3]  # numbers"] * 4
SPECIALS = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}


def bpe(**settings: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **settings)


def rewritten(change: Callable[[dict[str, Any]], None], **style: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a JSON definition that `change` has edited."""
    definition = json.loads(bpe().backend_tokenizer.to_str())
    change(definition)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition, **style)), eos_token="<eos>"
    )


def merges_as_text(definition: dict[str, Any]) -> None:
    """As older versions of tokenizers write them."""
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]


def with_defaults(definition: dict[str, Any]) -> None:
    """With keys at their defaults, and others left out, as versions differ in it."""
    definition["model"]["dropout"] = None
    definition["model"].pop("byte_fallback", None)
    definition["model"].pop("ignore_merges", None)


def test_the_same_tokenizer_in_other_words(tmp_path: Path) -> None:
    digest = tokenizer_digest(bpe())
    assert tokenizer_digest(rewritten(lambda definition: None, indent=2, sort_keys=True, ensure_ascii=False)) == digest
    assert tokenizer_digest(rewritten(merges_as_text)) == digest
    assert tokenizer_digest(rewritten(with_defaults)) == digest
    for _ in range(2):
        AutoTokenizer.from_pretrained(_saved(bpe(), tmp_path)).save_pretrained(tmp_path)
        assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == digest


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_slow_and_fast_tokenizers_that_do_the_same(tmp_path: Path) -> None:
    words = [*SPECIALS.values(), "the", "qu", "##ick", "fox", "##es", ",", "#", "a", "b", "c", "1", "##2"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    fast = AutoTokenizer.from_pretrained(_bert_folder(tmp_path))
    assert slow.__class__ is not fast.__class__
    assert tokenizer_digest(slow) == tokenizer_digest(fast)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(_saved(fast, tmp_path / "again"))) == tokenizer_digest(slow)


def _bert_folder(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder


def drop_a_merge(definition: dict[str, Any]) -> None:
    definition["model"]["merges"].pop(len(definition["model"]["merges"]) // 2)


def swap_tokens(definition: dict[str, Any]) -> None:
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def lower_case(definition: dict[str, Any]) -> None:
    definition["normalizer"] = {"type": "Lowercase"}


def space_in_front(definition: dict[str, Any]) -> None:
    definition["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize("change", [drop_a_merge, swap_tokens, lower_case, space_in_front])
def test_another_tokenizer(change: Callable[[dict[str, Any]], None]) -> None:
    assert tokenizer_digest(rewritten(change)) != tokenizer_digest(bpe())


def test_every_merge_that_a_text_reaches_counts() -> None:
    known, merges = tokenizer_digest(bpe()), len(json.loads(bpe().backend_tokenizer.to_str())["model"]["merges"])
    fewer = [rewritten(lambda definition, n=number: definition["model"]["merges"].pop(n)) for number in range(merges)]
    digests = [tokenizer_digest(tokenizer) for tokenizer in fewer]
    assert digests.count(known) < merges / 10
    for tokenizer, digest in zip(fewer, digests, strict=True):
        assert digest != known or tokenizer(LINES)["input_ids"] == bpe()(LINES)["input_ids"]


def test_added_and_special_tokens_count() -> None:
    digests = [tokenizer_digest(bpe())]
    for token in ("<tool>", AddedToken("<tool>", lstrip=True), AddedToken("<tool>", rstrip=True)):
        changed = bpe()
        changed.add_tokens([token])
        digests.append(tokenizer_digest(changed))
    digests.append(tokenizer_digest(bpe(bos_token="<eos>")))
    digests.append(tokenizer_digest(bpe(pad_token="<eos>")))
    assert len(set(digests)) == len(digests)
