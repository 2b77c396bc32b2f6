"""The text of rows: what is stored decodes to the columns of the corpus, in few bytes, and without the corpus."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cache.base.errors import CorruptError, IncompleteError
from logit_cache.corpus.labels import COLUMNS
from logit_cache.corpus.rows import PackedRows
from logit_cache.store.chunks import stored_row
from logit_cache.store.codebook import Codebook
from logit_cache.store.reader import LogitCache
from logit_cache.store.text import TextCodec
from logit_cache.store.verify import verify

from tests.helpers.synthetic import VOCAB, make_cache

LENGTH = 24


def codebook(vocab_size: int) -> Codebook:
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, vocab_size, 4000) // 3
    ids = (contexts[:, None] + rng.integers(0, 9, (4000, 4))) % vocab_size
    book = Codebook.learn(ids, contexts, vocab_size, 1000.0)
    assert len(book.contexts) > 5
    return book


BOOKS = {size: codebook(size) for size in (50, 2**16 - 2, 2**16, 70_000)}


def rows(names: list[str], vocab_size: int, seed: int, count: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    begins = rng.random((count, LENGTH)) < 0.2
    begins[:, 0] = False
    segments = np.cumsum(begins, 1)
    segments[0, LENGTH - rng.integers(0, 5) :] = -1
    made = {
        "input_ids": rng.integers(0, vocab_size, (count, LENGTH)),
        "segment_ids": segments,
        "loss_mask": rng.random((count, LENGTH)) < 0.6,
        "labels": np.where(rng.random((count, LENGTH)) < 0.2, rng.integers(0, vocab_size, (count, LENGTH)), -100),
    }
    return {name: made[name].astype(np.int32) for name in names}


@given(
    names=st.sampled_from(COLUMNS),
    vocab_size=st.sampled_from(list(BOOKS)),
    profile=st.sampled_from(["compact", "fast"]),
    with_book=st.booleans(),
    seed=st.integers(0, 99),
)
def test_columns_come_back(names: list[str], vocab_size: int, profile: str, with_book: bool, seed: int) -> None:
    codec = TextCodec(names, LENGTH, vocab_size, profile, BOOKS[vocab_size] if with_book else None)  # type: ignore[arg-type]
    columns = rows(names, vocab_size, seed)
    stored = codec.encode(columns)
    assert {name: values[0].dtype.name for name, values in stored.items()} == codec.layout()
    assert {name: values[0].shape for name, values in stored.items()} == codec.shapes()
    decoded = codec.decode({name: list(values) for name, values in stored.items()})
    assert list(decoded) == names
    for name, values in columns.items():
        assert decoded[name].dtype == np.int32 and np.array_equal(decoded[name], values), name
    some = {name: list(stored[name]) for name in codec.segment_arrays}
    assert np.array_equal(codec.segment_ids(some), columns["segment_ids"])


def test_documents_take_a_few_bytes() -> None:
    codec = TextCodec(COLUMNS[1], 1024, 50, "compact", None)
    segments = np.repeat(np.arange(8), 128)[None].astype(np.int32)
    mask = np.repeat([0, 1, 0, 1, 1, 1, 0, 1], 128)[None].astype(np.int32)
    stored = codec.encode({"input_ids": np.zeros_like(segments), "segment_ids": segments, "loss_mask": mask})
    for name in ("segment_steps", "loss_steps"):
        assert len(stored_row(stored[name][0], False)) < 64


@pytest.mark.parametrize("token", [-1, 50, 2**16 + 3])
@pytest.mark.parametrize("profile", ["compact", "fast"])
def test_tokens_outside_the_vocabulary_are_refused(token: int, profile: str) -> None:
    codec = TextCodec(COLUMNS[0], LENGTH, 50, profile, BOOKS[50])  # type: ignore[arg-type]
    columns = rows(COLUMNS[0], 50, 0)
    columns["input_ids"][1, 3] = token
    with pytest.raises(ValueError, match="the vocabulary has 50"):
        codec.encode(columns)


def test_other_columns_are_refused() -> None:
    codec = TextCodec(COLUMNS[0], LENGTH, 50, "compact", None)
    with pytest.raises(ValueError, match="loss_mask: the cache has input_ids, segment_ids"):
        codec.encode(rows(COLUMNS[1], 50, 0))


@pytest.mark.parametrize("value", [60, 2**16 - 1])
@pytest.mark.parametrize("with_book", [False, True])
def test_codes_that_no_encoder_writes_are_refused(value: int, with_book: bool) -> None:
    codec = TextCodec(COLUMNS[0], LENGTH, 50, "compact", BOOKS[50] if with_book else None)
    stored = codec.encode(rows(COLUMNS[0], 50, 0))
    stored["input_codes"][1][3] = value
    with pytest.raises(ValueError, match="outside"):
        codec.decode({name: list(values) for name, values in stored.items()})


@pytest.mark.parametrize("profile", ["compact", "fast"])
def test_a_cache_is_read_without_the_rows_of_its_corpus(tmp_path: Path, profile: str) -> None:
    mask = (np.arange(12 * 16).reshape(12, 16) % 5 > 0).astype(np.int32)
    whole = make_cache(tmp_path / "cache", loss_mask=mask, profile=profile)  # type: ignore[arg-type]
    corpus = PackedRows.of_cache(whole.path)
    expected, columns = whole.batch(range(12)), corpus.columns(np.arange(12))
    for file in (tmp_path / "cache/corpus").iterdir():
        if file.name not in ("prepared.json", "tokenizer"):
            file.unlink()
    cache = LogitCache(tmp_path / "cache")
    found = cache.batch(range(12))
    for name in ("input_ids", "segment_ids", "labels"):
        assert torch.equal(found[name], expected[name]), name  # type: ignore[literal-required]
    read = cache.columns([3, 7, -1])
    assert list(read) == COLUMNS[1]
    for name, values in columns.items():
        assert np.array_equal(read[name], values[[3, 7, 11]]), name
    assert np.array_equal(cache.segment_ids(np.array([5, 0])), columns["segment_ids"][[5, 0]])
    (tmp_path / "cache/corpus/prepared.json").unlink()
    with pytest.raises(IncompleteError, match="no prepared corpus"):
        LogitCache(tmp_path / "cache")


def test_rows_that_are_not_those_of_the_corpus_are_named_by_verify(tmp_path: Path) -> None:
    """A shard of other rows, whole in itself and of the same cache, as a mistaken writer would make it."""
    cache = make_cache(tmp_path / "cache")
    other = make_cache(tmp_path / "other", seed=1)
    from logit_cache.store.writer import CacheWriter

    writer = CacheWriter(cache.path, cache.manifest)
    (cache.path / "shards/00001.json").unlink()
    with writer.draft(1) as draft:
        batch = other.batch(range(5, 10))
        draft.add(batch["targets"], other.columns(range(5, 10)), [0.0] * 5)
        writer.commit(draft)
    bad = verify(cache.path)
    assert list(bad) == [1] and "differ from those that the teacher read" in bad[1]


def test_a_changed_corpus_is_noticed_when_a_cache_is_opened(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", vocab_size=VOCAB)
    make_cache(tmp_path / "other", seed=1)
    shutil.rmtree(cache.path / "corpus")
    shutil.copytree(tmp_path / "other/corpus", cache.path / "corpus")
    with pytest.raises(Exception, match="are not the cached rows") as caught:
        LogitCache(cache.path)
    assert not isinstance(caught.value, CorruptError)
