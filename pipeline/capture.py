"""Stage one: the teacher's pass over the rows of a cache, shard by shard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import models, processes
from pipeline.background import Background
from pipeline.cache import LogitCache
from pipeline.codec import Arrays, TargetCodec
from pipeline.commit import ACCEPTABLE, CacheWriter, verify
from pipeline.config import Recipe
from pipeline.continuation import note_continuation
from pipeline.durable import TEMPORARY, publish_directory, remove_tree, write_json, written_aside
from pipeline.errors import CorruptError, RecipeError, storage_error
from pipeline.evaluation import TEACHER_FACTS, forward_speed, model_bytes
from pipeline.manifest import Manifest
from pipeline.progress import Meter, duration, say
from pipeline.rows import IGNORE, IntArray, PackedRows
from pipeline.signals import Tap, signals_of
from pipeline.supports import Support, position_seeds
from pipeline.targets import SparseTargets
from pipeline.teacher import Teacher, load_model, load_tokenizer, quiet


def capture(
    teacher: Teacher, corpus: PackedRows, writer: CacheWriter, *, batch_rows: int, task: int = 0, num_tasks: int = 1
) -> None:
    """Fill the shards of this task that are not committed yet.

    Rows are batched inside their shard only, so what is written does not depend on where an earlier run stopped. The first
    task to come runs the teacher over the first shard, for the codec to learn from, even where that is another's to write.
    """
    manifest = writer.manifest
    mine = len(range(task, manifest.num_shards, num_tasks))
    pending = writer.pending(task, num_tasks)
    which = f" of task {task} of {num_tasks}" if num_tasks > 1 else ""
    say(f"cache: {writer.path}: {mine - len(pending)} of {mine} shards{which} found, {len(pending)} to do")
    first = None if writer.begun or not manifest.num_shards else 0
    rows = sum(
        np.subtract(*manifest.shard_range(shard)[::-1]) for shard in {*pending, *([] if first is None else [first])}
    )
    with Meter(f"cache {writer.path.name}", int(rows) * manifest.row_length) as meter:
        learned_from = None
        if not writer.begun:
            # The codec learns from the first shard, whichever task comes first.
            codec = manifest.codec
            if first is not None:
                learned_from = _run(teacher, corpus, manifest, first, batch_rows, meter, "first shard")
                _check_numbers(learned_from[0], learned_from[2], first)
                codec = codec.learn(learned_from[0].trim(), learned_from[1], corpus.rows * corpus.row_length)
            writer.begin(codec)
        beside = _has_spare_core(teacher) or not isinstance(writer.path, Path)
        with Background() as writing:
            for number, shard in enumerate(pending, 1):
                run = learned_from if shard == first else None
                if run is None:
                    run = _run(teacher, corpus, manifest, shard, batch_rows, meter, f"shard {number} of {len(pending)}")
                write = partial(_write, writer, corpus, shard, _recorded(run[0].mask.device), *run)
                if beside:
                    writing.add(write)
                else:
                    write()
                learned_from = None
                del run, write  # or it would be held while the next one is made
        if pending:
            say(f"cache: {writer.path}: {len(pending)} shards written in {duration(meter.seconds)}")


def _run(
    teacher: Teacher, corpus: PackedRows, manifest: Manifest, shard: int, batch_rows: int, meter: Meter, note: str
) -> tuple[SparseTargets, IntArray, Tensor, Arrays]:
    """Targets and tokens [rows, L] of a shard, the teacher's own loss summed over each row in nats [rows], and its signals,
    encoded.

    On a GPU this may return before they are computed: only signals are read off it.
    """
    start, stop = manifest.shard_range(shard)
    parts, nats, ids = [], [], []
    tap = Tap([signal.name for signal in manifest.signals]) if manifest.signals else None
    observed: dict[str, list[Any]] = {}
    positions_L = torch.arange(manifest.row_length)
    for first in range(start, stop, batch_rows):
        rows_B = np.arange(first, min(first + batch_rows, stop))
        input_ids, segment_ids, labels = corpus.examples(rows_B)
        rows_BL = torch.from_numpy(rows_B)[:, None].expand(-1, manifest.row_length)
        targets, losses = teacher.targets(
            torch.from_numpy(input_ids).long(),
            torch.from_numpy(segment_ids).long(),
            torch.from_numpy(labels),
            support=manifest.codec.support,
            knots=manifest.codec.knots,
            seeds=position_seeds(manifest.identity.get("seed", 0), rows_BL, positions_L),
            mask=torch.from_numpy(manifest.target_mask(labels, segment_ids)),
            tap=tap,
        )
        parts.append(targets)
        ids.append(input_ids)
        for signal in manifest.signals:
            assert tap is not None
            for name, values in signal.encode(tap.values[signal.name]).items():
                observed.setdefault(name, []).append(values)
        nats.append(losses)
        meter.advance(input_ids.size, note)
    arrays = {name: np.concatenate(values) for name, values in observed.items()}
    return SparseTargets.cat(parts), np.concatenate(ids), torch.cat(nats), arrays


def _write(
    writer: CacheWriter,
    corpus: PackedRows,
    shard: int,
    computed: torch.cuda.Event | None,
    targets: SparseTargets,
    input_ids: IntArray,
    nats_R: Tensor,
    observed: Arrays,
) -> None:
    """Encode and commit a shard, on whatever thread; of a GPU when `computed` has come to pass there."""
    if computed is not None:
        # On a stream of its own, which waits for this shard alone and not for the next, which is being computed.
        stream = torch.cuda.Stream(targets.mask.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(computed)
            targets, nats_R = targets.to("cpu", non_blocking=True), nats_R.to("cpu", non_blocking=True)
        stream.synchronize()
    _check_numbers(targets, nats_R, shard)
    start, stop = writer.manifest.shard_range(shard)
    labels = corpus.labels(np.arange(start, stop)) if writer.manifest.objective == "masked" else None
    count = None if labels is None else int((labels != IGNORE).sum())
    # Exactly, so that it does not depend on how rows were batched.
    nats = math.fsum(nats_R.tolist())
    writer.write(shard, targets.trim(), input_ids, corpus.digest(start, stop), nats, observed, count)


def _has_spare_core(teacher: Teacher) -> bool:
    """Whether a shard can be encoded while the teacher computes the next one.

    Where the teacher has every core, each of its products waits for the thread that was held up: on two cores stage one took
    1.16 times the bare forward so, and 1.04 with one after the other.
    """
    if teacher.placement.device.type != "cpu":
        return True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.get_num_threads() < cores


def _check_numbers(targets: SparseTargets, nats_R: Tensor, shard: int) -> None:
    """Raises RecipeError for a teacher whose logits are no distribution: whatever is rounded of them would look like one."""
    first_BL, curve_BLC = targets.log_probs[..., 0], targets.tail_curve
    # No tail is -inf, and so is the first entry where a support keeps none.
    numbers_BL = (first_BL < torch.inf) & (curve_BLC < torch.inf).all(-1)
    wrong = int((targets.mask & ~numbers_BL).sum())
    if wrong:
        raise RecipeError(
            f"the teacher's logits are not finite numbers at {wrong} of {int(targets.mask.sum())} positions of shard {shard}: "
            "set another teacher.dtype, float16 may have overflowed"
        )
    if not torch.isfinite(nats_R).all():
        raise RecipeError(
            f"the teacher gives a token of shard {shard} no probability at all: it is not a teacher of this text"
        )


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """The moment at which a GPU will have done what it has been told so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def shard_count(recipe: Recipe) -> int:
    """Shards of the larger cache of a run. Raises IncompleteError where the rows are not prepared."""
    sides = (recipe.cache_dir, recipe.heldout_dir)
    return max(-(-PackedRows(path / "corpus").rows // recipe.cache.shard_rows) for path in sides)


def open_caches(recipe: Recipe, teacher: Teacher, accept: Sequence[str] = ()) -> list[tuple[CacheWriter, PackedRows]]:
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
        (recipe.cache_dir, Support.of(keep.support, k=keep.k, p=keep.p, tau=keep.tau, draws=keep.draws), keep.profile),
        (recipe.heldout_dir, Support.of("topk", k=keep.heldout_k), "compact"),
    ]
    for _, support, _ in sides:
        try:
            support.check(teacher.vocab_size)
        except ValueError as error:
            raise RecipeError(f"cache: {error}") from error
    if teacher.shared and any(not signal.startswith("hidden.") for signal in keep.signals):
        raise RecipeError(
            "cache.signals: attention and qk cannot be taken of a teacher cut by teacher.parallel = 'tensor'"
        )
    signals = signals_of(keep.signals, teacher.model.config, recipe.corpus.row_length)
    opened = []
    for path, support, profile in sides:
        corpus = PackedRows(path / "corpus")
        codec = TargetCodec(support, tuple(keep.knots), teacher.vocab_size, profile)
        # Students are measured by their targets alone.
        kept = signals if path == recipe.cache_dir else ()
        manifest = Manifest.create(teacher.identity, corpus, codec, keep.shard_rows, recipe.seed, kept, keep.targets_on)
        opened.append((CacheWriter(path, manifest, accept=accept), corpus))
    return opened


def check_caches(recipe: Recipe) -> None:
    """Every shard is committed, and every byte is as it was written.

    Raises IncompleteError for missing shards, CorruptError naming the bad ones.
    """
    for path in (recipe.cache_dir, recipe.heldout_dir):
        shards = len(LogitCache(path).records)
        bad = verify(path)
        for shard, problem in bad.items():
            say(f"shard {shard:05}: {problem}")
        if bad:
            raise CorruptError(
                f"{path}: {len(bad)} bad shards: run `logit-cache verify {path} --repair`, then `cache` or `submit` again"
            )
        say(f"finalise: {path}: {shards} shards committed, all whole")


def summarise(recipe: Recipe) -> None:
    """What the finished cache is, and a warning where the teacher cannot be the right one."""
    done = LogitCache(recipe.cache_dir)
    if not done.positions:
        return
    say(
        f"cache: {done.path}: {done.positions:,} positions, {done.bytes / done.positions:.1f} bytes each, "
        f"teacher loss {done.teacher_loss:.3f} nats"
    )
    unigram = unigram_loss(done.corpus, done.vocab_size)
    if done.teacher_loss >= unigram:
        say(
            f"warning: the teacher's loss ({done.teacher_loss:.3f} nats) is no better than the rows' own token "
            f"frequencies ({unigram:.3f}): is it the right model, tokenizer and text?"
        )


def unigram_loss(corpus: PackedRows, vocab_size: int) -> float:
    """Cross-entropy in nats of a unigram model of the rows: what a teacher must beat to have anything to teach.

    Every token is predicted from the frequencies of all others, so that a short text does not predict itself. Of masked rows
    the hidden tokens are counted, which are all that is predicted there.
    """
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, corpus.rows, 1024):
        rows = np.arange(first, min(first + 1024, corpus.rows))
        labels = corpus.labels(rows)
        tokens = labels[labels != IGNORE] if corpus.objective == "masked" else corpus.take(rows)[0].ravel()
        counts += np.bincount(tokens, minlength=vocab_size)
    seen = counts[counts > 0]
    total, kinds = int(seen.sum()), len(seen)
    # As many imagined tokens as there are kinds, spread evenly over the vocabulary, stand for what was not seen.
    p = (seen - 1 + kinds / vocab_size) / (total - 1 + kinds)
    return -math.fsum(seen * np.log(p)) / total


