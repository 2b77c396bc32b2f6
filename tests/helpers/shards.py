"""Where a row of an array is in the file of a shard, found as a stranger to the library would: with zarr-python."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import zarr


def shard_file(cache: Path, shard: int) -> Path:
    return cache / f"shards/{shard:05}.zarr.zip"


def open_shard(file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numcodecs' codecs are not in Zarr's core specification
        return zarr.open_group(zarr.storage.ZipStore(file, mode="r"), mode="r")


def shard_arrays(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: np.asarray(array[:]) for name, array in open_shard(file).arrays()}


def chunk_place(file: Path, name: str, row: int) -> tuple[int, int]:
    """Offset and length of a chunk."""
    index = open_shard(file)["index"]
    offset, length, _ = index[row, index.attrs["arrays"].index(name)].tolist()
    return offset, length


def flip_bit(file: Path, name: str, row: int = 0, place: int = 10) -> None:
    """Damage a chunk."""
    data = bytearray(file.read_bytes())
    data[chunk_place(file, name, row)[0] + place] ^= 4
    file.write_bytes(data)
