"""The writers of both caches of a run, as its recipe and its teacher say; whether anything is left to write.

Opening a cache takes a few facts of the teacher, not its model. Where the recipe's teacher is the one that a run has
recorded, with the same settings and the same files by size and time of change, these facts are known without loading it,
so that a finished stage says so in a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..base.durable import read_json
from ..base.errors import CorruptError, IncompleteError, RecipeError, recipe_error
from ..corpus.rows import PackedRows
from ..models.teacher import TeacherFacts
from ..models.teacher_source import teacher_config, teacher_files
from ..recipe.schema import CacheConfig, Recipe
from ..store.basis_file import read_stored_basis
from ..store.codec import TargetCodec
from ..store.coordinates import CoordinateCodec
from ..store.manifest import Manifest
from ..store.shard_size import shard_rows_of
from ..store.signals import signals_of
from ..store.writer import ACCEPTABLE, CacheWriter
from ..targets.supports import Support
from .handover import handed_over


def nothing_left(recipe: Recipe, own: Iterable[int], shares: int, accept: Sequence[str], *, hand_over: bool) -> bool:
    """Whether both caches of a run have all shards of the shares `own`, of `shares`, and with `hand_over` all that later
    stages need of the teacher. False also where only the loaded teacher can tell.

    Raises as `open_writers`.
    """
    teacher = _recorded_teacher(recipe)
    if teacher is None:
        return False
    writers = [writer for writer, _ in open_writers(recipe, teacher, accept)]
    if not all(writer.begun and not any(writer.pending(share, shares) for share in own) for writer in writers):
        return False
    return not hand_over or handed_over(recipe, teacher.identity["weights"])


def teacher_record(recipe: Recipe) -> dict[str, Any]:
    """What decides a recipe's teacher, as it is recorded beside its identity."""
    settings = recipe.teacher.model_dump(mode="json", exclude={"batch_rows", "training"})
    return {"teacher_settings": settings, "teacher_files": teacher_files(recipe)}


def _recorded_teacher(recipe: Recipe) -> TeacherFacts | None:
    """The teacher that filled the caches of a run, where it is the recipe's; None where that is not known."""
    with suppress(CorruptError, IncompleteError):
        known = read_json(recipe.paths.provenance, "it is written again") or {}
        now = teacher_record(recipe)
        if now["teacher_files"] is None or any(known.get(key) != value for key, value in now.items()):
            return None
        coordinates, width = Manifest.read(recipe.paths.cache).codec.coordinates, 1
        if coordinates is not None and coordinates.basis is not None:
            width = read_stored_basis(recipe.paths.cache, coordinates.basis.digest).projection.shape[1]
        return TeacherFacts(known["teacher"], width, teacher_config(recipe) if recipe.cache.signals else None)
    return None


def open_writers(
    recipe: Recipe, teacher: TeacherFacts, accept: Sequence[str] = ()
) -> list[tuple[CacheWriter, PackedRows]]:
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
    signals = signals_of(keep.signals, teacher.config, recipe.corpus.row_length) if keep.signals else ()
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


def training_codec(keep: CacheConfig, teacher: TeacherFacts) -> TargetCodec:
    """The codec of a recipe's training cache, before anything is learned."""
    # A basis has no more directions than hidden states have, and a constant logit is none.
    rank = min(keep.rank, teacher.width, teacher.vocab_size - 1)
    coordinates = CoordinateCodec(rank, keep.tail_step, predicted=keep.profile == "compact") if rank else None
    support = Support.from_recipe(keep)
    numbers = support, tuple(keep.knots), teacher.vocab_size, keep.profile
    return TargetCodec(*numbers, coordinates=coordinates, label_log_probs=keep.label_log_probs)
