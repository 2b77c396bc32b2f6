"""A corpus in portions: the same rows whatever tasks, restarts and kills; what is damaged is found; hubs stream."""

from __future__ import annotations

import json
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_cache.base.errors import CorruptError, RecipeError
from logit_cache.base.places import files_in, place
from logit_cache.corpus import portions as portions_module
from logit_cache.corpus.labels import PADDING
from logit_cache.corpus.portions import portions_of
from logit_cache.corpus.prepare import prepare_corpus
from logit_cache.corpus.rows import PackedRows
from logit_cache.corpus.sources import find_sources
from logit_cache.corpus.spans import WHOLE
from logit_cache.recipe.loading import load_recipe
from logit_cache.recipe.schema import CorpusConfig, Recipe
from logit_cache.stages.app import main
from transformers import PreTrainedTokenizerFast

from tests.base.test_durable import FORK, in_processes
from tests.conftest import files_of
from tests.corpus.test_prepare import LINES, train_tokenizer, write_gzip, write_jsonl
from tests.helpers.s3 import S3
from tests.helpers.tiny import make_recipe

SMALL = 600
"""Bytes of a portion here."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions_module, "PORTION_BYTES", SMALL)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


def some_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{draw.choice(LINES)} {draw.random()} " * draw.randint(1, 3) for _ in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many formats, large and small ones."""
    folder = tmp_path_factory.mktemp("text")
    texts = some_texts(120)
    write_jsonl(folder / "a.jsonl", texts[:50])
    pa.parquet.write_table(pa.table({"text": texts[50:70]}), folder / "b.parquet", row_group_size=3, compression="none")
    (folder / "c.txt").write_text("\r\n--\n".join(texts[70:100]))
    for number in range(100, 110):
        (folder / f"d{number}.txt").write_text(texts[number])
    write_gzip(folder / "e.txt.gz", "\n--\n".join(texts[110:]).encode())
    return folder


def recipe_of(run: Path, source: object, location: str | None = None, **corpus: object) -> Recipe:
    settings = {
        "source": f"{source}/*" if isinstance(source, Path) else source,
        "row_length": 12,
        "document_separator": "\n--\n",
        "heldout_fraction": 0.2,
        **corpus,
    }
    lines = [f'run_dir = "{run}"', '[teacher]\nmodel = "none"\n[corpus]']
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    lines += [] if location is None else [f'[cache]\nlocation = "{location}"']
    run.mkdir(parents=True, exist_ok=True)
    (run / "r.toml").write_text("\n".join(lines))
    return load_recipe(run / "r.toml")


def corpora(run: Path) -> dict[str, bytes]:
    found = {f"{side}/{name}": data for side in ("cache", "heldout") for name, data in files_of(run / side).items()}
    found.pop("cache/corpus.lock", None)  # an empty file that a killed process leaves
    return found


def records(run: Path) -> list[Path]:
    return sorted((run / "cache/corpus").glob("portion-*.json"))


def test_portions_hold_every_document_once_in_order(source: Path) -> None:
    config = CorpusConfig(source=f"{source}/*", document_separator="\n--\n")
    sources = find_sources(config)
    whole = [value for value, _ in sources.documents(config)]
    found = portions_of(sources, config)
    assert len(found) > 15 and len(whole) == 120
    assert [value for portion in found for value, _ in portion.of(sources).documents(config) if value] == whole
    names = [sources.parts[span.part].name for portion in found for span in portion.spans]
    assert len(names) > len(set(names)) and max(len(portion.spans) for portion in found) > 1
    assert sum(portion.size for portion in found) == pytest.approx(sum(p.info["size"] for p in sources.parts), abs=99)


