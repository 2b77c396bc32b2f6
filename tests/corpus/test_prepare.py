"""From text to rows: nothing is lost, nothing is on both sides, and unusable text is named in one line."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from logit_cache.base.durable import json_digest
from logit_cache.base.errors import CorruptError, IncompleteError, MismatchError, RecipeError
from logit_cache.corpus import portion_work as corpus
from logit_cache.corpus.documents import Document
from logit_cache.corpus.labels import IGNORE, next_token_labels
from logit_cache.corpus.prepare import prepare_corpus
from logit_cache.corpus.rows import PackedRows
from logit_cache.corpus.tokenizer import tokenizer_digest
from logit_cache.recipe.loading import load_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = ["the quick brown fox jumps over the lazy dog", "a cache of distributions, taught once", "ä ö ü and 東京"]
EOS = "<|end|>"


def train_tokenizer(eos: str | None = EOS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[PackedRows, PackedRows]]:
    """Prepare with these settings of [corpus]; returns the training and the held-out rows."""

    def run(
        source: Path | str | list[str],
        *,
        seed: int = 0,
        max_positions: int | None = None,
        tokenizer: PreTrainedTokenizerFast = tokenizer,
        **corpus: object,
    ) -> tuple[PackedRows, PackedRows]:
        settings = {"source": source if isinstance(source, list) else str(source), "row_length": 8, **corpus}
        lines = [
            f"run_dir = {json.dumps(str(tmp_path / 'run'))}",
            f"seed = {seed}",
            '[teacher]\nmodel = "none"\n[corpus]',
            *(f"{key} = {json.dumps(value)}" for key, value in settings.items()),
        ]
        (tmp_path / "recipe.toml").write_text("\n".join(lines), encoding="utf-8")
        recipe = load_recipe(tmp_path / "recipe.toml")
        prepare_corpus(recipe, tokenizer, max_positions)
        return PackedRows(recipe.paths.cache / "corpus"), PackedRows(recipe.paths.heldout / "corpus")

    return run


def rows_of(packed: PackedRows) -> tuple[np.ndarray, np.ndarray]:
    return packed.take(np.arange(packed.rows))


def texts_of(packed: PackedRows, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The documents of a corpus, the last one perhaps cut off."""
    return [text for text in tokenizer.decode(rows_of(packed)[0].reshape(-1).tolist()).split(EOS) if text]


def some_documents(count: int) -> list[str]:
    return [f"{LINES[i % 3]} number {i} " * (1 + i % 4) for i in range(count)]


def refusal(run: Callable[[], object], tmp_path: Path) -> str:
    """The one line with which text is refused; nothing is left behind."""
    with pytest.raises(RecipeError) as caught:
        run()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    run_dir = tmp_path / "run"
    left = [p for p in run_dir.rglob("*") if p.is_file() or ".tmp" in p.name] if run_dir.exists() else []
    assert not left
    return message


def test_labels_are_the_next_token_of_the_same_document() -> None:
    ids = np.array([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]], np.int32)
    segments = np.array([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]], np.int32)
    labels = next_token_labels(ids, segments)
    assert labels.dtype == np.int64
    assert labels.tolist() == [[11, IGNORE, 13, 14, IGNORE], [IGNORE, IGNORE, 23, IGNORE, IGNORE]]
    assert np.array_equal(next_token_labels(ids[0], segments[0]), labels[0])
    assert ids[0].tolist() == [10, 11, 12, 13, 14]


