"""Stage one as one call: the teacher over the rows of a run, its caches, and what later stages need of it.

`run` fills the shards (`shard_pass`) of both caches, training and held-out, and hands over (`handover`) what students
and the report need, so that the teacher is never loaded again. Several tasks share the shards: each calls `run` with
its number, and one of them, or a job after them, calls `finalise`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from ..base import processes
from ..base.durable import write_json
from ..base.errors import CorruptError, RecipeError
from ..base.places import Place
from ..base.provenance import provenance
from ..corpus.rows import PackedRows, Prepared
from ..models.batch_rows import rows_per_pass
from ..models.teacher import Teacher, teacher_of
from ..models.teacher_source import resolve_teacher
from ..recipe.loading import save_resolved
from ..recipe.paths import CachePaths
from ..recipe.schema import Recipe
from ..store.reader import LogitCache
from ..store.shard_size import shard_rows_of
from ..store.verify import verify
from .handover import check_students, export_for_students
from .row_starts import log_row_starts
from .shard_pass import fill_shards
from .summary import log_size, log_summary
from .writers import nothing_left, open_writers, teacher_record

logger = logging.getLogger(__name__)


def run(recipe: Recipe, *, task: int = 0, num_tasks: int = 1, accept: Sequence[str] = ()) -> None:
    """Run the teacher over the prepared rows and write both caches; a run that was stopped continues where it stopped.

    Task `task` of `num_tasks` fills every `num_tasks`-th shard and leaves the handover to `finalise`. Under torchrun
    each process takes a share of the task, unless all processes hold one tensor-parallel teacher. `accept` names
    identity fields (`writer.ACCEPTABLE`) in which a cache that exists may differ.

    Raises IncompleteError where the rows are not prepared, MismatchError where the caches belong to another teacher,
    corpus or setting, RecipeError where the teacher cannot be used.
    """
    if not 0 <= task < num_tasks:
        raise RecipeError(f"task {task} is outside 0..{num_tasks - 1}: {num_tasks} tasks share the shards")
    tensor_parallel = recipe.teacher.parallel == "tensor"
    workers = 1 if tensor_parallel else processes.world_size()
    share, shares = task * workers + processes.rank() % workers, num_tasks * workers
    if _nothing_left(recipe, range(task * workers, (task + 1) * workers), shares, accept, hand_over=num_tasks == 1):
        if processes.rank() == 0 and num_tasks == 1:
            save_resolved(recipe, recipe.paths.recipe)
            log_size(LogitCache(recipe.paths.cache), "done, ")
        elif processes.rank() == 0:
            shards = max(_num_shards(recipe, path) for path in recipe.paths.sides.values())
            logger.info(
                f"cache: nothing to do for task {task} of {num_tasks}: there are {shards} shards, its own are done"
            )
        return
    _convert_teacher_once(recipe)
    shards = max(_num_shards(recipe, path) for path in recipe.paths.sides.values())
    teacher = None
    if share == 0 or share < shards:
        teacher = teacher_of(recipe)
        logger.info(f"teacher: {recipe.teacher.model}, {teacher.placement}, {_batch_rows(recipe, teacher)} rows a pass")
        if tensor_parallel and processes.rank() > 0:
            teacher.serve_passes()
        else:
            check_students(recipe, teacher)
            if share == 0 and not CachePaths(recipe.paths.cache).manifest.exists():
                log_row_starts(teacher, PackedRows.of_cache(recipe.paths.cache), _batch_rows(recipe, teacher))
            fill_caches(recipe, teacher, share, shares, accept)
            teacher.lead(None)
    else:
        logger.info(f"cache: nothing to do for task {share} of {shares}: there are {shards} shards")
    processes.wait_for_all()
    if num_tasks == 1 and teacher is not None:
        _hand_over(recipe, teacher)


def finalise(recipe: Recipe, accept: Sequence[str] = ()) -> None:
    """Check every byte of the caches that several tasks wrote, and hand over what later stages need of the teacher.

    Raises IncompleteError for missing shards, CorruptError for damaged ones, MismatchError as `run` does.
    """
    if processes.rank() == 0:
        check_caches(recipe)
    processes.wait_for_all()
    if _nothing_left(recipe, [0], 1, accept, hand_over=True):
        if processes.rank() == 0:
            log_size(LogitCache(recipe.paths.cache), "done, ")
        return
    teacher = teacher_of(recipe)
    open_writers(recipe, teacher.facts, accept)  # for the comparison of identities
    _hand_over(recipe, teacher)


def _nothing_left(recipe: Recipe, own: Iterable[int], shares: int, accept: Sequence[str], *, hand_over: bool) -> bool:
    """What the first process finds with `nothing_left`, in all of them."""
    if processes.world_size() == 1:
        return nothing_left(recipe, own, shares, accept, hand_over=hand_over)
    processes.join()
    first = processes.rank() == 0
    return bool(processes.broadcast(first and nothing_left(recipe, own, shares, accept, hand_over=hand_over)))


def _num_shards(recipe: Recipe, cache: Place) -> int:
    rows = Prepared.of_cache(cache).rows
    return -(-rows // shard_rows_of(recipe, cache, rows))


def _convert_teacher_once(recipe: Recipe) -> None:
    """Let the first process convert a GGUF teacher before the others look for it."""
    if processes.world_size() > 1:
        if processes.rank() == 0:
            resolve_teacher(recipe)
        processes.wait_for_all()


def fill_caches(recipe: Recipe, teacher: Teacher, share: int = 0, shares: int = 1, accept: Sequence[str] = ()) -> None:
    """Fill one of `shares` shares of both caches of a prepared run. Raises as `open_writers` and `fill_shards`."""
    writers, batch_rows = open_writers(recipe, teacher.facts, accept), _batch_rows(recipe, teacher)
    if share == 0:
        record = {**provenance(), "placement": str(teacher.placement), "batch_rows": batch_rows}
        write_json(recipe.paths.provenance, record | {"teacher": teacher.identity} | teacher_record(recipe))
    for writer, corpus in writers:
        fill_shards(teacher, corpus, writer, batch_rows=batch_rows, task=share, num_tasks=shares)


def _batch_rows(recipe: Recipe, teacher: Teacher) -> int:
    return rows_per_pass(recipe.teacher.batch_rows, teacher, recipe.corpus.row_length)


def _hand_over(recipe: Recipe, teacher: Teacher) -> None:
    """Leave what later stages need of the teacher. All processes of a tensor-parallel teacher take part."""
    first = processes.rank() == 0
    if first or teacher.tensor_parallel:
        export_for_students(recipe, teacher)
    if first:
        save_resolved(recipe, recipe.paths.recipe)
        for path in recipe.paths.sides.values():
            LogitCache(path).records.mark()
        log_summary(recipe)


def check_caches(recipe: Recipe) -> None:
    """Check that every shard of both caches is committed and every byte is as it was written.

    Raises IncompleteError for missing shards, CorruptError where shards are damaged; their numbers are logged.
    """
    for path in (recipe.paths.cache, recipe.paths.heldout):
        shards = len(LogitCache(path).records)
        bad = verify(path)
        for shard, problem in bad.items():
            logger.info(f"shard {shard:05}: {problem}")
        if bad:
            raise CorruptError(
                f"{path}: {len(bad)} bad shards: run `logit-cache verify {path} --repair`, then `cache` or `submit` again"
            )
        LogitCache(path).records.mark()
        logger.info(f"finalise: {path}: {shards} shards committed, all whole")
