"""Chunks: how one row of an array is stored, and the Zarr metadata that says so.

A chunk is compressed by PCodec or plain, and ends with the crc32c of its other bytes. A compressed row is filled up to
the length of its array by further PCodec chunks of zeros, 10 bytes each, so the length may be decided after the row was
compressed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from .arrays import Array
from .signals import is_signal_array

# Delta order 0: values unchanged. ("none" means the same but fails with pcodec 1.1.)
PCODEC: dict[str, Any] = {
    "level": 8,
    "mode_spec": "classic",
    "delta_spec": "try_consecutive",
    "delta_encoding_order": 0,
}
CHUNK_CODECS: dict[str, list[dict[str, Any]]] = {
    "compact": [{"name": "numcodecs.pcodec", "configuration": PCODEC}, {"name": "crc32c"}],
    "fast": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
}
"""The codecs of every chunk, by the profile of the cache."""
CHECKSUM_BYTES = 4
INDEX_NAME = "index"
"""The array that says where the chunks are; no other array has this name."""
_CONFIG = ChunkConfig(
    compression_level=PCODEC["level"],
    mode_spec=ModeSpec.classic(),
    delta_spec=DeltaSpec.try_consecutive(PCODEC["delta_encoding_order"]),
)
_LONGEST_PIECE = 2**18
"""Values of one PCodec chunk."""
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def is_plain(name: str, profile: str) -> bool:
    """Whether an array is stored uncompressed: every array of `fast`, and signals, which do not compress."""
    return profile == "fast" or is_signal_array(name)


def stored_row(values: Array, plain: bool) -> bytes:
    """A row of an array [values], before it is filled up."""
    return values.tobytes() if plain else bytes(standalone.simple_compress(np.ascontiguousarray(values), _CONFIG))


def chunk_of(stored: bytes, dtype: str, missing: int, plain: bool) -> bytes:
    """The chunk of a stored row that lacks `missing` values: these are 0."""
    if missing and plain:
        stored += bytes(missing * np.dtype(dtype).itemsize)
    elif missing:
        # Before the byte that ends the stream of PCodec chunks.
        stored = stored[:-1] + _zeros(dtype, missing) + stored[-1:]
    return with_checksum(stored)


@lru_cache
def _zeros(dtype: str, count: int) -> bytes:
    """`count` zeros as PCodec chunks, without what begins and ends a stream of them."""
    example = 7777
    whole = bytes(standalone.simple_compress(np.zeros(example, dtype), _CONFIG))
    number = (example - 1).to_bytes(3, "little")
    kind, (_, rest) = whole[whole.rindex(number) - 1 :][:1], whole[:-1].rsplit(number, 1)
    pieces = [_LONGEST_PIECE] * (count // _LONGEST_PIECE) + [count % _LONGEST_PIECE] * (count % _LONGEST_PIECE > 0)
    return b"".join(kind + (piece - 1).to_bytes(3, "little") + rest for piece in pieces)


def with_checksum(data: bytes) -> bytes:
    """Bytes and their crc32c, as Zarr's codec `crc32c` writes them."""
    return data + int(google_crc32c.value(data)).to_bytes(CHECKSUM_BYTES, "little")


def group_metadata() -> dict[str, Any]:
    """`zarr.json` of the group of a shard."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {}}


def array_metadata(
    shape: tuple[int, ...], dtype: str, block_rows: int | None, plain: bool, attributes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`zarr.json` of an array [row, ...] with a shard of Zarr for every `block_rows` rows, in it a chunk for each row.

    None: the whole array is one plain chunk.
    """
    kind = np.dtype(dtype)
    inner: list[dict[str, Any]] = CHUNK_CODECS["fast" if plain else "compact"]
    if plain and kind.itemsize == 1:
        inner = [{"name": "bytes"}, {"name": "crc32c"}]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, *shape[1:]],
            "codecs": inner,
            "index_codecs": _INDEX_CODECS,
            "index_location": "end",
        },
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": kind.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [shape[0] if block_rows is None else block_rows, *shape[1:]]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if kind.kind == "f" else 0,
        "codecs": inner if block_rows is None else [sharding],
        "attributes": attributes or {},
        "storage_transformers": [],
    }
