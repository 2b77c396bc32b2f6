"""Stage one: the teacher's pass over the rows of a cache, shard by shard."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..base.errors import CorruptError, RecipeError
from ..corpus.rows import PackedRows
from ..models.teacher import Teacher
from ..recipe.schema import Recipe
from ..store.codec import TargetCodec
from ..store.manifest import Manifest
from ..store.reader import LogitCache
from ..store.signals import signals_of
from ..store.verify import verify
from ..store.writer import ACCEPTABLE, CacheWriter
from ..targets.supports import Support

logger = logging.getLogger(__name__)


def shard_count(recipe: Recipe) -> int:
    """Shards of the larger cache of a run. Raises IncompleteError where the rows are not prepared."""
    sides = (recipe.paths.cache, recipe.paths.heldout)
    return max(-(-PackedRows(path / "corpus").rows // recipe.cache.shard_rows) for path in sides)


def open_writers(recipe: Recipe, teacher: Teacher, accept: Sequence[str] = ()) -> list[tuple[CacheWriter, PackedRows]]:
    """The caches of a run, training and held-out, begun or continued. Raises MismatchError for one of another identity.

    `accept` names the fields of the identity in which they may differ, of cache.ACCEPTABLE.
    """
    unsafe = [field for field in accept if field not in ACCEPTABLE]
    if unsafe:
        raise RecipeError(
            f"--accept {unsafe[0]}: only {' and '.join(ACCEPTABLE)} may differ, all else decides what a cache holds"
        )
    keep = recipe.cache
    # Students are measured against many candidates, whatever they learn from.
    sides = [
        (recipe.paths.cache, Support.from_recipe(keep), keep.profile),
        (recipe.paths.heldout, Support("topk", k=keep.heldout_k), "compact"),
    ]
    for _, support, _ in sides:
        try:
            support.check(teacher.vocab_size)
        except ValueError as error:
            raise RecipeError(f"cache: {error}") from error
    if teacher.tensor_parallel and any(not signal.startswith("hidden.") for signal in keep.signals):
        raise RecipeError(
            "cache.signals: attention and qk cannot be taken of a teacher cut by teacher.parallel = 'tensor'"
        )
    signals = signals_of(keep.signals, teacher.model.config, recipe.corpus.row_length)
    opened = []
    for path, support, profile in sides:
        corpus = PackedRows(path / "corpus")
        codec = TargetCodec(support, tuple(keep.knots), teacher.vocab_size, profile)
        # Students are measured by their targets alone.
        kept = signals if path == recipe.paths.cache else ()
        manifest = Manifest.create(teacher.identity, corpus, codec, keep.shard_rows, recipe.seed, kept, keep.targets_on)
        opened.append((CacheWriter(path, manifest, accept=accept), corpus))
    return opened


def check_caches(recipe: Recipe) -> None:
    """Every shard is committed, and every byte is as it was written.

    Raises IncompleteError for missing shards, CorruptError naming the bad ones.
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
