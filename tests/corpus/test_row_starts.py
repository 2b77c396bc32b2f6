"""The start of rows: a BOS in front of what goes on there, its labels, and no token lost or doubled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.base.errors import RecipeError
from logit_cache.corpus.labels import IGNORE, next_token_labels
from logit_cache.corpus.packers import EndToEnd
from logit_cache.corpus.rows import PackedRows
from logit_cache.corpus.tokenizer import text_prefix
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.corpus.test_chosen_positions import CONVERSATION, PLAIN, prepare
from tests.corpus.test_prepare import train_tokenizer

BOS, EOS = 1000, 1001


def bos_tokenizer(names: Sequence[str] = ("<s>",)) -> PreTrainedTokenizerFast:
    """A tokenizer that puts one or more tokens in front of every text."""
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"bos_token": names[0], "additional_special_tokens": list(names[1:])})
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B"], special_tokens=ids
    )
    return tokenizer


def packed(packer: EndToEnd, documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = [block for tokens in documents for block in packer.add(tokens, np.ones(len(tokens), np.int32))]
    empty = np.zeros((0, packer._length), np.int32)
    tokens, segments, mask = zip(*blocks, (empty, empty, empty), strict=True)
    return np.concatenate(tokens), np.concatenate(segments), np.concatenate(mask)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    row_length=st.integers(4, 13),
    start=st.sampled_from([(), (BOS,), (BOS, BOS + 5)]),
    own=st.data(),
)
def test_no_token_is_lost_or_doubled_and_none_is_predicted_from_an_inserted_start(
    lengths: list[int], row_length: int, start: tuple[int, ...], own: st.DataObject
) -> None:
    numbers = iter(range(sum(lengths)))
    documents = []
    for length in lengths:
        body = [next(numbers) for _ in range(length)]
        documents.append(np.array([*start, *body] if own.draw(st.booleans()) else body, np.int32))
    packer = EndToEnd(row_length, start)
    rows, segments, mask = packed(packer, documents)
    assert rows.shape[1] == row_length
    labels = next_token_labels(rows, segments, mask)
    # Walk through the documents: each row holds what comes next, behind a start where it continues a document with one.
    document = place = 0
    for row, numbers_of, of_row in zip(rows.tolist(), segments.tolist(), labels.tolist(), strict=True):
        at = 0
        if place and documents[document][: len(start)].tolist() == list(start):
            assert row[: len(start)] == list(start) and of_row[: len(start)] == [IGNORE] * len(start)
            at = len(start)
        segment = 0
        while at < row_length:
            count = min(len(documents[document]) - place, row_length - at)
            piece = documents[document][place : place + count].tolist()
            assert row[at : at + count] == piece and numbers_of[at : at + count] == [segment] * count
            assert of_row[at : at + count] == [*piece[1:], IGNORE]
            at, place, segment = at + count, place + count, segment + 1
            if place == len(documents[document]):
                document, place = document + 1, 0
    left = sum(map(len, documents[document:])) - place
    inserted = len(start) if place and documents[document][: len(start)].tolist() == list(start) else 0
    assert packer.left in (left, left + inserted) and packer.left < row_length


def of_text(folder: Path, tokenizer: PreTrainedTokenizerFast, text: str, **corpus: object) -> PackedRows:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return prepare(folder, tokenizer, folder / "text.txt", **corpus)


LONG = "the quick brown fox jumps over the lazy dog " * 12


def test_every_row_begins_with_the_bos_that_the_tokenizer_puts_in_front(tmp_path: Path) -> None:
    tokenizer = bos_tokenizer()
    bos = tokenizer.bos_token_id
    rows = of_text(tmp_path, tokenizer, "\n\n".join([LONG, LONG[:50], LONG]), document_separator="\n\n")
    columns = rows.columns(np.arange(rows.rows))
    ids, segments = columns["input_ids"], columns["segment_ids"]
    assert rows.rows > 10 and (ids[:, 0] == bos).all() and rows.row_start == [bos]
    labels = rows.labels(np.arange(rows.rows))
    continued = np.array([row.tolist()[1] != ids[0, 1] for row in ids])
    assert continued.sum() > 5 and (labels[continued, 0] == IGNORE).all()
    assert labels[0, 0] == ids[0, 1], "the first token of a document is predicted"
    ordinary = (segments[:, 1:-1] == segments[:, 2:]) & (segments[:, 1:-1] == segments[:, :-2])
    assert (labels[:, 1:-1][ordinary] == ids[:, 2:][ordinary]).all()
    # Without what was inserted: the documents in order, each with its own frame.
    stream = [token for row, goes_on in zip(ids, continued, strict=True) for token in row.tolist()[int(goes_on) :]]
    whole = [i for text in (LONG, LONG[:50], LONG) for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert stream == whole[: len(stream)]


def test_held_out_rows_begin_with_it_too(tmp_path: Path) -> None:
    tokenizer = bos_tokenizer()
    text = "\n\n".join(f"{LONG} number {number}" for number in range(12))
    rows = of_text(tmp_path, tokenizer, text, document_separator="\n\n", heldout_fraction=0.4)
    heldout = PackedRows(tmp_path / "run/heldout/corpus")
    for side in (rows, heldout):
        assert side.rows and (side.take(np.arange(side.rows))[0][:, 0] == tokenizer.bos_token_id).all()


def test_several_tokens_in_front(tmp_path: Path) -> None:
    tokenizer = bos_tokenizer(["[gMASK]", "<sop>"])
    prefix = text_prefix(tokenizer)
    assert tokenizer.decode(prefix) == "[gMASK]<sop>"
    rows = of_text(tmp_path, tokenizer, LONG)
    ids, labels = rows.take(np.arange(rows.rows))[0], rows.labels(np.arange(rows.rows))
    assert (ids[:, :2] == prefix).all() and (labels[:, 0] == IGNORE).all()
    assert labels[0, 1] == ids[0, 2] and (labels[1:, 1] == IGNORE).all() and (labels[:, 2] == ids[:, 3]).all()


def test_the_option_says_otherwise(tmp_path: Path) -> None:
    tokenizer = bos_tokenizer()
    bos = tokenizer.bos_token_id
    never = of_text(tmp_path, tokenizer, LONG, row_bos="never")
    ids, segments = never.take(np.arange(never.rows))
    assert ids[0, 0] == bos and not (ids[1:] == bos).any() and never.row_start == [] and not never.masked
    assert np.array_equal(never.labels(np.arange(never.rows)), next_token_labels(ids, segments))
    digest = never.meta["digest"]
    always = of_text(tmp_path, tokenizer, LONG, row_bos="always")
    assert always.meta["digest"] != digest and always.row_start == [bos]

    bare = train_tokenizer()
    assert not of_text(tmp_path, bare, LONG).row_start
    with pytest.raises(RecipeError, match=r"row_bos = 'always'.*has no BOS"):
        of_text(tmp_path, bare, LONG, row_bos="always")
    bare.bos_token = bare.eos_token
    rows = of_text(tmp_path, bare, LONG, row_bos="always")
    ids, labels = rows.take(np.arange(rows.rows))[0], rows.labels(np.arange(rows.rows))
    assert (ids[:, 0] == bare.bos_token_id).all() and labels[0, 0] == ids[0, 1] and (labels[1:, 0] == IGNORE).all()


def test_a_row_needs_room_behind_its_start(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs 3 tokens"):
        of_text(tmp_path, bos_tokenizer(), LONG, row_length=2)
    assert of_text(tmp_path, bos_tokenizer(), LONG, row_length=3).rows


@pytest.mark.parametrize("own", [True, False])
def test_a_conversation_begins_as_its_template_says_and_goes_on_likewise(tmp_path: Path, own: bool) -> None:
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + PLAIN if own else PLAIN
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CONVERSATION * 3}) + "\n")
    rows = prepare(tmp_path, tokenizer, tmp_path / "chat.jsonl", messages_column="messages")
    ids = rows.take(np.arange(rows.rows))[0]
    assert (ids[:, 0] == tokenizer.bos_token_id).all() == own
    assert (ids == tokenizer.bos_token_id).sum() == (rows.rows if own else 0), "never two"
    labels = rows.labels(np.arange(rows.rows))
    assert not own or (labels[:, 0] == IGNORE).all()
    always = prepare(tmp_path, tokenizer, tmp_path / "chat.jsonl", messages_column="messages", row_bos="always")
    ids = always.take(np.arange(always.rows))[0]
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and (ids == tokenizer.bos_token_id).sum() == always.rows


def test_ready_token_ids_get_a_bos_where_they_have_none(tmp_path: Path) -> None:
    tokenizer = bos_tokenizer()
    bos = tokenizer.bos_token_id
    records = [{"ids": [bos, *range(10, 40)], "mask": [0, *[1] * 30]}, {"ids": [*range(50, 80)], "mask": [1] * 30}]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"ids_column": "ids", "mask_column": "mask"}
    rows = prepare(tmp_path, tokenizer, tmp_path / "ids.jsonl", **settings)
    ids, segments = rows.take(np.arange(rows.rows))
    assert (ids[:, 0] == bos).all()
    starts = np.concatenate([np.ones((rows.rows, 1), bool), np.diff(segments, axis=1) != 0], 1)
    assert (ids[starts] == bos).all() and (ids == bos).sum() == starts.sum()
    assert [token for token in ids.reshape(-1).tolist() if token != bos] == [*range(10, 40), *range(50, 80)][
        : int((ids != bos).sum())
    ]
    never = prepare(tmp_path, tokenizer, tmp_path / "ids.jsonl", row_bos="never", **settings)
    assert never.take(np.arange(5))[0].reshape(-1).tolist() == [*records[0]["ids"], *records[1]["ids"]][:60]


def test_a_text_that_brings_its_frame_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = bos_tokenizer()
    rows = of_text(tmp_path, tokenizer, f"<s>{LONG}<|end|>", special_tokens_in_text="control", row_length=8)
    ids = rows.take(np.arange(rows.rows))[0]
    assert (ids == tokenizer.bos_token_id).sum() == rows.rows
    assert (ids == tokenizer.eos_token_id).sum() <= 1
