"""Loss on chosen positions only: chat replies, and ready token ids with a mask."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import tomli_w
import torch
from logit_cache.base.errors import RecipeError
from logit_cache.corpus.chat import encode_chat
from logit_cache.corpus.labels import IGNORE, next_token_labels
from logit_cache.corpus.prepare import prepare_corpus
from logit_cache.corpus.rows import PackedRows
from logit_cache.recipe.loading import load_recipe

from tests.corpus.test_prepare import train_tokenizer
from tests.helpers.synthetic import make_cache, random_rows

# The first marks the assistant's words itself, the second does not, the third rewrites earlier turns.
MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
REWRITING = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
    "{{ '<' + m['role'] + '>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)
CONVERSATION = [
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps over the lazy dog"},
    {"role": "user", "content": "taught once"},
    {"role": "assistant", "content": "a cache"},
]


def learned(tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    """The text of every run of tokens that is to be learned."""
    texts, run = [], []
    for token, wanted in [*zip(ids, mask, strict=True), (0, 0)]:
        if wanted:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_the_assistants_words_are_learned(template: str) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    ids, mask = encode_chat(tokenizer, CONVERSATION)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert learned(tokenizer, ids, mask) == ["jumps over the lazy dog<|end|>", "a cache<|end|>"]


GREETING = [{"role": "assistant", "content": "a cache"}, *CONVERSATION]
WITH_SYSTEM = "{{ '<system>be brief<|end|>' + '\n' }}" + PLAIN


@pytest.mark.parametrize("template", [MARKED, PLAIN, WITH_SYSTEM])
def test_the_assistant_may_speak_first(template: str) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    ids, mask = encode_chat(tokenizer, GREETING)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(GREETING, tokenize=False)
    assert learned(tokenizer, ids, mask) == ["a cache<|end|>", "jumps over the lazy dog<|end|>", "a cache<|end|>"]


def test_replies_without_the_prompt_for_them_are_found_by_what_changes() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = PLAIN.replace("'<assistant>'", "'<assistant><think>'")
    ids, mask = encode_chat(tokenizer, GREETING)
    assert mask is not None
    assert learned(tokenizer, ids, mask) == ["a cache<|end|>", "jumps over the lazy dog<|end|>", "a cache<|end|>"]


def test_a_template_that_leaves_out_earlier_replies_is_refused() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = REWRITING
    with pytest.raises(RecipeError, match="loss_on = 'all'"):
        encode_chat(tokenizer, CONVERSATION)


def prepare(folder: Path, tokenizer, source: Path, **corpus: object) -> PackedRows:
    settings = {"source": str(source), "row_length": 12, "heldout_fraction": 0.0, **corpus}
    recipe = {"run_dir": str(folder / "run"), "teacher": {"model": "none"}, "corpus": settings}
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    recipe = load_recipe(folder / "recipe.toml")
    prepare_corpus(recipe, tokenizer, None)
    return PackedRows(recipe.paths.cache / "corpus")


def test_conversations_become_rows_with_a_mask(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = PLAIN
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": CONVERSATION}) + "\n" for _ in range(6)))
    rows = prepare(tmp_path, tokenizer, file, messages_column="messages")
    assert rows.masked
    everything = np.arange(rows.rows)
    ids, mask = encode_chat(tokenizer, CONVERSATION)
    stream, masks = (np.tile(part, 6)[: rows.rows * 12].reshape(-1, 12) for part in (ids, mask))
    input_ids, segment_ids = rows.take(everything)
    assert np.array_equal(input_ids, stream)
    labels = rows.labels(everything)
    assert np.array_equal(labels, next_token_labels(input_ids, segment_ids, masks.astype(np.int32)))
    assert 0 < (labels != IGNORE).mean() < 0.8
    # The interoperable view of the same file.
    opened = datasets.load_from_disk(str(rows.path))
    assert opened.column_names == ["input_ids", "document_starts", "padding", "loss_mask", "crc32c"]
    assert np.array_equal(np.asarray(opened["loss_mask"]), masks)


def test_all_words_of_a_conversation_can_be_learned(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = REWRITING
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": CONVERSATION}) + "\n" for _ in range(6)))
    rows = prepare(tmp_path, tokenizer, file, messages_column="messages", loss_on="all")
    assert not rows.masked


def test_ready_token_ids_with_their_mask(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    rng = np.random.default_rng(0)
    records = [
        {"ids": rng.integers(0, len(tokenizer), 10).tolist(), "mask": rng.integers(0, 2, 10).tolist()} for _ in range(6)
    ]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "ids.parquet"))
    rows = prepare(tmp_path, tokenizer, tmp_path / "ids.parquet", ids_column="ids", mask_column="mask")
    input_ids, segment_ids = rows.take(np.arange(5))
    assert input_ids.reshape(-1).tolist() == [token for record in records for token in record["ids"]]
    mask = np.asarray([part for record in records for part in record["mask"]], np.int32).reshape(5, 12)
    assert np.array_equal(rows.labels(np.arange(5)), next_token_labels(input_ids, segment_ids, mask))


@pytest.mark.parametrize(
    ("record", "settings", "said"),
    [
        ({"messages": []}, {"messages_column": "messages"}, "no conversation"),
        ({"messages": [{"role": "user"}]}, {"messages_column": "messages"}, "has no content"),
        ({"text": "a"}, {"messages_column": "messages"}, "no column 'messages'"),
        ({"ids": [1, 9999]}, {"ids_column": "ids"}, "no token ids of this tokenizer"),
        ({"ids": [1, 2], "mask": [1]}, {"ids_column": "ids", "mask_column": "mask"}, "1 entries"),
        ({"ids": [1, 2]}, {"ids_column": "ids", "mask_column": "mask"}, "no column 'mask'"),
        ({"ids": ["1", "2"]}, {"ids_column": "ids"}, "no token ids of this tokenizer"),
        ({"ids": [1, None]}, {"ids_column": "ids"}, "no token ids of this tokenizer"),
        ({"ids": [1.5, 2.0]}, {"ids_column": "ids"}, "no token ids of this tokenizer"),
        ({"ids": [[1], [2]]}, {"ids_column": "ids"}, "no token ids of this tokenizer"),
        ({"ids": [1, 2], "mask": 1}, {"ids_column": "ids", "mask_column": "mask"}, "no list of 0 and 1"),
        ({"ids": [1, 2], "mask": [1, None]}, {"ids_column": "ids", "mask_column": "mask"}, "no list of 0 and 1"),
        ({"ids": [1, 2], "mask": ["1", "0"]}, {"ids_column": "ids", "mask_column": "mask"}, "no list of 0 and 1"),
        ({"ids": [1, 2], "mask": [256, 0.5]}, {"ids_column": "ids", "mask_column": "mask"}, "no list of 0 and 1"),
        ({"text": "cut \ud83d"}, {}, "line 1 of .* unpaired surrogate"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, {"messages_column": "messages"}, "unpaired surrogate"),
        (
            {"messages": [{"role": "user", "content": None}]},
            {"messages_column": "messages"},
            "line 1 of .* has no content",
        ),
        ({"text": "a"}, {"mask_column": "mask"}, "goes with ids_column"),
        ({"text": "a"}, {"ids_column": "ids", "messages_column": "m"}, "exclude each other"),
    ],
)
def test_unusable_records_are_named_in_one_line(tmp_path: Path, record, settings, said: str) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = PLAIN
    (tmp_path / "file.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(RecipeError, match=said) as caught:
        prepare(tmp_path, tokenizer, tmp_path / "file.jsonl", **settings)
    assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    with pytest.raises(RecipeError, match="no chat template"):
        prepare(tmp_path, train_tokenizer(), tmp_path / "chat.jsonl", messages_column="messages")


def test_targets_exist_where_something_is_learned_only(tmp_path: Path) -> None:
    mask = (np.random.default_rng(3).random((12, 16)) < 0.5).astype(np.int32)
    cache = make_cache(tmp_path / "masked", loss_mask=mask)
    batch = cache.batch(np.arange(12))
    input_ids, segment_ids = random_rows(12, 16)
    expected = next_token_labels(input_ids, segment_ids, mask)
    assert torch.equal(batch["labels"], torch.from_numpy(expected))
    assert torch.equal(batch["targets"].mask, batch["labels"] != IGNORE)
    assert cache.positions == int(batch["targets"].mask.sum()) < 12 * 15
    assert make_cache(tmp_path / "whole").digest != cache.digest


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path, loss_on: str) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
    )
    system = [{"role": "system", "content": "be brief"}, *CONVERSATION]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"m": m}) + "\n" for m in (CONVERSATION, system)))
    with pytest.raises(RecipeError, match=r"line 2 of .*System role not supported"):
        prepare(tmp_path, tokenizer, tmp_path / "chat.jsonl", messages_column="m", loss_on=loss_on)
