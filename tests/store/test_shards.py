"""One shard: zarr and the built-in reader give the same arrays, and no byte changes unnoticed."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from logit_cache.base.errors import CorruptError, Preempted
from logit_cache.store.shards import ShardReader, chunk_checksums, read_group, read_rows, write_group

ROWS = 3
# One array of each kind: entries of a row end to end, values of a position, and both widths of integers.
SHAPES = {
    "codes": ("uint16", (12,)),
    "wide": ("uint32", (7,)),
    "head_mass": ("int16", (4,)),
    "tail_steps": ("int16", (4, 3)),
}
LAYOUT = {name: dtype for name, (dtype, _) in SHAPES.items()}
NAMES = tuple(SHAPES)
FILES = {name: f"{name}/c/0/0" + "/0" * (len(shape) - 1) for name, (_, shape) in SHAPES.items()}


def some_arrays(rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (dtype, shape) in SHAPES.items():
        info = np.iinfo(dtype)
        arrays[name] = rng.integers(info.min, info.max, (rows, *shape), dtype, endpoint=True)
    return arrays


def files_record(path: Path, rows: int = ROWS) -> dict[str, dict[str, object]]:
    """What a commit record says of the array files."""
    record = {}
    for name in NAMES:
        file = path / FILES[name]
        record[FILES[name]] = {"size": file.stat().st_size, "crc32c": chunk_checksums(file.read_bytes(), rows)}
    return record


def reader_of(path: Path, record: dict[str, dict[str, object]], profile: str = "compact") -> ShardReader:
    return ShardReader(path, LAYOUT, profile, ROWS, record)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray], dict[str, dict[str, object]]]:
    path, arrays = tmp_path / "00000.zarr", some_arrays()
    write_group(path, arrays, "compact")
    return path, arrays, files_record(path)


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
def test_both_profiles_open_with_plain_zarr_and_with_the_reader(tmp_path: Path, profile: str) -> None:
    path, arrays = tmp_path / "s.zarr", some_arrays()
    write_group(path, arrays, profile)
    by_zarr = read_group(path)
    assert set(by_zarr) == set(arrays)
    for name, values in arrays.items():
        assert by_zarr[name].dtype == values.dtype and np.array_equal(by_zarr[name], values), name
    assert_same(read(reader_of(path, files_record(path), profile), range(ROWS)), arrays)


@pytest.mark.parametrize("values", ["zeros", "largest"])
def test_constant_arrays_are_written_too(tmp_path: Path, values: str) -> None:
    """A row of zeros equals zarr's fill value and must still exist: an absent one could not be told from it."""
    arrays = some_arrays()
    for array in arrays.values():
        array[:] = 0 if values == "zeros" else np.iinfo(array.dtype).max
    write_group(tmp_path / "s.zarr", arrays, "compact")
    record = files_record(tmp_path / "s.zarr")
    assert_same(read(reader_of(tmp_path / "s.zarr", record), range(ROWS)), arrays)


def test_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_group(tmp_path / name, some_arrays(), "compact")
    one, other = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("a", "b")
    )
    assert one == other and len(one) >= len(NAMES) * 2


@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 0, 2, 1, 2], []], ids=str)
def test_rows_come_in_the_order_asked_for(shard, rows: list[int]) -> None:
    path, arrays, record = shard
    reader = reader_of(path, record)
    wanted = np.array(rows, np.int64)
    assert_same(read(reader, wanted.tolist()), {name: values[wanted] for name, values in arrays.items()})
    assert_same(read(reader, wanted[::-1].tolist()), {name: values[wanted[::-1]] for name, values in arrays.items()})


