"""Targets through a codec and back, and the bytes that a position takes in the finished cache."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ..base.places import files_in
from ..store.draft import ShardDraft
from ..store.groups import write_group
from ..store.learned import Learned
from ..store.manifest import Manifest
from ..store.shard_reader import ShardReader, read_rows
from ..targets.sparse_targets import SparseTargets
from .sample import Sample

_PLACE_BYTES = 28
"""Of a chunk, in the index of a shard and in Zarr's."""
_RECORD_BYTES = 700


@dataclass(frozen=True)
class RoundTrip:
    """What comes back."""

    targets: SparseTargets
    """[B, L], decoded."""
    bytes_per_position: float
    """Chunks, their places in both indexes, metadata and commit records; not what is learned once (`learned_bytes`)."""
    seconds: float
    """Of encoding and writing."""


def round_trip(manifest: Manifest, sample: Sample, targets: SparseTargets) -> RoundTrip:
    """Encode, write, read and decode the targets [B, L] of a sample; `manifest` is that of the whole cache."""
    codec, count, mask = manifest.codec, len(sample.rows), sample.mask_BL.numpy()
    layout = manifest.layout()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with ShardDraft(Path(folder), replace(manifest, rows=count, shard_rows=count), 0) as draft:
            draft.add(targets, sample.columns, [0.0] * count)
            record = draft.finish()
            seconds = time.perf_counter() - start
            reader = ShardReader(draft.staged, layout, codec.profile, count, record)
            stored = read_rows([(reader, row) for row in range(count)])
            decoded = codec.decode(stored, sample.columns["input_ids"], mask)
            # Chunks grow with the rows; what is left counts once for every shard.
            chunks = int(reader.chunks[..., 1].sum()) + count * len(layout) * _PLACE_BYTES
            reader.close()
    whole = chunks / count * manifest.rows + (record["size"] - chunks + _RECORD_BYTES) * manifest.num_shards
    return RoundTrip(decoded, whole / (manifest.rows * max(mask.sum() / count, 1.0)), seconds)


def learned_bytes(value: Learned) -> int:
    """Bytes of a codebook or a tail basis on disk."""
    with tempfile.TemporaryDirectory() as folder:
        group = Path(folder) / "group"
        write_group(group, value.arrays())
        return sum(files_in(group).values())
