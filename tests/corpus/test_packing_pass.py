"""Documents in batches: the rows are those of one document after the other, and a limit is met exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache.corpus import packing_pass
from logit_cache.corpus.documents import Document
from logit_cache.corpus.encoding import Encoder
from logit_cache.corpus.masking import Framer, Masking
from logit_cache.corpus.packers import EndToEnd, Packer, WholeDocuments
from logit_cache.corpus.packing_pass import pack
from logit_cache.corpus.row_writer import RowWriter
from logit_cache.corpus.special_tokens import SpecialTokens
from logit_cache.recipe.schema import CorpusConfig

from tests.corpus.test_special_tokens import IM_END, chat_tokenizer

LENGTH = 9
MASKING = Masking(1, 2, 0, 3, (0, 1, 2, 3), 50)
PACKERS = {
    "end to end": lambda: EndToEnd(LENGTH),
    "end to end, a start": lambda: EndToEnd(LENGTH, (7, 8)),
    "whole": lambda: WholeDocuments(LENGTH, 0, cut=True),
    "framed": lambda: Framer(LENGTH, MASKING),
}


def rows_of(packer: Packer, batches: list[list[list[int]]]) -> list[list[list[int]]]:
    blocks = []
    for batch in batches:
        tokens = np.array([token for document in batch for token in document], np.int32)
        lengths = np.array([len(document) for document in batch], np.int32)
        found = list(packer.add(tokens, np.ones(len(tokens), np.int32), lengths))
        blocks += found
    blocks += packer.finish()
    return [np.stack(row).tolist() for block in blocks for row in zip(*block, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(7, 9), min_size=1, max_size=40)).map(
            lambda pair: [7, 8, *pair[1]] if pair[0] else pair[1]
        ),
        max_size=30,
    ),
    cut=st.integers(0, 30),
    kind=st.sampled_from(sorted(PACKERS)),
)
def test_documents_together_are_documents_one_by_one(documents: list[list[int]], cut: int, kind: str) -> None:
    alone = rows_of(PACKERS[kind](), [[document] for document in documents])
    assert rows_of(PACKERS[kind](), [documents[:cut], documents[cut:]]) == alone


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), kind=st.sampled_from(sorted(PACKERS)))
def test_no_batch_has_more_rows_than_it_may(lengths: list[int], kind: str) -> None:
    packer, tokens = PACKERS[kind](), np.full(sum(lengths), 9, np.int32)
    most = packer.most_rows(len(tokens), len(lengths))
    assert sum(len(block[0]) for block in packer.add(tokens, np.ones_like(tokens), np.array(lengths))) <= most


@pytest.mark.parametrize("batch", [1, 50, 2**20])
@pytest.mark.parametrize("limit", [None, 7])
def test_rows_do_not_depend_on_the_batches(
    batch: int, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_pass, "BATCH_CHARACTERS", batch)
    tokenizer, config = chat_tokenizer(), CorpusConfig(source="none", row_length=LENGTH)
    texts = [f"{'the quick brown fox ' * (number % 5)}{IM_END * (number % 7 == 0)} {number}" for number in range(60)]
    writers = {side: RowWriter(tmp_path / side, LENGTH, limit) for side in ("train", "heldout")}
    found = pack(
        (Document(text, "here") for text in texts),
        Encoder(config, tokenizer, None),
        writers,
        lambda draw: draw < 0.3,
        seed=0,
    )
    assert limit is not None or found.documents == 60
    for side, writer in writers.items():
        (expected,) = (RowWriter(tmp_path / f"{side}-alone", LENGTH, limit),)
        for text in texts:
            if (packing_pass.heldout_draw(text, 0) < 0.3) == (side == "heldout") and not expected.full:
                ids = SpecialTokens(tokenizer, as_text=True).encode([text])[0]
                expected.add(np.array([*ids, tokenizer.eos_token_id], np.int32))
        for one in (writer, expected):
            one.commit({})
        assert (writer.rows, writer.documents, writer.tokens) == (expected.rows, expected.documents, expected.tokens)
        assert (writer.path / "portions.json").read_bytes() == (expected.path / "portions.json").read_bytes()
