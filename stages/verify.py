"""`logit-cache verify`: every checksum of a cache."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.errors import CorruptError
from stages.options import CacheArgument


def verify(
    cache: CacheArgument,
    repair: Annotated[bool, typer.Option(help="drop bad shards, so that `cache` writes them again")] = False,
) -> None:
    """Check every byte of a cache against its commit records."""
    from pipeline.cache import LogitCache, drop_shard
    from pipeline.cache import verify as verify_cache
    from pipeline.progress import say
    from pipeline.storage import place

    where = place(cache)
    bad = verify_cache(where)
    for shard, problem in bad.items():
        say(f"shard {shard:05}: {problem}")
        if repair:
            drop_shard(where, shard)
    if bad and not repair:
        raise CorruptError(f"{cache}: {len(bad)} bad shards: run with --repair to drop them, then `logit-cache cache`")
    if bad:
        say(f"verify: {len(bad)} shards dropped: run `logit-cache cache` to write them again")
        return
    found = LogitCache(cache, partial=True)
    say(f"verify: {cache}: {len(found.records)} of {found.manifest.num_shards} shards committed, all whole")