def test_rows_joined_are_the_documents(prepare, tmp_path: Path, tokenizer) -> None:
    documents = some_documents(7)
    (tmp_path / "text.txt").write_text("\x1e".join(documents), encoding="utf-8")
    train, heldout = prepare(tmp_path / "text.txt", heldout_fraction=0.0, document_separator="\x1e")
    assert heldout.rows == 0
    ids, segments = rows_of(train)
    assert ids.dtype == np.int32 and ids.shape == segments.shape == (train.rows, 8)
    stream = [i for text in documents for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert ids.reshape(-1).tolist() == stream[: len(stream) // 8 * 8]
    # A new segment starts behind every end-of-sequence token and at every row, nowhere else, counted from 0.
    ends = ids == tokenizer.eos_token_id
    expected = np.cumsum(np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], 1), 1)
    assert np.array_equal(segments, expected)
    assert segments.max() >= 1 and (segments[:, 0] == 0).all()


def test_a_document_goes_on_in_the_next_row(prepare, tmp_path: Path, tokenizer) -> None:
    text = "abcdefghijklmnopqrstuvwxyz" * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    train, _ = prepare(tmp_path / "text.txt", heldout_fraction=0.0)
    ids, segments = rows_of(train)
    assert train.rows >= 2 and (segments == 0).all()
    assert tokenizer.decode(ids.reshape(-1).tolist()) == text[: len(tokenizer.decode(ids.reshape(-1).tolist()))]
    # At the end of the row the label is missing although the document goes on.
    assert (next_token_labels(ids, segments)[:, -1] == IGNORE).all()
    assert (next_token_labels(ids, segments)[:, :-1] != IGNORE).all()


