"""One shard: zarr and the built-in reader give the same arrays, and no byte that is read changes unnoticed."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from logit_cache.base.errors import CorruptError, Preempted
from logit_cache.store.arrays import RowShape, flat_rows
from logit_cache.store.chunks import PCODEC, chunk_of, stored_row
from logit_cache.store.shard_file import ShardFile
from logit_cache.store.shard_reader import ShardReader, read_rows
from pcodec import standalone
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.codecs.numcodecs import PCodec

ROWS = 3
LENGTH = 4
# One array of each kind: entries of a row end to end, values of a position, and both widths of integers.
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "codes": ("uint16", (12,)),
    "wide": ("uint32", (7,)),
    "head_mass": ("int16", (4,)),
    "tail_steps": ("int16", (4, 3)),
    "hidden.0": ("<f2", (4, 2)),
    "hidden.1": ("|i1", (4, 2)),
}
LAYOUT = {name: dtype for name, (dtype, _) in SHAPES.items()}
ROW_SHAPES: dict[str, RowShape] = {name: shape for name, (_, shape) in SHAPES.items()}
NAMES = tuple(SHAPES)


def some_arrays(rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (dtype, shape) in SHAPES.items():
        if np.dtype(dtype).kind == "f":
            arrays[name] = rng.standard_normal((rows, *shape)).astype(dtype)
            continue
        info = np.iinfo(dtype)
        arrays[name] = rng.integers(info.min, info.max, (rows, *shape), dtype, endpoint=True)
    return arrays


def write(
    path: Path,
    arrays: dict[str, np.ndarray],
    profile: str = "compact",
    *,
    row_length: int = LENGTH,
    shapes: dict[str, RowShape] = ROW_SHAPES,
    pieces: Sequence[int] = (),
) -> dict[str, Any]:
    """A shard of these arrays; `pieces` are rows at which they are divided. Returns its part of the record."""
    rows = len(next(iter(arrays.values())))
    shard = ShardFile(path, LAYOUT, shapes, profile, rows, row_length)
    for first, last in zip([0, *pieces], [*pieces, rows], strict=True):
        shard.add(shard.compressed(flat_rows({name: values[first:last] for name, values in arrays.items()})))
    return shard.finish()


def reader_of(path: Path, record: dict[str, Any], profile: str = "compact") -> ShardReader:
    return ShardReader(path, LAYOUT, profile, ROWS, record)


def by_zarr(path: Path) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
        return {name: np.asarray(array[:]) for name, array in group.arrays()}


Shard = tuple[Path, dict[str, np.ndarray], dict[str, Any]]


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    path, arrays = tmp_path / "00000.zarr.zip", some_arrays()
    return path, arrays, write(path, arrays)


def read(reader: ShardReader, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """All that is found in rows, flat; of compressed ones a look at less gives the same, and one for more tells."""
    stored = read_rows([(reader, row) for row in rows])
    found = []
    for place in range(len(rows)):
        values = {name: np.empty(math.prod(shape), dtype) for name, (dtype, shape) in SHAPES.items()}
        for name, whole in values.items():
            size, of_row = len(whole), stored[name][place]
            if isinstance(of_row, np.ndarray):
                assert of_row.dtype == whole.dtype and len(of_row) == size
                whole[:] = of_row
                continue
            assert of_row(whole) == size
            for other in (0, 1, size - 1, size + 1, size + 300):
                out = np.full(other, 77, whole.dtype)
                assert of_row(out) == min(size, other + 1)
                assert np.array_equal(out[:size], whole[:other]) and (out[size:] == 77).all()
        found.append(values)
    return found


def assert_same(actual: list[dict[str, np.ndarray]], expected: dict[str, np.ndarray]) -> None:
    """Flat rows against whole arrays."""
    assert {len(values) for values in expected.values()} == {len(actual)}
    for number, row in enumerate(actual):
        for name, values in expected.items():
            assert np.array_equal(row[name], values[number].reshape(-1)), name


@pytest.mark.parametrize("profile", ["compact", "fast"])
@pytest.mark.parametrize("row_length", [LENGTH, 2**12, 2**14], ids=["one block", "blocks of two", "blocks of one"])
def test_both_profiles_open_with_plain_zarr_and_with_the_reader(tmp_path: Path, profile: str, row_length: int) -> None:
    path, arrays = tmp_path / "s.zarr.zip", some_arrays()
    record = write(path, arrays, profile, row_length=row_length)
    found = by_zarr(path)
    index = found.pop("index")
    assert set(found) == set(arrays)
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype and np.array_equal(found[name], values), name
    reader = reader_of(path, record, profile)
    assert np.array_equal(index, reader.chunks)
    assert_same(read(reader, range(ROWS)), arrays)


@pytest.mark.parametrize("profile", ["compact", "fast"])
def test_the_metadata_is_that_of_zarr(tmp_path: Path, profile: str) -> None:
    """What zarr-python writes of the same arrays, but for the arrays' order of keys."""
    arrays = some_arrays()
    write(tmp_path / "ours.zip", arrays, profile, row_length=2**12)
    with warnings.catch_warnings(), zarr.storage.ZipStore(tmp_path / "zarrs.zip", mode="w") as store:
        warnings.simplefilter("ignore")
        group = zarr.open_group(store, mode="w", zarr_format=3)
        codecs: dict[str, Any] = {"filters": None, "compressors": [Crc32cCodec()], "fill_value": 0}
        for name, values in arrays.items():
            plain = profile == "fast" or name.startswith("hidden")
            group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(1, *values.shape[1:]),
                shards=(2, *values.shape[1:]),
                serializer=BytesCodec() if plain else PCodec(**PCODEC),
                **codecs,
            )
        shape = (ROWS, len(arrays), 3)
        group.create_array(
            "index",
            shape=shape,
            dtype="uint32",
            chunks=shape,
            serializer=BytesCodec(),
            attributes={"arrays": list(arrays)},
            **codecs,
        )
    ours, zarrs = (zipfile.ZipFile(tmp_path / name) for name in ("ours.zip", "zarrs.zip"))
    names = [name for name in ours.namelist() if name.endswith("zarr.json")]
    assert sorted(names) == sorted(zarrs.namelist()) and len(names) == len(NAMES) + 2
    for name in names:
        assert json.loads(ours.read(name)) == json.loads(zarrs.read(name)), name