@given(
    text=st.lists(
        st.sampled_from(["a", "ä", "\n", "\r\n", "-", "<>", "\n--\n", "\r\n--\r\n", "\r\n<>"]), max_size=40
    ).map("".join),
    separator=st.sampled_from(["\n--\n", "\n", "-", "--", "\n<>"]),
    size=st.integers(1, 12),
)
def test_a_file_may_be_cut_anywhere(
    text: str, separator: str, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "cut.txt"
    file.write_bytes(text.encode())
    config = CorpusConfig(source=str(file), document_separator=separator)
    (part,) = find_sources(config).parts
    pieces = part.spans(config, size)
    assert pieces == [WHOLE] or len(pieces) == round(len(text.encode()) / size)
    found = [value for span in pieces for value, _ in part.documents(config, span) if value]
    expected = [value for value, _ in part.documents(config) if value]
    assert "".join(found).replace("\n", "").replace("-", "") == "".join(expected).replace("\n", "").replace("-", "")
    if separator[0] != separator[-1] or len(separator) == 1:  # else where two overlap, either may be the separator
        assert found == expected


@pytest.mark.parametrize("limits", [{}, {"max_rows": 40}, {"max_rows": 90, "max_heldout_rows": 9}], ids=str)
def test_rows_do_not_depend_on_tasks_and_their_order(
    source: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, limits: dict[str, int]
) -> None:
    prepare_corpus(recipe_of(tmp_path / "one", source, **limits), tokenizer, None)
    expected = corpora(tmp_path / "one")
    assert not records(tmp_path / "one")
    for tasks in (2, 5):
        recipe = recipe_of(tmp_path / f"{tasks}", source, **limits)
        for task in random.Random(tasks).sample(range(tasks), tasks):
            prepare_corpus(recipe, tokenizer, None, task=task, num_tasks=tasks)
        assert (
            len(records(tmp_path / f"{tasks}")) > 3 and not (tmp_path / f"{tasks}/cache/corpus/prepared.json").exists()
        )
        prepare_corpus(recipe, tokenizer, None)
        assert corpora(tmp_path / f"{tasks}") == expected
        prepare_corpus(recipe, tokenizer, None, task=1, num_tasks=tasks)  # nothing is left to do
        assert corpora(tmp_path / f"{tasks}") == expected
    rows = PackedRows(tmp_path / "one/cache/corpus")
    rows.verify()
    opened = datasets.load_from_disk(str(rows.path))
    assert len(opened) == rows.rows == limits.get("max_rows", rows.rows)
    assert np.array_equal(np.array(opened["input_ids"][:]), rows.take(np.arange(rows.rows))[0])


def test_a_small_corpus_is_one_portion(
    source: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows go on over the ends of files; portions lose less than a row each."""
    prepare_corpus(recipe_of(tmp_path / "many", source), tokenizer, None)
    monkeypatch.setattr(portions_module, "PORTION_BYTES", 2**26)
    prepare_corpus(recipe_of(tmp_path / "one", source), tokenizer, None)
    many, one = (PackedRows(tmp_path / run / "cache/corpus") for run in ("many", "one"))
    assert len(list(one.path.glob("*.arrow"))) == 1 and len(list(many.path.glob("*.arrow"))) > 9
    assert 0 < one.rows - many.rows < 40
    assert one.meta["documents"] == many.meta["documents"]


def killed(work: Callable[[], object], seconds: float) -> bool:
    """Run `work` in a real process and kill it after some time; returns whether it was still at work."""
    process = FORK.Process(target=work)
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join(30)
    return process.exitcode == -9


def test_killed_at_any_moment_and_resumed(
    source: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    """50 kills of the whole or of a task; in the end the bytes are those of an undisturbed run."""
    begun = time.monotonic()
    prepare_corpus(recipe_of(tmp_path / "whole", source), tokenizer, None)
    seconds = time.monotonic() - begun
    expected, draw, kills, number = corpora(tmp_path / "whole"), random.Random(0), 0, 0
    while kills < 50:
        recipe = recipe_of(tmp_path / f"{number}", source)
        number += 1
        for _ in range(6):
            task, tasks = draw.choice([(0, 1), (0, 2), (1, 2), (2, 3)])
            kills += killed(
                lambda recipe=recipe, task=task, tasks=tasks: prepare_corpus(
                    recipe, tokenizer, None, task=task, num_tasks=tasks
                ),
                draw.uniform(0, 0.6) * seconds / tasks,
            )
        prepare_corpus(recipe, tokenizer, None)
        assert corpora(recipe.run_dir) == expected, "and nothing that was staged is left"
        shutil.rmtree(recipe.run_dir)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("limits", [{}, {"max_rows": 40}], ids=str)
def test_several_writers_of_the_same_portions(
    source: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    limits: dict[str, int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Two jobs of one task at once, as where Slurm takes a node for dead that is not."""
    prepare_corpus(recipe_of(tmp_path / "one", source, **limits), tokenizer, None)
    recipe = recipe_of(tmp_path / "many", source, **limits)
    gate = FORK.Barrier(4)

    def work(number: int) -> None:
        gate.wait()
        prepare_corpus(recipe, tokenizer, None, task=number % 2, num_tasks=2)

    assert in_processes(4, work) == [0] * 4, capfd.readouterr().err
    prepare_corpus(recipe, tokenizer, None)
    assert corpora(tmp_path / "many") == corpora(tmp_path / "one")


def test_portions_in_an_object_store(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After tasks, kills and a damaged record, the corpus is that of a disk, byte by byte."""
    source = tmp_path / "text"
    source.mkdir()
    write_jsonl(source / "a.jsonl", some_texts(30))
    prepare_corpus(recipe_of(tmp_path / "disk", source), tokenizer, None)
    expected = corpora(tmp_path / "disk")
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    with S3() as s3:
        there = place(f"{s3.bucket}/{uuid.uuid4().hex}")
        recipe = recipe_of(tmp_path / "run", source, location=str(there))
        prepare_corpus(recipe, tokenizer, None, task=1, num_tasks=3)
        packed = sorted(name for name in files_in(there) if "/portion-" in name)
        assert len(packed) > 1 and not any(name.endswith("prepared.json") for name in files_in(there))
        (there / packed[0]).write_bytes(b"{}")
        for seconds in (0.2, 0.4):
            killed(lambda: prepare_corpus(recipe, tokenizer, None), seconds)
        for _ in range(2):
            prepare_corpus(recipe, tokenizer, None)
            assert {name: (there / name).read_bytes() for name in files_in(there)} == expected
        rows, own = PackedRows(there / "cache/corpus"), PackedRows(tmp_path / "disk/cache/corpus")
        rows.verify()
        assert np.array_equal(rows.take(np.arange(rows.rows))[0], own.take(np.arange(own.rows))[0])


def test_what_is_committed_is_not_packed_again(
    source: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tmp_path, source)
    prepare_corpus(recipe, tokenizer, None, task=0, num_tasks=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/corpus/data-*")}
    records(tmp_path)[1].write_text("{}")  # damaged: its portion is packed again, to the same file
    with caplog.at_level("INFO"):
        prepare_corpus(recipe, tokenizer, None)
    assert f"{len(before) // 2 - 1} of" in caplog.text and "packed already" in caplog.text
    after = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    assert after.items() <= before.items() and len(after) > 5


@pytest.mark.parametrize("change", ["text", "settings"])
def test_portions_of_other_text_or_settings_do_not_count(
    change: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", some_texts(40))
    (folder / "b.txt").write_text("\n--\n".join(some_texts(40, 1)))
    prepare_corpus(recipe_of(tmp_path / "run", folder), tokenizer, None, task=0, num_tasks=2)
    settings: dict[str, object] = {}
    if change == "text":
        (folder / "b.txt").write_text("\n--\n".join(some_texts(41, 2)))
    else:
        settings = {"row_length": 13}
    for run in ("run", "fresh"):
        prepare_corpus(recipe_of(tmp_path / run, folder, **settings), tokenizer, None)
    assert corpora(tmp_path / "run") == {name: data for name, data in corpora(tmp_path / "fresh").items()}, (
        "nothing of the other corpus is left"
    )


def test_no_document_falls_below_the_fraction(source: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The one with the lowest draw of the whole corpus is held out, and its portion is packed again."""
    expected = None
    for tasks in (1, 3):
        recipe = recipe_of(tmp_path / f"{tasks}", source, heldout_fraction=1e-9)
        for task in range(tasks if tasks > 1 else 0):
            prepare_corpus(recipe, tokenizer, None, task=task, num_tasks=tasks)
        prepare_corpus(recipe, tokenizer, None)
        heldout, train = (PackedRows(recipe.run_dir / side / "corpus") for side in ("heldout", "cache"))
        assert (heldout.meta["documents"], train.meta["documents"]) == (1, 119)
        found = corpora(recipe.run_dir)
        assert expected in (None, found)
        expected = found


def test_masks_do_not_repeat_from_portion_to_portion(tmp_path: Path) -> None:
    from logit_cache.corpus.masking import Masking, mask_rows

    masking = Masking(1, 2, 0, 3, (0, 1, 2, 3), 50)
    tokens = np.full((4, 40), 9, np.int32)
    first, again, other = (mask_rows(tokens, 0, masking, portion)[1] for portion in (0, 0, 1))
    assert np.array_equal(first, again) and not (first == other).all(1).any()


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "swapped", "name"])
def test_a_damaged_portion_is_found(
    source: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, damage: str
) -> None:
    prepare_corpus(recipe_of(tmp_path, source), tokenizer, None)
    rows = PackedRows(tmp_path / "cache/corpus")
    files = sorted(rows.path.glob("*.arrow"))
    data = bytearray(files[3].read_bytes())
    if damage == "byte":
        data[len(data) // 2] ^= 1
        files[3].write_bytes(data)
    elif damage == "cut":
        files[3].write_bytes(data[:-9])
    elif damage == "gone":
        files[3].unlink()
    elif damage == "swapped":
        files[3].write_bytes(files[4].read_bytes())
    else:
        listed = rows.path / "portions.json"
        listed.write_bytes(listed.read_bytes().replace(files[3].name.encode(), b"../../../../etc/passwd"))
    with pytest.raises(CorruptError) as caught:
        PackedRows(rows.path).verify()
    assert len(str(caught.value).splitlines()) == 1 and str(rows.path) in str(caught.value)


class FakeHub(list[list[dict[str, Any]]]):
    """A streamed data set of several files, as `datasets.load_dataset` gives it."""

    @property
    def num_shards(self) -> int:
        return len(self)

    def shard(self, num_shards: int, index: int) -> FakeHub:
        assert num_shards == len(self)
        return FakeHub([self[index]])

    def __iter__(self) -> Iterator[Any]:
        return (record for number in range(len(self)) for record in self[number])


def test_a_data_set_of_the_hub_is_shared_by_its_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = some_texts(60)
    hub = FakeHub([[{"text": text} for text in texts[first : first + 20]] for first in (0, 20, 40)])
    monkeypatch.setattr("datasets.load_dataset", lambda *names, streaming, **options: hub)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *names, **options: FakeBuilder)
    for run, tasks in (("one", 1), ("two", 2)):
        recipe = recipe_of(tmp_path / run, "some/where", format="hub")
        for task in range(tasks if tasks > 1 else 0):
            prepare_corpus(recipe, tokenizer, None, task=task, num_tasks=tasks)
        prepare_corpus(recipe, tokenizer, None)
    assert corpora(tmp_path / "one") == corpora(tmp_path / "two")
    rows = PackedRows(tmp_path / "one/cache/corpus")
    assert len(list(rows.path.glob("*.arrow"))) == 3
    assert rows.meta["documents"] + PackedRows(tmp_path / "one/heldout/corpus").meta["documents"] == 60


class FakeBuilder:
    config_id = "default"
    hash = "0123"


def test_padding_and_its_documents_are_kept(tmp_path: Path) -> None:
    from logit_cache.corpus.row_writer import RowWriter

    segments = np.array([[0, 0, 1, -1, -1, 2], [-1, -1, 0, 0, 1, 1], [4, 4, 7, 7, -1, 7], [-1] * 6], np.int32)
    writer = RowWriter(tmp_path / "corpus", 6, masked=True, vocab_size=70_000)
    writer.write_rows(np.full((4, 6), 69_999, np.int32), segments, np.ones((4, 6), np.int32))
    writer.commit({})
    ids, found = PackedRows(tmp_path / "corpus").take(np.arange(4))
    assert (ids == 69_999).all() and np.array_equal(found == PADDING, segments == PADDING)
    assert found.tolist() == [[0, 0, 1, -1, -1, 2], [-1, -1, 0, 0, 1, 1], [0, 0, 1, 1, -1, 1], [-1] * 6]
    bare = RowWriter(tmp_path / "bare", 6, vocab_size=100)
    with pytest.raises(ValueError, match="tokens or padding"):
        bare.write_rows(np.zeros((4, 6), np.int32), segments, np.ones((4, 6), np.int32))
    bare.discard()


def test_a_task_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(make_recipe(tmp_path))
    assert main(["prepare", recipe, "--task", "0", "--num-tasks", "2"]) == 0
    assert "after the last one: logit-cache prepare" in capsys.readouterr().out
    assert main(["prepare", recipe, "--task", "2", "--num-tasks", "2"]) == 2
    assert main(["prepare", recipe, "--task", "1"]) == 2
    assert main(["prepare", recipe]) == 0
    assert (tmp_path / "run/cache/corpus/prepared.json").exists()


def test_an_error_keeps_the_portions_before_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.txt").write_text("\n--\n".join(some_texts(9, number)))
    (folder / "6.txt").write_bytes(b"\xff" * SMALL)
    recipe = recipe_of(tmp_path / "run", folder)
    with pytest.raises(RecipeError, match=r"6\.txt.*not valid UTF-8"):
        prepare_corpus(recipe, tokenizer, None)
    kept = len(records(tmp_path / "run"))
    (folder / "6.txt").write_text("\n--\n".join(some_texts(9, 6)))
    prepare_corpus(recipe, tokenizer, None)
    assert kept >= 5 and not records(tmp_path / "run")