def test_datasets_opens_the_directory(prepare, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\x1e".join(some_documents(30)), encoding="utf-8")
    for packed in prepare(tmp_path / "text.txt", heldout_fraction=0.3, document_separator="\x1e"):
        opened = datasets.load_from_disk(str(packed.path))
        ids, segments = rows_of(packed)
        assert opened.column_names == ["input_ids", "document_starts", "crc32c"]
        assert len(opened) == packed.rows > 0
        assert opened["input_ids"][:] == ids.tolist()
        assert np.cumsum(opened["document_starts"][:], 1).tolist() == segments.tolist()


def test_held_out_documents_are_whole_and_on_one_side(prepare, tmp_path: Path, tokenizer) -> None:
    # Documents that fill rows exactly, so that no remainder hides one: 7 tokens and the end of sequence.
    documents = [f"{chr(65 + i % 26)}{i:06}" for i in range(200)]
    assert all(len(tokenizer(text)["input_ids"]) == 7 for text in documents)
    (tmp_path / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    sides = prepare(tmp_path / "text.txt", heldout_fraction=0.25, document_separator="\n")
    train, heldout = (texts_of(side, tokenizer) for side in sides)
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(documents)
    # 200 draws at 0.25: 50, with a standard deviation of 6.
    assert 25 <= len(heldout) <= 75
    assert train == [text for text in documents if text in set(train)], "the order of the source is kept"


def test_copies_of_a_document_land_on_one_side(prepare, tmp_path: Path, tokenizer) -> None:
    documents = [f"{i:07}" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(documents), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join(documents[::-1]), encoding="utf-8")
    sides = prepare(tmp_path / "*.txt", heldout_fraction=0.4, document_separator="\n")
    train, heldout = (texts_of(side, tokenizer) for side in sides)
    assert len(train) + len(heldout) == 80 and train and heldout
    assert not set(train) & set(heldout)
    assert all((train + heldout).count(text) == 2 for text in documents)


def test_the_split_depends_on_the_seed_and_on_nothing_else(prepare, tmp_path: Path, tokenizer) -> None:
    documents = [f"{i:07}" for i in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    settings = {"heldout_fraction": 0.5, "document_separator": "\n"}
    one = set(texts_of(prepare(tmp_path / "text.txt", **settings)[1], tokenizer))
    (tmp_path / "text.txt").write_text("\n".join(["9999999", *documents[::-1]]), encoding="utf-8")
    again = set(texts_of(prepare(tmp_path / "text.txt", **settings)[1], tokenizer))
    other = set(texts_of(prepare(tmp_path / "text.txt", seed=1, **settings)[1], tokenizer))
    assert one & set(documents) == again & set(documents)
    assert one != other


def test_a_small_corpus_holds_out_one_document(prepare, tmp_path: Path, tokenizer) -> None:
    documents = [f"{i:07}" for i in range(5)]
    (tmp_path / "text.txt").write_text("\n".join(documents * 2), encoding="utf-8")
    sides = prepare(tmp_path / "text.txt", heldout_fraction=1e-9, document_separator="\n")
    train, heldout = (texts_of(side, tokenizer) for side in sides)
    assert len(heldout) == 2 and len(set(heldout)) == 1
    assert sorted(train + heldout) == sorted(documents * 2) and heldout[0] not in train


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return path


def write_gzip(path: Path, data: bytes) -> Path:
    with gzip.open(path, "wb") as file:
        file.write(data)
    return path


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def make_source(kind: str, folder: Path, documents: list[str]) -> tuple[object, dict[str, object]]:
    """Write the same documents in one of the ways that can be read."""
    plain = {f"{i:02}.txt": text.encode() for i, text in enumerate(documents)}
    if kind in ("directory", "glob", "list", "nested directory"):
        inner = folder / "deep" / "er" if kind == "nested directory" else folder
        inner.mkdir(parents=True, exist_ok=True)
        for name, data in plain.items():
            (inner / name).write_bytes(data)
        if kind == "list":
            return [str(folder / name) for name in plain], {}
        return folder / "*.txt" if kind == "glob" else folder, {}
    if kind == "jsonl":
        return write_jsonl(folder / "d.jsonl", documents), {}
    if kind in ("d.ndjson", "d.JSONL"):
        return write_jsonl(folder / kind, documents), {}
    if kind == "jsonl.zst":
        # Two frames one after the other are one file.
        lines = write_jsonl(folder / "d.jsonl", documents).read_bytes().splitlines(keepends=True)
        frames = [pa.Codec("zstd").compress(b"".join(part), asbytes=True) for part in (lines[:2], lines[2:])]
        (folder / "d.jsonl.zst").write_bytes(b"".join(frames))
        return folder / "d.jsonl.zst", {}
    if kind == "jsonl.gz":
        return write_gzip(folder / "d.jsonl.gz", write_jsonl(folder / "d.jsonl", documents).read_bytes()), {}
    if kind == "jsonl glob":
        write_jsonl(folder / "a.jsonl", documents[:3])
        write_jsonl(folder / "b.jsonl", documents[3:])
        return folder / "*.jsonl", {}
    if kind == "jsonl in tar":
        data = write_jsonl(folder / "d.jsonl", documents).read_bytes()
        return f"tar://d.jsonl::{write_tar(folder / 'd.tar.gz', {'d.jsonl': data})}", {}
    if kind == "directory of jsonl":
        write_jsonl(folder / "a.jsonl", documents)
        return folder, {}
    if kind == "parquet":
        pa.parquet.write_table(pa.table({"text": documents}), folder / "d.parquet")
        return folder / "d.parquet", {}
    if kind == "another column":
        pa.parquet.write_table(pa.table({"id": list(range(len(documents))), "body": documents}), folder / "d.parquet")
        return folder / "d.parquet", {"text_column": "body"}
    if kind == "gzip":
        return write_gzip(folder / "d.txt.gz", "\x1e".join(documents).encode()), {"document_separator": "\x1e"}
    if kind == "zip":
        return f"zip://**::{write_zip(folder / 'd.zip', {f't/{n}': d for n, d in plain.items()})}", {}
    if kind == "tgz":
        return f"tar://**::{write_tar(folder / 'd.tgz', {f't/{n}': d for n, d in plain.items()})}", {}
    if kind == "tar":
        return f"tar://t/*.txt::{write_tar(folder / 'd.tar.gz', {f't/{n}': d for n, d in plain.items()})}", {}
    assert kind == "separator"
    (folder / "d.txt").write_bytes(b"\n---\n".join(plain.values()))
    return folder / "d.txt", {"document_separator": "\n---\n"}


@pytest.mark.parametrize(
    "kind",
    [
        "directory",
        "nested directory",
        "glob",
        "list",
        "jsonl",
        "jsonl.gz",
        "jsonl.zst",
        "d.ndjson",
        "d.JSONL",
        "jsonl glob",
        "parquet",
        "another column",
        "gzip",
        "tar",
        "tgz",
        "zip",
        "separator",
    ],
)
def test_every_kind_of_source_gives_the_same_rows(prepare, tmp_path: Path, tokenizer, kind: str) -> None:
    documents = [text.strip() for text in some_documents(6)]
    folder = tmp_path / "source"
    folder.mkdir()
    source, settings = make_source(kind, folder, documents)
    train, _ = prepare(source, heldout_fraction=0.0, **settings)
    texts = texts_of(train, tokenizer)
    assert texts[:-1] == documents[: len(texts) - 1]
    assert len(texts) == 6 and documents[-1].startswith(texts[-1])


@pytest.mark.parametrize("settings", [{}, {"format": "jsonl"}], ids=["auto", "named"])
@pytest.mark.parametrize("kind", ["jsonl in tar", "directory of jsonl"])
def test_records_are_not_read_as_plain_text(prepare, tmp_path: Path, tokenizer, kind: str, settings) -> None:
    """Read as records or refused in one line, but braces and keys are never trained on."""
    documents = [text.strip() for text in some_documents(6)]
    folder = tmp_path / "source"
    folder.mkdir()
    source, _ = make_source(kind, folder, documents)
    try:
        train, _ = prepare(source, heldout_fraction=0.0, **settings)
    except RecipeError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert texts_of(train, tokenizer)[0] == documents[0]


@pytest.mark.parametrize("pattern", ["?.txt", "[ab].txt", "*.txt"])
def test_every_kind_of_pattern_is_a_glob(prepare, tmp_path: Path, pattern: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(LINES[0] * 3)
    assert prepare(tmp_path / pattern, heldout_fraction=0.0)[0].meta["documents"] == 2


def test_signs_of_patterns_in_the_name_of_a_file(prepare, tmp_path: Path) -> None:
    folder = tmp_path / "data [v1]"
    folder.mkdir()
    (folder / "what?.txt").write_text(LINES[0] * 3)
    for source in (folder, folder / "what?.txt"):
        assert prepare(source, heldout_fraction=0.0)[0].meta["documents"] == 1


@pytest.mark.parametrize("pattern", ["", "*.txt", "gone.txt"])
def test_a_link_that_leads_nowhere(prepare, tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_text(LINES[0] * 3)
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    assert "gone.txt" in refusal(lambda: prepare(folder / pattern), tmp_path)


def test_a_pattern_that_matches_nothing(prepare, tmp_path: Path) -> None:
    for pattern in ("none-*.txt", "none-?.txt"):
        assert "none-" in refusal(lambda pattern=pattern: prepare(tmp_path / pattern), tmp_path)


def test_text_is_taken_as_it_is_but_for_bom_and_line_ends(prepare, tmp_path: Path, tokenizer) -> None:
    (tmp_path / "text.txt").write_bytes("\ufeffäö \r\n 東京\ttail end".encode())
    train, _ = prepare(tmp_path / "text.txt", heldout_fraction=0.0, row_length=2)
    (text,) = texts_of(train, tokenizer)
    assert "äö \n 東京\ttail end".startswith(text) and len(text) > 10


def test_empty_documents_are_passed_over(prepare, tmp_path: Path, tokenizer) -> None:
    (tmp_path / "text.txt").write_text("one is here\n---\n---\n  \n---\ntwo is here", encoding="utf-8")
    train, _ = prepare(tmp_path / "text.txt", heldout_fraction=0.0, row_length=2, document_separator="---\n")
    assert texts_of(train, tokenizer)[0].strip() == "one is here"
    assert train.meta["documents"] == 2


@pytest.mark.parametrize("source", ["none.txt", "none/*.txt", "none/", "tar://*.txt::none.tar.gz", "no://x"])
def test_a_missing_source(prepare, tmp_path: Path, source: str) -> None:
    where = source if "://" in source else str(tmp_path / source)
    assert "corpus.source" in refusal(lambda: prepare(where), tmp_path)


def test_one_missing_of_two(prepare, tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("some text")
    message = refusal(lambda: prepare([str(tmp_path / "there.txt"), str(tmp_path / "gone.txt")]), tmp_path)
    assert "gone.txt" in message


@pytest.mark.parametrize("content", ["", " \n\t ", "---", "\ufeff"])
def test_empty_files(prepare, tmp_path: Path, content: str) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    message = refusal(lambda: prepare(tmp_path / "*.txt", document_separator="---"), tmp_path)
    assert "no text in" in message


def test_an_empty_directory(prepare, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no file matches" in refusal(lambda: prepare(tmp_path / "empty"), tmp_path)


def test_invalid_utf8_is_located(prepare, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine\n" * 9)
    (tmp_path / "b.txt").write_bytes(b"line one\nline two\nline \xff three\n")
    message = refusal(lambda: prepare(tmp_path / "*.txt"), tmp_path)
    assert "b.txt" in message and "line 3" in message and "not valid UTF-8" in message and "byte 23" in message


@pytest.mark.parametrize(
    "content",
    [b'{"text": "a\xff"}\n', b'{"text": "abc"\n', b"not json at all\n", b"\x00\x01\x02"],
    ids=["invalid UTF-8", "cut off", "no JSON", "binary"],
)
def test_damaged_jsonl(prepare, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    assert "d.jsonl" in refusal(lambda: prepare(tmp_path / "d.jsonl"), tmp_path)


def test_damaged_parquet(prepare, tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 this is none")
    assert "d.parquet" in refusal(lambda: prepare(tmp_path / "d.parquet"), tmp_path)


def test_damaged_gzip(prepare, tmp_path: Path) -> None:
    (tmp_path / "d.txt.gz").write_bytes(b"this is not gzip")
    assert "d.txt.gz" in refusal(lambda: prepare(tmp_path / "d.txt.gz"), tmp_path)


@pytest.mark.parametrize("name", ["d.zip", "d.tar", "d.tar.gz", "d.tgz", "D.ZIP"])
@pytest.mark.parametrize("settings", [{}, {"format": "text"}], ids=["auto", "named"])
def test_an_archive_is_no_text(prepare, tmp_path: Path, name: str, settings: dict[str, object]) -> None:
    members = {f"{number}.txt": text.encode() for number, text in enumerate(some_documents(3))}
    folder = tmp_path / "source"
    folder.mkdir()
    file = (write_zip if name.lower().endswith(".zip") else write_tar)(folder / name, members)
    for source in (file, folder):
        message = refusal(lambda source=source: prepare(source, **settings), tmp_path)
        assert str(file) in message
    # What the message says to do works.
    named = message.split("'")[1]
    assert prepare(named, heldout_fraction=0.0)[0].meta["documents"] == 3


@pytest.mark.parametrize("where", ["d.zip", "zip://*::d.zip", "zip://d.txt::d.zip"])
@pytest.mark.parametrize("content", [b"this is no zip", b""])
def test_damaged_zip(prepare, tmp_path: Path, where: str, content: bytes) -> None:
    (tmp_path / "d.zip").write_bytes(content)
    assert "d.zip" in refusal(lambda: prepare(where.replace("d.zip", str(tmp_path / "d.zip"))), tmp_path)


def test_a_damaged_file_in_a_zip(prepare, tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "d.zip", {"d.txt": LINES[0].encode()})
    archive.write_bytes(archive.read_bytes().replace(b"quick", b"quack"))
    assert "d.txt" in refusal(lambda: prepare(f"zip://d.txt::{archive}"), tmp_path)


@pytest.mark.parametrize("content", [b"this is not zstd", pa.Codec("zstd").compress(b"cut off", asbytes=True)[:-3]])
def test_damaged_zstd(prepare, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.txt.zst").write_bytes(content)
    message = refusal(lambda: prepare(tmp_path / "d.txt.zst"), tmp_path)
    assert "d.txt.zst" in message and "damaged" in message


def test_the_wrong_text_column(prepare, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["a", "b"])
    message = refusal(lambda: prepare(source, text_column="body"), tmp_path)
    assert "'body'" in message and "columns: id, text" in message and "corpus.text_column" in message
    assert "'id'" in refusal(lambda: prepare(source, text_column="id"), tmp_path)


def test_one_document_cannot_be_split(prepare, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(LINES[0] * 20)
    message = refusal(lambda: prepare(tmp_path / "text.txt", heldout_fraction=1e-9), tmp_path)
    assert "one document" in message and "document_separator" in message
    assert prepare(tmp_path / "text.txt", heldout_fraction=0.0)[0].rows > 1


def test_too_little_text_for_a_row(prepare, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("short")
    message = refusal(lambda: prepare(tmp_path / "text.txt", heldout_fraction=0.0, row_length=64), tmp_path)
    assert "less than one row of 64" in message and "train" in message


def test_rows_beyond_the_models_positions(prepare, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(LINES[0] * 20)
    run = {"heldout_fraction": 0.0, "row_length": 16}
    message = refusal(lambda: prepare(tmp_path / "text.txt", max_positions=15, **run), tmp_path)
    assert "corpus.row_length = 16" in message and "15 positions" in message
    assert prepare(tmp_path / "text.txt", max_positions=16, **run)[0].row_length == 16


def test_a_tokenizer_without_end_of_sequence(prepare, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(LINES[0] * 20)
    bare = train_tokenizer(eos=None)
    message = refusal(lambda: prepare(tmp_path / "text.txt", tokenizer=bare), tmp_path)
    assert "end-of-sequence" in message


def snapshot(packed: PackedRows) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in packed.path.iterdir() if p.is_file()}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n".join(some_documents(40)), encoding="utf-8")
    return tmp_path / "text.txt"


SPLIT = {"document_separator": "\n", "heldout_fraction": 0.3}


def test_run_again_it_is_found_done(prepare, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = [snapshot(side) for side in prepare(text, **SPLIT)]
    with caplog.at_level("INFO"):
        second = prepare(text, **SPLIT)
    assert [snapshot(side) for side in second] == first
    assert caplog.text.count("is done") == 2


@pytest.mark.parametrize(
    "change", [{"row_length": 9}, {"max_rows": 3}, {"seed": 4}, {"heldout_fraction": 0.4}], ids=str
)
def test_other_settings_prepare_again_until_a_cache_is_there(prepare, text: Path, change: dict[str, object]) -> None:
    before = [side.meta["digest"] for side in prepare(text, **SPLIT)]
    after = prepare(text, **{**SPLIT, **change})
    assert [side.meta["digest"] for side in after] != before
    assert after[0].row_length == change.get("row_length", 8)

    (after[0].path.parent / "manifest.json").write_text("{}")
    kept = [snapshot(side) for side in after]
    with pytest.raises(MismatchError, match="a cache is built on it") as caught:
        prepare(text, **SPLIT)
    assert next(iter(change)) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 4
    assert [snapshot(side) for side in after] == kept


@pytest.mark.parametrize("missing", [0, 1], ids=["train", "heldout"])
def test_a_missing_side_is_made_again_as_it_was_and_the_other_stays(prepare, text: Path, missing: int) -> None:
    before = prepare(text, **SPLIT)
    kept = snapshot(before[1 - missing])
    shutil.rmtree(before[missing].path)
    # As another version of transformers would save it.
    tokenizer = train_tokenizer()
    tokenizer.model_max_length = 77
    after = prepare(text, tokenizer=tokenizer, **SPLIT)
    assert snapshot(after[1 - missing]) == kept
    assert [side.stamp for side in after] == [side.stamp for side in before], "a cache on them still knows them"


def test_a_cache_on_one_side_is_not_overlooked_where_the_other_is_missing(prepare, text: Path) -> None:
    train, heldout = prepare(text, **SPLIT)
    (heldout.path.parent / "manifest.json").write_text("{}")
    shutil.rmtree(train.path)
    kept = snapshot(heldout)
    with pytest.raises(MismatchError, match="a cache is built on it"):
        prepare(text, seed=4, **SPLIT)
    assert snapshot(heldout) == kept and not train.path.exists()


def test_changed_text_is_noticed(prepare, text: Path) -> None:
    before = prepare(text, **SPLIT)[0].meta["digest"]
    with text.open("a") as file:
        file.write("\n" + LINES[1])
    train, _ = prepare(text, **SPLIT)
    assert train.meta["digest"] != before
    (train.path.parent / "manifest.json").write_text("{}")
    with text.open("a") as file:
        file.write("\n" + LINES[2])
    with pytest.raises(MismatchError, match="sources"):
        prepare(text, **SPLIT)


def test_another_tokenizer_is_noticed(prepare, text: Path) -> None:
    train, _ = prepare(text, **SPLIT)
    (train.path.parent / "manifest.json").write_text("{}")
    other = train_tokenizer()
    other.add_tokens(["fox"])
    with pytest.raises(MismatchError, match="tokenizer"):
        prepare(text, tokenizer=other, **SPLIT)


def test_the_tokenizer_digest_is_of_its_content(tokenizer, tmp_path: Path) -> None:
    digest = tokenizer_digest(tokenizer)
    assert tokenizer_digest(train_tokenizer()) == digest
    tokenizer.save_pretrained(tmp_path)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_digest(saved) == digest
    # Truncation and padding are settings of a call.
    saved.backend_tokenizer.enable_truncation(5)
    saved.backend_tokenizer.enable_padding()
    assert tokenizer_digest(saved) == digest
    saved.add_tokens(["fox"])
    assert tokenizer_digest(saved) != digest


def test_truncation_stored_in_the_tokenizer_does_not_cut_documents(prepare, tmp_path: Path, tokenizer) -> None:
    (tmp_path / "text.txt").write_text(LINES[0] * 20)
    cutting = train_tokenizer()
    cutting.backend_tokenizer.enable_truncation(5)
    cutting.backend_tokenizer.enable_padding(length=128)
    train, _ = prepare(tmp_path / "text.txt", heldout_fraction=0.0, tokenizer=cutting)
    assert train.rows == (len(tokenizer(LINES[0] * 20)["input_ids"]) + 1) // 8


@pytest.mark.parametrize("limit", [1, 3])
def test_max_rows(prepare, text: Path, limit: int) -> None:
    whole = [rows_of(side) for side in prepare(text, **SPLIT)]
    limited = prepare(text, max_rows=limit, max_heldout_rows=2, **SPLIT)
    assert [side.rows for side in limited] == [limit, 2]
    for side, (ids, segments) in zip(limited, whole, strict=True):
        assert np.array_equal(rows_of(side)[0], ids[: side.rows])
        assert np.array_equal(rows_of(side)[1], segments[: side.rows])


def documents_read(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    """Grows by every document that is read from now on."""
    seen: list[Document] = []
    real = corpus.read_documents
    monkeypatch.setattr(
        corpus, "read_documents", lambda *of: (seen.append(document) or document for document in real(*of))
    )
    return seen


@pytest.mark.parametrize(("share", "heldout_rows"), [(0.05, 2), (0.5, 20), (1e-9, 1)])
def test_limited_training_rows_limit_the_held_out_ones(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, heldout_rows: int
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"{i:07}" for i in range(3000)), encoding="utf-8")
    settings = {"heldout_fraction": share, "document_separator": "\n", "max_rows": 20}
    seen = documents_read(monkeypatch)
    train, heldout = prepare(tmp_path / "text.txt", **settings)
    assert (train.rows, heldout.rows) == (20, heldout_rows)
    if share > 1e-6:
        assert len(seen) < 300, "the rest of the source is not read"
    # What is said in so many words counts.
    assert prepare(tmp_path / "text.txt", max_heldout_rows=40, **{**settings, "heldout_fraction": 0.5})[1].rows == 40


def test_nothing_is_read_for_a_side_that_holds_out_nothing(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"{i:07}" for i in range(3000)), encoding="utf-8")
    seen = documents_read(monkeypatch)
    train, heldout = prepare(tmp_path / "text.txt", heldout_fraction=0.0, document_separator="\n", max_rows=2)
    assert (train.rows, heldout.rows, len(seen)) == (2, 0, 2)


def test_more_rows_than_one_batch(prepare, tmp_path: Path, tokenizer) -> None:
    """Rows are written in batches of 1024: over that boundary, and exactly on it, none is lost or doubled."""
    documents = [f"{i:07}" for i in range(700)]
    (tmp_path / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    settings = {"heldout_fraction": 0.0, "document_separator": "\n", "row_length": 4}
    train, _ = prepare(tmp_path / "text.txt", **settings)
    assert train.rows == 1400
    assert texts_of(train, tokenizer) == documents
    assert len(datasets.load_from_disk(str(train.path))) == 1400
    some = np.array([1399, 0, 1023, 1024, 1025, 1023])
    assert np.array_equal(train.take(some)[0], rows_of(train)[0][some])
    (portion,) = json.loads((train.path / "portions.json").read_text())
    assert train.digest(0, train.rows) == portion["digest"]
    assert train.meta["digest"] == json_digest([[1400, portion["digest"]]])
    assert train.digest(1000, 1030) != train.digest(1000, 1031)
    for limit in (1024, 1025):
        assert prepare(tmp_path / "text.txt", max_rows=limit, **settings)[0].rows == limit


def test_one_long_document_over_several_batches(prepare, tmp_path: Path, tokenizer) -> None:
    text = "0123456789" * 500
    (tmp_path / "text.txt").write_text(text)
    train, _ = prepare(tmp_path / "text.txt", heldout_fraction=0.0, row_length=2)
    assert train.rows == 2500 and (rows_of(train)[1] == 0).all()
    assert tokenizer.decode(rows_of(train)[0].reshape(-1).tolist()) == text


def test_nothing_prepared(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="prepare"):
        PackedRows(tmp_path)


def test_a_corpus_without_its_data(prepare, text: Path) -> None:
    train, _ = prepare(text, **SPLIT)
    (file,) = train.path.glob("*.arrow")
    file.unlink()
    with pytest.raises(CorruptError, match="delete the corpus directory and run `prepare` again"):
        PackedRows(train.path)


@pytest.mark.parametrize("damage", ["truncated arrow", "empty arrow", "no JSON", "fewer rows"])
def test_a_damaged_corpus(prepare, text: Path, damage: str) -> None:
    train, _ = prepare(text, **SPLIT)
    (arrow,) = train.path.glob("*.arrow")
    meta = train.path / "prepared.json"
    if damage == "truncated arrow":
        arrow.write_bytes(arrow.read_bytes()[:200])
    elif damage == "empty arrow":
        arrow.write_bytes(b"")
    elif damage == "no JSON":
        meta.write_text("{")
    else:
        meta.write_text(json.dumps({**train.meta, "rows": train.rows - 1}))
    with pytest.raises(CorruptError) as caught:
        PackedRows(train.path)
    assert str(train.path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