def test_a_block_of_rows_lies_together(tmp_path: Path) -> None:
    """In order, so that its rows are one range, and the file is written from front to back."""
    path = tmp_path / "s.zarr.zip"
    write(path, some_arrays(5), row_length=2**12)
    with zipfile.ZipFile(path) as members:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in members.infolist())
        chunks = [info for info in members.infolist() if "/c/" in info.filename]
    assert [info.header_offset for info in chunks] == sorted(info.header_offset for info in chunks)
    names = [(int(info.filename.split("/")[2]), info.filename.split("/")[0]) for info in chunks]
    assert names == [(block, name) for block in range(3) for name in NAMES] + [(0, "index")]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    profile=st.sampled_from(["compact", "fast"]),
    seed=st.integers(0, 9),
)
def test_rows_of_any_length_are_filled_up_to_the_longest(
    lengths: list[int], profile: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ragged") / "s.zarr.zip"
    rng = np.random.default_rng(seed)
    layout, shapes = {"codes": "uint16", "wide": "uint32", "steps": "int16"}, dict.fromkeys(("codes", "wide", "steps"))
    rows = {
        name: [rng.integers(0, 2**15, length).astype(dtype) for length in lengths] for name, dtype in layout.items()
    }
    shard = ShardFile(path, layout, shapes, profile, len(lengths), 2**12)
    for place in range(len(lengths)):
        shard.add(shard.compressed({name: values[place : place + 1] for name, values in rows.items()}))
    reader = ShardReader(path, layout, profile, len(lengths), shard.finish())
    found, stored = by_zarr(path), read_rows([(reader, row) for row in range(len(lengths))])
    reader.close()
    longest = max(*lengths, 1)
    for name, dtype in layout.items():
        assert found[name].shape == (len(lengths), longest) and found[name].dtype == dtype
        for row, values in enumerate(rows[name]):
            assert np.array_equal(found[name][row, : len(values)], values) and not found[name][row, len(values) :].any()
            of_row, out = stored[name][row], np.empty(len(values), dtype)
            if isinstance(of_row, np.ndarray):
                out[:] = of_row[: len(values)]
            else:
                assert of_row(out) >= len(values)
            assert np.array_equal(out, values)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32"])
@pytest.mark.parametrize("missing", [1, 2**18 - 1, 2**18, 2**18 + 1, 3 * 2**18 + 5])
def test_a_chunk_is_filled_up_without_a_limit(dtype: str, missing: int) -> None:
    values = np.arange(1000, dtype=dtype)
    chunk = chunk_of(stored_row(values, False), dtype, missing, False)
    found = standalone.simple_decompress(chunk[:-4])
    assert found is not None and len(found) == 1000 + missing and found.dtype == dtype
    assert np.array_equal(found[:1000], values) and not found[1000:].any()
    assert len(chunk) - len(stored_row(values, False)) < 20 * (1 + missing // 2**18) + 4


@pytest.mark.parametrize("values", ["zeros", "largest"])
def test_constant_arrays_are_written_too(tmp_path: Path, values: str) -> None:
    """A row of zeros equals zarr's fill value and must still exist: an absent one could not be told from it."""
    arrays = some_arrays()
    for array in arrays.values():
        largest = 6e4 if array.dtype.kind == "f" else np.iinfo(array.dtype).max
        array[:] = 0 if values == "zeros" else largest
    record = write(tmp_path / "s.zarr.zip", arrays)
    assert_same(read(reader_of(tmp_path / "s.zarr.zip", record), range(ROWS)), arrays)


def test_equal_arrays_give_equal_bytes_whatever_the_pieces(tmp_path: Path) -> None:
    first = write(tmp_path / "a", some_arrays(7), row_length=2**12)
    for pieces in ([1, 2, 3, 4, 5, 6], [3], [6]):
        assert write(tmp_path / "b", some_arrays(7), row_length=2**12, pieces=pieces) == first
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_shard_without_all_its_rows_is_refused(tmp_path: Path) -> None:
    shard = ShardFile(tmp_path / "s", LAYOUT, ROW_SHAPES, "compact", ROWS + 1, LENGTH)
    shard.add(shard.compressed(flat_rows(some_arrays())))
    with pytest.raises(ValueError, match="3 rows of a shard of 4"):
        shard.finish()
    shard.close()


@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 0, 2, 1, 2], []], ids=str)
def test_rows_come_in_the_order_asked_for(shard: Shard, rows: list[int]) -> None:
    path, arrays, record = shard
    reader = reader_of(path, record)
    wanted = np.array(rows, np.int64)
    assert_same(read(reader, wanted.tolist()), {name: values[wanted] for name, values in arrays.items()})
    assert_same(read(reader, wanted[::-1].tolist()), {name: values[wanted[::-1]] for name, values in arrays.items()})


