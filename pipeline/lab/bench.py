"""The cost of caching and its savings on this machine: ratios of jobs that take turns in one process.

Machines differ and are noisy, so a time means little on another machine: the jobs of a figure run one after the other,
round by round, a ratio is taken within each round, and the median of the rounds is the figure. The rows are the first
of the recipe's corpus, teacher and student those of the recipe; everything is written to a scratch directory of the
run.

    capture_overhead         stage one, from rows to committed shards, over `model(input_ids).logits` of these batches
                             (without what is learned once, from at most 2^17 positions of a corpus of any size)
    bytes_per_position       of everything but the rows; of the recipe's own cache where it is finished
    kl_T1, kl_T2, kl_T4      KL of exact to decoded targets, head and tail, in nats per position, where T is served
    whole_kl_T1, _T2, _T4    KL(p || p^) of targets with a tail shape: over all tokens, the shape's error included
    tail_mass_error_T2       mean error of the tail's probability
    read_...                 random rows into ready tensors, one thread; `memmap_...` the same numbers as raw arrays,
                             copied unchanged (`memmap_ready_...`: into the same tensors)
    decode_...               the part after reading and checksums: decompressing and decoding
    step_vs_ce               cached KD + CE step over the step with cross-entropy alone, both through the fused loss
    step_vs_hf, memory_vs_hf the same over the student's own `model(labels=...)`: time, and peak memory
    shape_..., bucket_...    these three with the tail that the cached step does not have: a made-up shape of 32
                             coordinates where the cache has none, else a bucket
    online_vs_cached         the online step, teacher included, over the cached one
    data_wait                share of a training step that waits for Trainer's loader
    students_N_vs_online     teacher once and N students from the cache over N online students, for one pass;
                             computed from the times above
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base.errors import RecipeError
from ..capture.writers import training_codec
from ..corpus.rows import PackedRows
from ..models.batch_rows import rows_per_pass
from ..models.teacher import Teacher, teacher_of
from ..recipe.schema import Recipe
from ..store.shard_size import shard_rows_of
from .bench_capture import measure_capture, measure_rounding, measure_size
from .bench_read import measure_read
from .bench_result import PARTS, BenchResult
from .bench_step import measure_step
from .scratch_cache import CacheMaker, repeat_rows
from .timing import seconds_of

STUDENTS = (1, 2, 4)


def bench(recipe: Recipe, *, rounds: int = 5, rows: int = 64, parts: tuple[str, ...] = PARTS) -> BenchResult:
    """Measure the given parts on `rows` rows of the recipe's corpus.

    Raises IncompleteError where the corpus is not prepared, RecipeError for an unknown part, for masked rows, and for
    the part "step" without a cached student.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise RecipeError(f"--only {unknown[0]!r}: one of {', '.join(PARTS)}")
    if recipe.corpus.objective != "causal":
        raise RecipeError("bench measures causal rows: corpus.objective is 'masked' in this recipe")
    teacher = teacher_of(recipe)
    result = BenchResult(machine(teacher))
    scratch = recipe.run_dir / "bench"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        source = PackedRows.of_cache(recipe.paths.cache)
        first = source.take(np.arange(min(rows, source.rows)))
        corpus = repeat_rows(scratch / "rows", *first, len(first[0]))
        codec = training_codec(recipe.cache.model_copy(update={"profile": "compact"}), teacher.facts)
        shard_rows = shard_rows_of(recipe, recipe.paths.cache, source.rows)
        batch_rows = rows_per_pass(recipe.teacher.batch_rows, teacher, source.row_length)
        maker = CacheMaker(teacher, corpus, codec, batch_rows, shard_rows)
        if "capture" in parts:
            result.runs |= measure_capture(maker, rounds, scratch / "capture")
        if "read" in parts or "step" in parts:
            cache = maker.cache(scratch / "whole")
            result.runs |= measure_size(recipe, cache) | measure_rounding(maker, cache)
        if "read" in parts:
            result.runs |= measure_read(maker, cache, rounds, scratch)
        if "step" in parts:
            result.runs |= measure_step(recipe, teacher, cache, rounds)
        if "help" in parts:
            command = [sys.executable, "-m", "logit_cache", "--help"]
            show_help = partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True)
            result.runs["help_seconds"] = [seconds_of(show_help) for _ in range(rounds)]
        if {"capture", "step"} <= set(parts):
            result.runs |= _students_vs_online(result.runs)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return result


def machine(teacher: Teacher) -> dict[str, Any]:
    """Processor, threads, versions and placement behind the figures."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "teacher": str(teacher.placement),
    } | ({"gpu": torch.cuda.get_device_name()} if teacher.placement.device.type == "cuda" else {})


def _students_vs_online(runs: dict[str, list[float]]) -> dict[str, list[float]]:
    """Time of one teacher pass and N cached students over that of N online students, per token of one pass."""
    capture, cached, online = (
        [1 / speed for speed in runs[f"{name}_tokens_per_second"]] for name in ("capture", "cached_step", "online_step")
    )
    return {
        f"students_{number}_vs_online": [
            (a + number * b) / (number * c) for a, b, c in zip(capture, cached, online, strict=True)
        ]
        for number in STUDENTS
    }
