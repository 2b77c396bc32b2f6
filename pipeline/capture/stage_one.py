"""Stage one as one call: the teacher over the rows of a run, its caches, and what later stages need of it.

`run` fills the shards (`shard_pass`) of both caches, training and held-out, and hands over (`handover`) what students
and the report need, so that the teacher is never loaded again. Several tasks share the shards: each calls `run` with
its number, and one of them, or a job after them, calls `finalise`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from ..base import processes
from ..base.durable import write_json
from ..base.errors import CorruptError, RecipeError, recipe_error
from ..base.places import Place
from ..base.provenance import provenance
from ..corpus.rows import PackedRows, Prepared
from ..models.teacher import Teacher, teacher_of
from ..models.teacher_source import resolve_teacher
from ..recipe.loading import save_resolved
from ..recipe.paths import CachePaths
from ..recipe.schema import CacheConfig, Recipe
from ..store.codec import TargetCodec
from ..store.coordinates import CoordinateCodec
from ..store.manifest import Manifest
from ..store.reader import LogitCache
from ..store.shard_size import shard_rows_of
from ..store.signals import signals_of
from ..store.verify import verify
from ..store.writer import ACCEPTABLE, CacheWriter
from ..targets.supports import Support
from .handover import export_for_students
from .row_starts import log_row_starts
from .shard_pass import fill_shards
from .summary import log_summary

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
    _convert_teacher_once(recipe)
    tensor_parallel = recipe.teacher.parallel == "tensor"
    workers = 1 if tensor_parallel else processes.world_size()
    share, shares = task * workers + processes.rank() % workers, num_tasks * workers
    shards = max(_num_shards(recipe, path) for path in recipe.paths.sides.values())
    teacher = None
    if share == 0 or share < shards:
        teacher = teacher_of(recipe)
        logger.info(f"teacher: {recipe.teacher.model}, {teacher.placement}")
        if tensor_parallel and processes.rank() > 0:
            teacher.serve_passes()
        else:
            if share == 0 and not CachePaths(recipe.paths.cache).manifest.exists():
                log_row_starts(teacher, PackedRows.of_cache(recipe.paths.cache), recipe.teacher.batch_rows)
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
    teacher = teacher_of(recipe)
    open_writers(recipe, teacher, accept)  # for the comparison of identities
    _hand_over(recipe, teacher)


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
    writers = open_writers(recipe, teacher, accept)
    if share == 0:
        record = {**provenance(), "placement": str(teacher.placement), "teacher": teacher.identity}
        write_json(recipe.paths.provenance, record)
    for writer, corpus in writers:
        fill_shards(teacher, corpus, writer, batch_rows=recipe.teacher.batch_rows, task=share, num_tasks=shares)


def _hand_over(recipe: Recipe, teacher: Teacher) -> None:
    """Leave what later stages need of the teacher. All processes of a tensor-parallel teacher take part."""
    first = processes.rank() == 0
    if first or teacher.tensor_parallel:
        export_for_students(recipe, teacher)
    if first:
        save_resolved(recipe, recipe.paths.recipe)
        log_summary(recipe)


def open_writers(recipe: Recipe, teacher: Teacher, accept: Sequence[str] = ()) -> list[tuple[CacheWriter, PackedRows]]:
    """Writers of both caches of a run, training and held-out, each with its rows; a cache that exists is continued.

    Raises MismatchError for a cache of another identity, unless it differs only in fields that `accept` names,
    RecipeError for fields that may not differ and for settings that this teacher cannot serve.
    """
    unsafe = [field for field in accept if field not in ACCEPTABLE]
    if unsafe:
        raise RecipeError(
            f"--accept {unsafe[0]}: only {', '.join(ACCEPTABLE)} may differ, every other field decides what a cache holds"
        )
    keep, codec = recipe.cache, training_codec(recipe.cache, teacher)
    # The held-out cache measures students: many candidates, whatever the support that they learn from, and a bucket,
    # from which the teacher itself has a divergence of 0.
    heldout = replace(codec, support=Support("topk", k=keep.heldout_k), profile="compact", coordinates=None)
    for side in (codec, heldout):
        with recipe_error("cache"):
            side.support.check(teacher.vocab_size)
    signals = signals_of(keep.signals, teacher.model.config, recipe.corpus.row_length)
    if teacher.tensor_parallel and any(signal.kind != "hidden" for signal in signals):
        raise RecipeError(
            "cache.signals: attention and qk cannot be read from a teacher with teacher.parallel = 'tensor'"
        )
    opened = []
    for path, side in ((recipe.paths.cache, codec), (recipe.paths.heldout, heldout)):
        corpus = PackedRows.of_cache(path)
        # Evaluation reads targets only.
        kept = signals if path == recipe.paths.cache else ()
        shard_rows = shard_rows_of(recipe, path, corpus.rows)
        manifest = Manifest.create(teacher.identity, corpus, side, shard_rows, recipe.seed, kept, keep.targets_on)
        opened.append((CacheWriter(path, manifest, accept=accept), corpus))
    return opened


def training_codec(keep: CacheConfig, teacher: Teacher) -> TargetCodec:
    """The codec of a recipe's training cache, before anything is learned."""
    # A basis has no more directions than hidden states have, and a constant logit is none.
    rank = min(keep.rank, teacher.output_layer.weight.shape[1], teacher.vocab_size - 1)
    coordinates = CoordinateCodec(rank, keep.tail_step, predicted=keep.profile == "compact") if rank else None
    support = Support.from_recipe(keep)
    numbers = support, tuple(keep.knots), teacher.vocab_size, keep.profile
    return TargetCodec(*numbers, coordinates=coordinates, label_log_probs=keep.label_log_probs)


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
        logger.info(f"finalise: {path}: {shards} shards committed, all whole")