def test_closing_lets_go_of_the_file_and_reading_opens_it_again(shard: Shard) -> None:
    path, arrays, record = shard
    reader = reader_of(path, record)
    before = len(list(Path("/proc/self/fd").iterdir()))
    read(reader, range(ROWS))
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert_same(read(reader, range(ROWS)), arrays)
    reader.close()


def test_every_flipped_byte_is_noticed(shard: Shard) -> None:
    """By the reader, wherever it reads: names and metadata for zarr are checked by the digest of the whole file
    alone."""
    path, arrays, record = shard
    good = path.read_bytes()
    reader = reader_of(path, record)
    read_by_us = np.zeros(len(good), bool)
    for offset, length, _ in reader.chunks.reshape(-1, 3).tolist():
        read_by_us[offset : offset + length] = True
    place = record["index"]
    read_by_us[place["offset"] : place["offset"] + place["length"]] = True
    assert read_by_us.sum() > 500 and hashlib.sha256(good).hexdigest() == record["sha256"]
    reader.close()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        reader = reader_of(path, record)
        if read_by_us[place]:
            with pytest.raises(CorruptError, match=f"{path.name}.*verify --repair"):
                read(reader, range(ROWS))
        else:
            assert_same(read(reader, range(ROWS)), arrays)
        reader.close()


def test_damage_to_one_row_leaves_the_others_readable(shard: Shard) -> None:
    path, arrays, record = shard
    data = bytearray(path.read_bytes())
    data[int(reader_of(path, record).chunks[0, 0, 0]) + 2] ^= 1
    path.write_bytes(data)
    reader = reader_of(path, record)
    with pytest.raises(CorruptError, match="codes of row 0"):
        read(reader, [0])
    rest = np.array([1, 2])
    assert_same(read(reader, rest.tolist()), {name: values[rest] for name, values in arrays.items()})


@pytest.mark.parametrize("damage", ["truncated", "emptied", "longer", "missing", "another file", "folder missing"])
def test_damaged_files_are_refused(shard: Shard, damage: str) -> None:
    path, arrays, record = shard
    good = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "folder missing":
        path.parent.rename(path.parent.with_name("away"))
    elif damage == "another file":
        # A whole, valid shard of other content: only the commit record tells.
        write(path, {key: np.zeros_like(values) for key, values in arrays.items()})
    else:
        path.write_bytes({"truncated": good[:-1], "emptied": b"", "longer": good + b"\0"}[damage])
    with pytest.raises(CorruptError, match=path.name):
        read(reader_of(path, record), range(ROWS))


