"""Codebooks: ids come back whatever was learned, and likely tokens get small numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.store import codebook
from logit_cache.store.codebook import Codebook


def supports(seed: int, positions: int, vocab_size: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [N, k] that depend on their context [N]: a stretch of the vocabulary for each, with noise."""
    rng = np.random.default_rng(seed)
    contexts = rng.zipf(1.3, positions) % vocab_size
    likely = (vocab_size // 2 + 7 * contexts[:, None] + np.arange(2 * k)) % vocab_size
    ids = np.stack([rng.permutation(row)[:k] for row in likely])
    stray = rng.random(ids.shape) < 0.05
    return np.where(stray, rng.integers(0, vocab_size, ids.shape), ids), contexts


def decoded(book: Codebook, codes: np.ndarray, context: int) -> np.ndarray:
    """Codes of one context to tokens, as the book's docstring defines it."""
    start, length, lists = book.start[context], book.length[context], len(book.entries)
    return np.where(codes < length, book.table[(start + codes) % len(book.table)], book.table[lists + codes - length])


def roundtrip(book: Codebook, ids: np.ndarray, contexts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    codes = book.encode(ids, np.repeat(contexts, counts))
    assert codes.min(initial=0) >= 0 and codes.max(initial=0) < book.code_limit
    each = np.split(codes, np.cumsum(counts)[:-1])
    return np.concatenate([decoded(book, codes_K, contexts[p]) for p, codes_K in enumerate(each)])


@given(
    seed=st.integers(0, 10**6), vocab_size=st.integers(2, 300), uses=st.sampled_from([1.0, 30.0, 1e6]), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_every_id_comes_back(seed: int, vocab_size: int, uses: float, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    positions = data.draw(st.integers(0, 60))
    ids, contexts = supports(seed, positions, vocab_size, 4) if positions else (np.empty((0, 4), int), np.empty(0, int))
    ids[rng.random(ids.shape) < 0.2] = -1
    book = Codebook.learn(ids, contexts, vocab_size, uses)
    # Every id in every context, learned or not, and supports of any size.
    everywhere = np.arange(vocab_size)
    contexts = rng.integers(0, vocab_size, 3)
    for counts in (np.full(3, vocab_size), np.array([vocab_size, 0, vocab_size])):
        wanted = np.concatenate([everywhere[: int(count)] for count in counts])
        assert np.array_equal(roundtrip(book, wanted, contexts, counts), wanted)


def test_likely_tokens_get_small_codes() -> None:
    ids, contexts = supports(0, 4000, 5000, 16)
    book = Codebook.learn(ids[:3000], contexts[:3000], 5000, uses=100.0)
    unseen, where = ids[3000:].reshape(-1), np.repeat(contexts[3000:], 16)
    codes = book.encode(unseen, where)
    assert np.median(codes) < 64
    assert np.median(unseen) > 500


def test_lists_are_only_as_long_as_they_pay() -> None:
    """The same supports, in a cache so small that they come once, and in one where they come a thousand times."""
    ids, contexts = supports(1, 2000, 5000, 16)
    sizes = [len(Codebook.learn(ids, contexts, 5000, uses).entries) for uses in (1.0, 10.0, 1000.0)]
    assert sizes[0] < sizes[1] < sizes[2]
    once = np.arange(64).reshape(16, 4)
    assert len(Codebook.learn(once, np.arange(16), 5000, uses=1.0).entries) == 0


def test_no_more_places_than_a_word_has_bits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are left out, the last contexts' first, and every id still comes back; a stored book that is larger is refused."""
    ids, contexts = supports(2, 2000, 500, 8)
    whole = Codebook.learn(ids, contexts, 500, uses=1000.0)
    monkeypatch.setattr(codebook, "TABLE_LIMIT", 500 + len(whole.entries) // 2)
    book = Codebook.learn(ids, contexts, 500, uses=1000.0)
    assert 0 < len(book.entries) <= len(whole.entries) // 2
    everywhere = np.arange(500)
    for context in (whole.contexts[0], whole.contexts[-1]):
        assert np.array_equal(roundtrip(book, everywhere, np.array([context]), np.array([500])), everywhere)
    with pytest.raises(ValueError, match="too long"):
        Codebook.from_arrays(500, whole.arrays())


def test_what_is_stored_gives_the_same_book() -> None:
    ids, contexts = supports(2, 1000, 900, 8)
    book = Codebook.learn(ids, contexts, 900, 50.0)
    again = Codebook.from_arrays(900, book.arrays())
    assert again.digest == book.digest
    sample, where = ids.reshape(-1), np.repeat(contexts, 8)
    assert np.array_equal(again.encode(sample, where), book.encode(sample, where))


@pytest.mark.parametrize(
    "name, damage",
    [
        ("order", lambda a: a + 1000),
        ("order", np.zeros_like),
        ("contexts", lambda a: a + 1000),
        ("contexts", lambda a: a[:, 1:]),
        ("lengths", lambda a: a[:, 1:]),
        ("lengths", np.zeros_like),
        ("entries", lambda a: a + 1000),
        ("entries", lambda a: a[:, 1:]),
    ],
)
def test_arrays_that_are_no_book_are_refused(name: str, damage: Callable[[np.ndarray], np.ndarray]) -> None:
    ids, contexts = supports(2, 1000, 900, 8)
    arrays = Codebook.learn(ids, contexts, 900, 50.0).arrays()
    with pytest.raises(ValueError):
        Codebook.from_arrays(900, {**arrays, name: damage(arrays[name])})