START = "start.json"


def export_for_students(recipe: Recipe, teacher: Teacher, source: str) -> None:
    """Leave beside the cache what later stages need of the teacher, so that they never open it.

    The first weights of every student that is made of its layers, its size and speed for the result table, and what it says
    after the report's prompt. Of a shared
    teacher all processes must come here, and the first one writes.
    """
    facts = recipe.run_dir / TEACHER_FACTS
    weights = teacher.identity["weights"]
    if _read_json(facts).get("weights") != weights:
        folder = Path(source)
        parameters = sum(p.numel() for p in teacher.model.parameters())
        size = model_bytes(folder) if folder.is_dir() else parameters * teacher.placement.dtype.itemsize
        speed = forward_speed(teacher.model, PackedRows(recipe.cache_dir / "corpus"))
        if processes.rank() == 0:
            write_json(facts, {"weights": weights, "parameters": parameters, "bytes": size, "tokens_per_second": speed})
    if recipe.report.prompt is not None and not teacher.shared:
        tokenizer = load_tokenizer(source, recipe.teacher.revision)
        note_continuation(teacher, tokenizer, recipe.report.prompt, recipe.run_dir, recipe.seed)
    whole = None
    for name, student in recipe.students.items():
        if student.layers is None or processes.rank() > 0:
            continue
        start = recipe.student_dir(name) / "start"
        origin = {"layers": student.layers, "token_types": student.token_types, "weights": weights}
        if _read_json(start / START) == origin:
            continue
        if whole is None:
            whole = teacher.model
            if not models.is_whole(whole):
                whole = load_model(
                    source,
                    replace(teacher.placement, device=torch.device("cpu")),
                    recipe.teacher.revision,
                    objective=recipe.corpus.objective,
                )
        model = models.student_from_layers(whole, student.layers, student.token_types)
        try:
            with written_aside(start) as aside:
                with quiet():
                    model.save_pretrained(aside)
                write_json(aside / START, origin)
                publish_directory(aside, start)
        except Exception as error:
            if storage_error(error) is not None or _read_json(start / START) != origin:
                raise  # else another task has written it, and cleared away what it found beside it
        for leftover in start.parent.glob(f"{start.name}{TEMPORARY}*"):
            remove_tree(leftover)
        say(f"cache: first weights of student {name!r} (teacher layers {_chosen(teacher, student.layers)}) in {start}")


def _chosen(teacher: Teacher, layers: int | list[int]) -> list[int]:
    return models.layers_to_copy(layers, int(teacher.model.config.get_text_config().num_hidden_layers))


def _read_json(file: Path) -> dict[str, object]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
