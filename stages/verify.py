"""`logit-cache verify`: every checksum of a cache, and whether it holds what its teacher says."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.errors import CorruptError, MismatchError, RecipeError
from .options import CacheArgument


def verify(
    cache: CacheArgument,
    repair: Annotated[bool, typer.Option(help="drop bad shards, so that `cache` writes them again")] = False,
    teacher: Annotated[bool, typer.Option("--teacher", help="run some rows through the teacher again")] = False,
    teacher_model: Annotated[
        str | None, typer.Option(help="where the teacher is now; by default where it was at capture")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="how many rows the teacher runs again")] = 16,
) -> None:
    """Check every byte of a cache against its commit records; with --teacher also what the numbers say."""
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
    found = LogitCache(cache, partial=True)
    show(f"verify: {cache}: {len(found.records)} of {found.manifest.num_shards} shards committed, all whole")
    if not teacher and teacher_model is None:
        return
    from ..assess.audit import audit_teacher
    from ..models.teacher import load_teacher
    from ..recipe.schema import TeacherConfig

    told = found.manifest.identity["teacher"]
    source = teacher_model or str(told["source"])
    if told.get("dtype") is None:
        raise RecipeError(f"{cache}: its targets were imported, so there is no teacher to run")
    if source.startswith("package:") or source.endswith(".gguf"):
        raise RecipeError(f"{cache}: the teacher was converted: give its directory, --teacher-model RUN/teacher")
    revision = None if teacher_model else told.get("revision")
    settings = TeacherConfig(model=source, dtype=told["dtype"], revision=revision)
    result = audit_teacher(found, load_teacher(source, settings, found.objective), rows=rows)
    show(f"verify: {result}")
    if result.problems:
        raise MismatchError(
            f"{cache}: not what {source} says: {'; '.join(result.problems)}: find the right teacher (--teacher-model), or "
            "delete the cache and write it again"
        )