def test_closing_lets_go_of_the_files_and_reading_opens_them_again(shard) -> None:
    path, arrays, record = shard
    reader = reader_of(path, record)
    before = len(list(Path("/proc/self/fd").iterdir()))
    read(reader, range(ROWS))
    assert len(list(Path("/proc/self/fd").iterdir())) == before + len(NAMES)
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert_same(read(reader, range(ROWS)), arrays)
    reader.close()


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_byte_is_noticed(shard, name: str) -> None:
    path, _, record = shard
    file = path / FILES[name]
    good = file.read_bytes()
    assert len(good) < 1000
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        file.write_bytes(bad)
        reader = reader_of(path, record)
        with pytest.raises(CorruptError, match=f"{FILES[name]}.*verify --repair"):
            read(reader, range(ROWS))
        reader.close()


def test_damage_to_one_row_leaves_the_others_readable(shard) -> None:
    path, arrays, record = shard
    file = path / FILES["codes"]
    data = bytearray(file.read_bytes())
    data[2] ^= 1  # the first chunk is the first row
    file.write_bytes(data)
    reader = reader_of(path, record)
    with pytest.raises(CorruptError, match="row 0"):
        read(reader, [0])
    rest = np.array([1, 2])
    assert_same(read(reader, rest.tolist()), {name: values[rest] for name, values in arrays.items()})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "longer", "another file", "folder missing"])
def test_damaged_files_are_refused(shard, name: str, damage: str) -> None:
    path, arrays, record = shard
    file = path / FILES[name]
    good = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "folder missing":
        path.rename(path.with_name("away"))
        name = NAMES[0]  # the first that is read
    elif damage == "another file":
        # A whole, valid shard file of other content: only the commit record tells.
        write_group(path.with_name("other"), {key: np.zeros_like(values) for key, values in arrays.items()}, "compact")
        file.write_bytes((path.with_name("other") / FILES[name]).read_bytes())
        assert file.read_bytes() != good
    else:
        file.write_bytes({"truncated": good[:-1], "emptied": b"", "longer": good + b"\0"}[damage])
    with pytest.raises(CorruptError, match=FILES[name]):
        read(reader_of(path, record), range(ROWS))


def test_another_file_with_chunks_of_equal_lengths_is_noticed(shard) -> None:
    path, arrays, record = shard
    write_group(path.with_name("other"), {key: values[::-1].copy() for key, values in arrays.items()}, "compact")
    file = path / FILES[NAMES[0]]
    file.write_bytes((path.with_name("other") / FILES[NAMES[0]]).read_bytes())
    with pytest.raises(CorruptError):
        read(reader_of(path, record), range(ROWS))


def test_a_file_truncated_after_it_was_opened_is_noticed(shard) -> None:
    path, _, record = shard
    reader = reader_of(path, record)
    read(reader, [0])
    os.truncate(path / FILES[NAMES[0]], 10)
    with pytest.raises(CorruptError):
        read(reader, [2])


def test_a_record_without_the_file_is_refused(shard) -> None:
    path, _, record = shard
    del record[FILES["tail_steps"]]
    with pytest.raises(CorruptError, match="commit record"):
        read(reader_of(path, record), range(ROWS))


def read_in_child(reader: ShardReader, rows: list[int], pipe) -> None:
    pipe.send(read(reader, rows))
    reader.close()
    pipe.close()


def test_forked_workers_read_on_with_the_parents_reader(shard) -> None:
    """Also while the parent has the files open, and the child's closing does not take them from the parent."""
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


def test_a_reader_can_be_pickled(shard) -> None:
    path, arrays, record = shard
    reader = reader_of(path, record)
    read(reader, range(ROWS))
    copy = pickle.loads(pickle.dumps(reader))
    assert_same(read(copy, range(ROWS)), arrays)
    copy.close()
    assert_same(read(reader, range(ROWS)), arrays)


def test_a_signal_while_a_chunk_is_decompressed_is_no_damage(
    shard: tuple[Path, dict[str, np.ndarray], dict[str, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, record = shard
    row = read_rows([(reader_of(path, record), 1)])

    def stopped(*_: object) -> None:
        raise Preempted("stopped by SIGTERM")

    monkeypatch.setattr("logit_cache.store.shards.standalone.simple_decompress_into", stopped)
    with pytest.raises(Preempted):
        row["codes"][0](np.empty(12, np.uint16))  # type: ignore[union-attr]
