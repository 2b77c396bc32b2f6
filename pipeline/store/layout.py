"""layout."""

from __future__ import annotations

from ..base.places import Place


def shard_path(cache: Place, shard: int) -> Place:
    return cache / "shards" / f"{shard:05}.zarr"


def record_path(cache: Place, shard: int) -> Place:
    return cache / "shards" / f"{shard:05}.json"


def codebook_path(cache: Place, digest: str) -> Place:
    return cache / f"codebook-{digest[:12]}.zarr"
