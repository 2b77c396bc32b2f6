"""Documents longer than a row: whole over several rows, cut, or left out, as the recipe says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache import LogitCache, ShorterRows
from logit_cache.base.errors import RecipeError
from logit_cache.capture.summary import unigram_loss
from logit_cache.corpus.labels import IGNORE, PADDING
from logit_cache.corpus.packers import WholeDocuments
from logit_cache.corpus.row_writer import RowWriter
from logit_cache.corpus.rows import PackedRows
from logit_cache.corpus.tokenizer import TOKENIZER
from logit_cache.stages.app import main

from tests.corpus.test_chosen_positions import CONVERSATION, PLAIN, prepare
from tests.corpus.test_prepare import train_tokenizer
from tests.helpers.synthetic import word_tokenizer
from tests.helpers.tiny import make_recipe

LENGTH, PAD = 12, 999


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 18), max_size=150), cut=st.booleans())
def test_every_document_lies_in_one_row_once(lengths: list[int], cut: bool) -> None:
    packer = WholeDocuments(LENGTH, PAD, cut)
    documents = [np.full(length, number, np.int32) for number, length in enumerate(lengths)]
    blocks = [block for tokens in documents for block in packer.add(tokens, np.full(len(tokens), 1 + len(tokens)))]
    blocks += packer.finish()
    seen: dict[int, int] = {}
    padding = 0
    for tokens, segments, mask in blocks:
        assert tokens.shape == segments.shape == mask.shape == (1, LENGTH)
        filled = int((segments[0] != PADDING).sum())
        assert (
            (segments[0][filled:] == PADDING).all() and (tokens[0][filled:] == PAD).all() and not mask[0][filled:].any()
        )
        padding += LENGTH - filled
        for segment in range(int(segments.max()) + 1):
            here = segments[0] == segment
            (number,) = np.unique(tokens[0][here]).tolist()
            assert number not in seen and (mask[0][here] == 1 + lengths[number]).all()
            seen[number] = int(here.sum())
    kept = {number: min(length, LENGTH) for number, length in enumerate(lengths) if cut or length <= LENGTH}
    assert seen == kept
    assert packer.left == sum(lengths) - sum(kept.values())
    assert packer.long_documents == sum(length > LENGTH for length in lengths)
    assert len(blocks) * LENGTH == sum(kept.values()) + padding


def test_little_of_mixed_lengths_becomes_padding() -> None:
    draw = np.random.default_rng(0)
    packer = WholeDocuments(512, PAD, cut=True)
    lengths = np.minimum(draw.lognormal(5.0, 0.9, 20_000).astype(int) + 4, 2000)
    rows = sum(1 for n in lengths for _ in packer.add(np.zeros(n, np.int32), np.ones(n, np.int32)))
    rows += sum(1 for _ in packer.finish())
    assert np.minimum(lengths, 512).sum() / (rows * 512) > 0.97


def conversations(folder: Path) -> Path:
    """Short, longer than a row of 40, and short again."""
    file = folder / "chat.jsonl"
    turns = [CONVERSATION[2:], CONVERSATION * 3, CONVERSATION[2:]]
    file.write_text("".join(json.dumps({"m": messages}) + "\n" for messages in turns))
    return file


@pytest.mark.parametrize("choice", ["whole", "cut", "drop"])
def test_conversations(tmp_path: Path, choice: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = PLAIN
    settings = {"messages_column": "m", "row_length": 40, "long_documents": choice}
    with caplog.at_level("INFO"):
        rows = prepare(tmp_path, tokenizer, conversations(tmp_path), **settings)
    columns = rows.columns(np.arange(rows.rows))
    real = columns["segment_ids"] != PADDING
    texts = [
        tokenizer.decode(ids[segments == segment].tolist())
        for ids, segments in zip(columns["input_ids"], columns["segment_ids"], strict=True)
        for segment in range(segments.max() + 1)
    ]
    short, long = (
        tokenizer.apply_chat_template(messages, tokenize=False) for messages in (CONVERSATION[2:], CONVERSATION * 3)
    )
    (said,) = [line for line in caplog.messages if "train rows" in line]
    if choice == "whole":
        assert real.all() and "longer than a row" not in said
        assert "".join(texts).startswith(short + long[:60])
        return
    assert texts.count(short) == 2
    assert [long.startswith(text) for text in texts if text != short] == ([True] if choice == "cut" else [])
    assert f"longer than a row: 1 {'cut' if choice == 'cut' else 'left out'}" in said
    assert f"({len(tokenizer(long)['input_ids']) - (40 if choice == 'cut' else 0)} tokens left over)" in said
    assert (rows.labels(np.arange(rows.rows))[~real] == IGNORE).all() and not real.all() and "padding" in said


def test_documents_that_are_all_too_long(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    (tmp_path / "text.txt").write_text("the quick brown fox " * 20)
    with pytest.raises(RecipeError, match="none fits one row of 12"):
        prepare(tmp_path, tokenizer, tmp_path / "text.txt", long_documents="drop")


@pytest.mark.parametrize("settings", [{"long_documents": "cut"}, {"row_bos": "always"}])
def test_masked_rows_are_framed_piece_by_piece(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="frames every piece"):
        prepare(tmp_path, train_tokenizer(), tmp_path, objective="masked", **settings)


def test_padded_rows_are_cached_trained_and_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path, corpus__long_documents="cut", corpus__row_length=32, corpus__max_rows=200)
    for command in ("prepare", "cache", "train", "evaluate"):
        assert main([command, str(recipe)]) == 0, capsys.readouterr().err
    cache = LogitCache(tmp_path / "run/cache")
    batch = cache.batch(range(len(cache)))
    padded = batch["segment_ids"] == PADDING
    assert padded.any() and not (batch["targets"].mask & padded).any()
    short = ShorterRows(cache, 4)
    starts = short.batch(range(len(short)))["segment_ids"]
    assert (starts[:, 0] == 0).all() and (short.batch(range(len(short)))["labels"] != IGNORE).any(1).all()


def test_the_unigram_gate_counts_what_is_predicted(tmp_path: Path) -> None:
    """Padding and the starts of rows would make the rows look easy to predict."""
    tokens = np.full((4, 64), 7, np.int32)
    tokens[:, 1:9] = np.arange(100, 132).reshape(4, 8)
    segments = np.where(np.arange(64) < 9, 0, PADDING) * np.ones((4, 1), np.int32)
    mask = (segments == 0).astype(np.int32)
    writer = RowWriter(tmp_path / "corpus", 64, masked=True)
    writer.write_rows(tokens, segments.astype(np.int32), mask)
    assert (writer.learned, writer.padding) == (32, 4 * 55)
    word_tokenizer().save_pretrained(writer.staged / TOKENIZER)
    writer.commit({})
    # 32 types, each seen once: by the others alone, each has only its share of the pseudo-counts.
    expected = -np.log((32 / 300) / (31 + 32))
    assert unigram_loss(PackedRows(tmp_path / "corpus"), 300) == pytest.approx(expected)