def test_another_file_with_chunks_of_equal_lengths_is_noticed(shard: Shard) -> None:
    path, arrays, record = shard
    other = write(path, {key: values[::-1].copy() for key, values in arrays.items()})
    assert other["size"] == record["size"]
    with pytest.raises(CorruptError):
        read(reader_of(path, record), range(ROWS))


def test_chunks_of_another_file_are_noticed_behind_the_right_index(shard: Shard) -> None:
    """They have checksums of their own, which are right."""
    path, arrays, record = shard
    good, place = path.read_bytes(), record["index"]["offset"]
    write(path, {key: values[::-1].copy() for key, values in arrays.items()})
    path.write_bytes(path.read_bytes()[:place] + good[place:])
    with pytest.raises(CorruptError, match="codes of row 0"):
        read(reader_of(path, record), [0])


def test_a_file_truncated_after_it_was_opened_is_noticed(shard: Shard) -> None:
    path, _, record = shard
    reader = reader_of(path, record)
    read(reader, [0])
    os.truncate(path, 10)
    with pytest.raises(CorruptError):
        read(reader, [2])


@pytest.mark.parametrize("field, value", [("offset", 0), ("offset", 2**62), ("length", 2**62), ("length", 0)])
def test_a_place_of_the_index_that_is_wrong_is_refused(shard: Shard, field: str, value: int) -> None:
    path, _, record = shard
    reader = reader_of(path, {**record, "index": {**record["index"], field: value}})
    with pytest.raises(CorruptError, match="index"):
        read(reader, [0])


def test_an_index_that_names_places_outside_the_file_is_refused(shard: Shard) -> None:
    """Also by a record that fits it."""
    path, _, record = shard
    data, place = bytearray(path.read_bytes()), record["index"]
    data[place["offset"] + 4 : place["offset"] + 8] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    stored = bytes(data[place["offset"] : place["offset"] + place["length"]])
    record = {**record, "index": {**place, "sha256": hashlib.sha256(stored).hexdigest()}}
    with pytest.raises(CorruptError, match="outside the file"):
        read(reader_of(path, record), [0])


def read_in_child(reader: ShardReader, rows: list[int], pipe: Any) -> None:
    pipe.send(read(reader, rows))
    reader.close()
    pipe.close()


def test_forked_workers_read_on_with_the_parents_reader(shard: Shard) -> None:
    """Also while the parent has the file open, and the child's closing does not take it from the parent."""
    path, arrays, record = shard
    reader = reader_of(path, record)
    read(reader, [1])
    context = multiprocessing.get_context("fork")
    for rows in ([2, 0], [1, 1, 2]):
        receiver, sender = context.Pipe(duplex=False)
        with warnings.catch_warnings():
            # Python warns of forking a process that has threads, as torch's are.
            warnings.simplefilter("ignore")
            child = context.Process(target=read_in_child, args=(reader, rows, sender))
            child.start()
        sender.close()
        assert receiver.poll(60)
        assert_same(receiver.recv(), {name: values[rows] for name, values in arrays.items()})
        child.join(60)
        assert child.exitcode == 0
    assert_same(read(reader, range(ROWS)), arrays)


def test_a_reader_can_be_pickled(shard: Shard) -> None:
    path, arrays, record = shard
    reader = reader_of(path, record)
    read(reader, range(ROWS))
    copy = pickle.loads(pickle.dumps(reader))
    assert_same(read(copy, range(ROWS)), arrays)
    copy.close()
    assert_same(read(reader, range(ROWS)), arrays)


def test_the_checksum_of_what_has_its_checksum_is_constant(shard: Shard) -> None:
    """What the reader compares with."""
    path, _, record = shard
    offset, length, _ = reader_of(path, record).chunks[1, 2].tolist()
    assert google_crc32c.value(path.read_bytes()[offset : offset + length]) == 0x48674BC7


def test_a_signal_while_a_chunk_is_decompressed_is_no_damage(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, record = shard
    row = read_rows([(reader_of(path, record), 1)])

    def stopped(*_: object) -> None:
        raise Preempted("stopped by SIGTERM")

    monkeypatch.setattr("logit_cache.store.shard_reader.standalone.simple_decompress_into", stopped)
    with pytest.raises(Preempted):
        row["codes"][0](np.empty(12, np.uint16))  # type: ignore[operator]
