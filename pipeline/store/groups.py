"""Small Zarr groups, written and read by zarr-python: what a cache learned before its first shard."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.codecs.numcodecs import PCodec

from .arrays import Arrays
from .chunks import PCODEC

# zarr warns of numcodecs codecs, which the core specification of v3 lacks (the manifest records them), and of files that
# are damaged (their error says so). For good, since its threads may warn after a call has failed.
for _message in ("Numcodecs codecs are not in the Zarr", "Object at .* is not recognized as a component of a Zarr"):
    warnings.filterwarnings("ignore", _message)


def write_group(path: Path, arrays: Arrays) -> None:
    """Write arrays as one Zarr group, a compressed chunk for each index of their first axis."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    for name, values in arrays.items():
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(1, *values.shape[1:]),
            shards=values.shape,
            filters=None,
            serializer=PCodec(**PCODEC),
            compressors=[Crc32cCodec()],
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        array[:] = values


def read_group(path: Path) -> Arrays:
    """All arrays of a group. Raises zarr's errors for missing or damaged files."""
    group = zarr.open_group(path, mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}
