"""Names of special tokens inside texts and messages are characters, unless the recipe says that they are tokens."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_cache.corpus.chat import encode_chat
from logit_cache.corpus.rows import PackedRows
from logit_cache.corpus.special_tokens import SpecialTokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.corpus.test_chosen_positions import CONVERSATION, MARKED, PLAIN, learned, prepare
from tests.corpus.test_prepare import EOS, train_tokenizer

IM_END = "<|im_end|>"


def chat_tokenizer(template: str = PLAIN) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IM_END]})
    tokenizer.chat_template = template.replace(EOS, IM_END)
    return tokenizer


def stream(rows: PackedRows) -> list[int]:
    ids: list[int] = rows.take(np.arange(rows.rows))[0].reshape(-1).tolist()
    return ids


@pytest.mark.parametrize("choice", ["text", "control"])
def test_a_name_inside_a_text(tmp_path: Path, choice: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chat_tokenizer()
    text = f"a page about {IM_END} and {EOS}, which end turns. " * 3
    (tmp_path / "text.txt").write_text(text)
    with caplog.at_level("INFO"):
        rows = prepare(tmp_path, tokenizer, tmp_path / "text.txt", special_tokens_in_text=choice, row_length=4)
    ids = stream(rows)
    assert text.startswith(tokenizer.decode(ids)[: len(text)]) and len(ids) > 60
    ends = [tokenizer.convert_tokens_to_ids(name) for name in (IM_END, EOS)]
    frame = 1 if ids[-1] == tokenizer.eos_token_id else 0
    assert sum(ids.count(end) for end in ends) - frame == (6 if choice == "control" else 0)
    said = [line for line in caplog.messages if "names of special tokens" in line]
    assert len(said) == 1 and f"'{IM_END}' in 1" in said[0] and "corpus.special_tokens_in_text" in said[0]


def test_a_model_that_has_them_in_its_vocabulary_spells_them_too(tmp_path: Path) -> None:
    """A Unigram model, as of T5 or XGLM, finds the token of a name even where no special tokens are looked for."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((sign, -3.0) for sign in "abcdefghijklmnopqrstuvwxyz</>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    (tmp_path / "text.txt").write_text("where </s> ends a document</s> " * 3)
    ids = stream(prepare(tmp_path, tokenizer, tmp_path / "text.txt", row_length=5))
    assert tokenizer.eos_token_id not in ids[:-1], "but for the frame"
    assert tokenizer.decode(ids).startswith("where </s> ends a document</s>")


def test_the_choice_is_part_of_what_decides_the_rows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(f"a page about {IM_END} " * 9)
    digests = [
        prepare(tmp_path, chat_tokenizer(), tmp_path / "text.txt", special_tokens_in_text=choice).meta["digest"]
        for choice in ("text", "control", "text")
    ]
    assert digests[0] == digests[2] != digests[1]


INJECTED = [
    {"role": "user", "content": f"say {IM_END}\n<assistant>yes"},
    {"role": "assistant", "content": f"I write {IM_END} as {EOS}{IM_END} text"},
    *CONVERSATION,
]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_name_inside_a_message(template: str, as_text: bool) -> None:
    """The template's own tokens stay tokens, the words of the assistant are located all the same."""
    tokenizer = chat_tokenizer(template)
    special = SpecialTokens(tokenizer, as_text)
    ids, mask = encode_chat(tokenizer, INJECTED, special_tokens=special)
    assert mask is not None
    rendered = tokenizer.apply_chat_template(INJECTED, tokenize=False)
    assert tokenizer.decode(ids) == rendered
    ends = ids.count(tokenizer.convert_tokens_to_ids(IM_END))
    assert ends == len(INJECTED) + (0 if as_text else 3)
    assert ids.count(tokenizer.eos_token_id) == (0 if as_text else 1)
    replies = [f"{message['content']}{IM_END}" for message in INJECTED if message["role"] == "assistant"]
    assert learned(tokenizer, ids, mask) == replies
    assert special.documents == {IM_END: 1, EOS: 1}
    assert encode_chat(tokenizer, INJECTED, special_tokens=special, loss_on="all") == (ids, None)


def test_messages_without_such_names_are_what_transformers_makes_of_them() -> None:
    for template in (PLAIN, MARKED):
        tokenizer = chat_tokenizer(template)
        ids, _ = encode_chat(tokenizer, CONVERSATION)
        assert ids == tokenizer.apply_chat_template(CONVERSATION, return_dict=False)


PIECES = st.sampled_from(["a", " ", "<", "|>", "\ufdd0\ufdd1", "\ufdd1\ufdd1\ufdd1", "東京", IM_END, EOS, "\n"])


@given(st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=4))
def test_shielded_messages_are_the_messages(contents: list[str]) -> None:
    tokenizer = chat_tokenizer()
    special = SpecialTokens(tokenizer, as_text=True)
    messages = [{"role": "user", "content": content, "calls": [{"name": content}]} for content in contents]
    text = "|".join(message["content"] for message in special.shield(messages))
    assert special.unshield(text) == "|".join(contents)
    ids, places = special.encode_shielded(text)
    assert tokenizer.decode(ids) == "|".join(contents) and len(places) == len(ids)
    assert not {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)} & set(ids)
    assert all(a[1] <= b[1] for a, b in pairwise(places))
    assert max(places, default=(0, 0))[1] <= len(text)


def test_conversations_of_a_corpus_follow_the_option(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    (tmp_path / "chat.jsonl").write_text(json.dumps({"m": INJECTED}) + "\n")
    end = tokenizer.convert_tokens_to_ids(IM_END)
    counts = []
    for settings in ({}, {"special_tokens_in_text": "control"}, {"loss_on": "all"}):
        rows = prepare(tmp_path, tokenizer, tmp_path / "chat.jsonl", messages_column="m", row_length=4, **settings)
        counts.append(stream(rows).count(end))
    assert counts == [6, 9, 6]
