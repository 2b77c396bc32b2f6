"""`logit-cache verify`: every checksum of a cache and, with --teacher, its numbers."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from ..base.errors import CorruptError, MismatchError, StorageError
from .options import CacheArgument


def verify(
    cache: CacheArgument,
    repair: Annotated[bool, typer.Option(help="drop bad shards, so that `cache` writes them again")] = False,
    teacher: Annotated[bool, typer.Option("--teacher", help="run some rows through the teacher again")] = False,
    teacher_model: Annotated[
        str | None, typer.Option(help="directory or hub name of the teacher, where it has moved since capture")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run the Python code that the teacher brings")] = False,
    rows: Annotated[int, typer.Option(min=1, help="number of rows that the teacher runs again")] = 16,
) -> None:
    """Check every byte of a cache against its commit records; with --teacher also its numbers against the teacher."""
    from ..base.places import place
    from ..store.reader import LogitCache
    from ..store.verify import drop_shard
    from ..store.verify import verify as verify_cache
    from .console import show

    where = place(cache)
    bad = verify_cache(where)
    for shard, problem in bad.items():
        show(f"shard {shard:05}: {problem}")
        if repair:
            drop_shard(where, shard)
    if bad and not repair:
        raise CorruptError(f"{cache}: {len(bad)} bad shards: run with --repair to drop them, then `logit-cache cache`")
    if bad:
        show(f"verify: {len(bad)} shards dropped: run `logit-cache cache` to write them again")
        return
    opened = LogitCache(cache, partial=True)
    with suppress(StorageError):  # an object store that may only be read
        opened.records.mark()
    show(f"verify: {cache}: {len(opened.records)} of {opened.manifest.num_shards} shards committed, all whole")
    if not teacher and teacher_model is None:
        return
    from ..assess.audit import audit_teacher, recorded_teacher

    audit = audit_teacher(opened, recorded_teacher(opened, teacher_model, trust_remote_code), rows=rows)
    show(f"verify: {audit}")
    if audit.problems:
        raise MismatchError(
            f"{cache}: not the targets of this teacher: {'; '.join(audit.problems)}: give the right teacher with "
            "--teacher-model, or delete the cache and run `logit-cache cache` again"
        )
