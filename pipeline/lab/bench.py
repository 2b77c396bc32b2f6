"""What caching costs and what it saves on this machine: every figure is a ratio of jobs that take turns in one process.

Machines differ and are noisy, so nothing here is a time to compare with another machine's: the jobs of a figure run one after
the other, round by round, a round's ratio is taken within the round, and the median of the rounds is the figure. The rows
are the first of the recipe's corpus, the teacher and the student those of the recipe; all that is written lies in a scratch
directory of the run.

    capture_overhead         stage one, from rows to committed shards, over `model(input_ids).logits` of the same batches
    bytes_per_position       of everything but the rows; of the recipe's own cache, where it is finished
    kl_T1, kl_T2, kl_T4      KL of exact to decoded targets, head and tail, in nats per position, at the temperatures that are served
    tail_mass_error_T2       mean error of the tail's probability
    read_...                 random rows into ready tensors, one thread; `memmap_...` the same numbers as raw arrays, copied as
                             they are (`memmap_ready_...`: into the same tensors)
    decode_...               the part of it that follows reading and checksums: decompressing and decoding
    step_vs_ce               cached KD + CE step over the step with cross-entropy alone, both through the fused loss
    step_vs_hf, memory_vs_hf the same over the student's own `model(labels=...)`: time, and peak above what stays
    online_vs_cached         the step with the teacher beside the student over the cached one
    data_wait                share of a training step in which Trainer's loader is waited for
    students_N_vs_online     teacher once and N students from the cache over N students with the teacher beside them, for one
                             pass over the rows; computed from the times above
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

from ..assess.fidelity import Setting
from ..base.errors import PipelineError, RecipeError
from ..capture.shard_pass import fill_shards
from ..capture.teacher_pass import TeacherPass
from ..corpus.labels import IGNORE
from ..corpus.row_writer import RowWriter
from ..corpus.rows import PackedRows
from ..distill.fused import fused_loss, fused_online_loss
from ..distill.loss_settings import LossSettings
from ..distill.student import build_student
from ..distill.trainer import DistillationTrainer
from ..distill.training_arguments import loader_workers
from ..models.loading import quiet_transformers
from ..models.output_layer import OutputLayer
from ..models.packing import body_hidden, model_inputs
from ..models.placement import choose_placement
from ..models.student_layers import student_from_layers
from ..models.teacher import Teacher
from ..recipe.paths import StudentPaths
from ..recipe.schema import Recipe
from ..recipe.student import StudentConfig
from ..store.codec import TargetCodec
from ..store.manifest import Manifest
from ..store.order import rows_at
from ..store.reader import LogitCache
from ..store.views import Subset
from ..store.writer import CacheWriter
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support, row_seeds
from .timing import _seconds, _wait, in_turns, one_thread, peak_bytes, ratios

PARTS = ("capture", "read", "step", "help")
_READ_ROWS = 1024
_READ_BATCH = 32
_STUDENTS = (1, 2, 4)


@dataclass
class Report:
    """The figures, each the median of its runs."""

    runs: dict[str, list[float]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, runs: list[float]) -> None:
        self.runs[name] = runs

    def __getitem__(self, name: str) -> float:
        return statistics.median(self.runs[name])

    def to_json(self) -> dict[str, Any]:
        return {**{name: self[name] for name in self.runs}, "runs": self.runs, "machine": self.machine}


def bench(
    recipe: Recipe, teacher: Teacher, *, rounds: int = 5, rows: int = 64, parts: tuple[str, ...] = PARTS
) -> Report:
    """Measure the parts that are asked for, on `rows` rows of the recipe's corpus.

    Raises IncompleteError where the corpus is not prepared, RecipeError where a step is asked for and there is no student.
    """
    report = Report(machine=machine(teacher))
    scratch = recipe.run_dir / "bench"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        corpus = _first_rows(PackedRows(recipe.paths.cache / "corpus"), rows, scratch / "rows")
        codec = TargetCodec(Support.from_recipe(recipe.cache), tuple(recipe.cache.knots), teacher.vocab_size)
        made = _Maker(teacher, corpus, codec, recipe.teacher.batch_rows, min(recipe.cache.shard_rows, corpus.rows))
        if "capture" in parts:
            _capture(report, made, rounds, scratch / "capture")
        if "read" in parts or "step" in parts:
            # One look at the teacher serves all that follows.
            cache = made.cache(scratch / "whole")
            _fidelity(report, recipe, made, cache)
        if "read" in parts:
            _read(report, made, cache, rounds, scratch)
        if "step" in parts:
            _step(report, recipe, teacher, cache, rounds)
        if "help" in parts:
            report.add("help_seconds", [_seconds(_help) for _ in range(rounds)])
        if {"capture", "step"} <= set(parts):
            _students(report)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return report


def machine(teacher: Teacher) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "teacher": str(teacher.placement),
    } | ({"gpu": torch.cuda.get_device_name()} if teacher.placement.device.type == "cuda" else {})


class _Maker:
    """Targets and caches of a few rows, made as stage one makes them."""

    def __init__(
        self, teacher: Teacher, corpus: PackedRows, codec: TargetCodec, batch_rows: int, shard_rows: int
    ) -> None:
        self.teacher, self.corpus, self.codec = teacher, corpus, codec
        self.batch_rows, self.shard_rows = batch_rows, shard_rows

    def batches(self) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        for first in range(0, self.corpus.rows, self.batch_rows):
            yield np.arange(first, min(first + self.batch_rows, self.corpus.rows))

    def writer(self, folder: Path, corpus: PackedRows, codec: TargetCodec, shard_rows: int) -> CacheWriter:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "corpus").symlink_to(corpus.local.resolve())
        return CacheWriter(folder, Manifest.create(self.teacher.identity, corpus, codec, shard_rows, seed=0))

    def capture(self, folder: Path) -> None:
        writer = self.writer(folder, self.corpus, self.codec, self.shard_rows)
        with contextlib.redirect_stdout(io.StringIO()):
            fill_shards(self.teacher, self.corpus, writer, batch_rows=self.batch_rows)

    def cache(self, folder: Path) -> LogitCache:
        self.capture(folder)
        return LogitCache(folder)


def _capture(report: Report, made: _Maker, rounds: int, folder: Path) -> None:
    inputs = [torch.from_numpy(made.corpus.take(rows)[0]).long() for rows in made.batches()]
    teacher = made.teacher

    @torch.inference_mode()
    def bare() -> None:
        for input_ids in inputs:
            teacher.model(input_ids=input_ids.to(teacher.placement.device)).logits  # noqa: B018
        _wait(teacher.placement.device)

    seconds = in_turns({"bare": bare, "stage one": lambda: made.capture(folder)}, rounds)
    positions = made.corpus.rows * made.corpus.row_length
    report.add("capture_overhead", ratios(seconds["stage one"], seconds["bare"]))
    report.add("capture_tokens_per_second", [positions / s for s in seconds["stage one"]])


def _fidelity(report: Report, recipe: Recipe, made: _Maker, cache: LogitCache) -> None:
    """How far decoded targets are from exact ones, batch by batch."""
    try:
        own: LogitCache | None = LogitCache(recipe.paths.cache)
    except PipelineError:
        own = None
    weighed = cache if own is None else own
    report.add("bytes_per_position", [weighed.bytes / weighed.positions])
    served = [t for t in (1.0, 2.0, 4.0) if Setting(made.codec.support, cache.knots).serves(t)]
    found: dict[str, list[float]] = {f"kl_T{t:g}": [] for t in served}
    if 2.0 in served:
        found["tail_mass_error_T2"] = []
    run = TeacherPass(made.teacher, made.codec.support, made.codec.knots)
    for rows in made.batches():
        batch = cache.batch(rows)
        # The same draws as in the cache.
        seeds = row_seeds(cache.manifest.identity.get("seed", 0), rows, cache.row_length)
        exact = run(batch["input_ids"], batch["segment_ids"], batch["labels"], seeds=seeds).targets
        exact = exact.to("cpu").flatten()[batch["labels"].flatten() != IGNORE]
        decoded = batch["targets"].flatten()[batch["targets"].mask.flatten()]
        for temperature in served:
            kl_N, error_N = divergence(exact, decoded, temperature)
            found[f"kl_T{temperature:g}"].append(float(kl_N.mean()))
            if temperature == 2.0:
                found["tail_mass_error_T2"].append(float(error_N.mean()))
    for name, values in found.items():
        report.add(name, values)


def divergence(exact: SparseTargets, decoded: SparseTargets, temperature: float) -> tuple[Tensor, Tensor]:
    """KL_T [N] of exact to decoded targets of the same supports, and the error of the tail's mass [N].

    Over the head's tokens and the tail as one: samples, which say what is in the tail, are left out.
    """
    log_p_NK, log_tail_N = (part.double() for part in exact.at_temperature(temperature))
    log_q_NK, log_q_tail_N = (part.double() for part in decoded.at_temperature(temperature))
    # Within a band decoding orders by id: bring both to one order, with what is not of the head last.
    log_p_NK, log_q_NK = (
        log_NK.gather(-1, torch.where(targets.head_mask, targets.token_ids, targets.vocab_size).argsort(-1))
        for log_NK, targets in ((log_p_NK, exact), (log_q_NK, decoded))
    )
    width = min(log_p_NK.shape[-1], log_q_NK.shape[-1])
    log_p_NK, log_q_NK = log_p_NK[:, :width], log_q_NK[:, :width]
    p_NK, p_tail_N = log_p_NK.exp(), log_tail_N.exp()
    on_head = torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), 0.0).sum(-1)
    on_tail = torch.where(p_tail_N > 0, p_tail_N * (log_tail_N - log_q_tail_N), 0.0)
    return on_head + on_tail, (p_tail_N - log_q_tail_N.exp()).abs()


def _read(report: Report, made: _Maker, cache: LogitCache, rounds: int, scratch: Path) -> None:
    """Random rows of a cache of about a thousand, one thread."""
    source = cache.corpus
    times = -(-_READ_ROWS // source.rows)
    corpus = _first_rows(source, source.rows, scratch / "many", times)
    targets = cache.batch(np.arange(len(cache)))["targets"]
    caches = {}
    for profile_name in ("compact", "fast"):
        codec = cache.manifest.codec if profile_name == "compact" else replace(made.codec, profile="fast")
        writer = made.writer(scratch / profile_name, corpus, codec, source.rows)
        writer.begin(codec)
        input_ids, _ = source.take(np.arange(source.rows))
        for shard in writer.pending():
            writer.write(shard, targets, input_ids, corpus.digest(*writer.manifest.shard_range(shard)), 0.0)
        caches[profile_name] = LogitCache(scratch / profile_name)
    order = rows_at(np.arange(corpus.rows), corpus.rows, seed=0)
    batches = [order[first : first + _READ_BATCH] for first in range(0, corpus.rows, _READ_BATCH)]
    raw = _raw_arrays(scratch, targets, times)

    def read(cache: LogitCache) -> None:
        for rows in batches:
            cache.batch(rows)

    def decoding(cache: LogitCache) -> Callable[[], None]:
        """Of what was read and checked before."""
        read_before = []
        for rows in batches:
            input_ids, segment_ids, labels = cache.corpus.examples(rows)
            read_before.append((cache.stored(rows), input_ids, cache.manifest.target_mask(labels, segment_ids)))

        def decode() -> None:
            for stored, input_ids, mask in read_before:
                cache.manifest.codec.decode(stored, input_ids, mask)

        return decode

    def copy(ready: bool) -> None:
        for rows in batches:
            for array, dtype in zip(raw, (torch.int64, torch.float32), strict=True):
                part = torch.from_numpy(array[rows])
                if ready:
                    part.to(dtype)

    jobs: dict[str, Callable[[], Any]] = {name: partial(read, cache) for name, cache in caches.items()}
    jobs |= {f"decode {name}": decoding(cache) for name, cache in caches.items()}
    with one_thread():
        seconds = in_turns({**jobs, "memmap": partial(copy, False), "ready": partial(copy, True)}, rounds)
    positions = caches["compact"].positions
    names = {
        "read_positions_per_second": "compact",
        "read_fast_positions_per_second": "fast",
        "decode_positions_per_second": "decode compact",
        "decode_fast_positions_per_second": "decode fast",
        "memmap_positions_per_second": "memmap",
        "memmap_ready_positions_per_second": "ready",
    }
    for name, job in names.items():
        report.add(name, [positions / s for s in seconds[job]])
    report.add("fast_vs_memmap", ratios(seconds["memmap"], seconds["fast"]))
    report.add("fast_vs_memmap_ready", ratios(seconds["ready"], seconds["fast"]))


def _raw_arrays(folder: Path, targets: SparseTargets, times: int) -> list[np.memmap[Any, np.dtype[Any]]]:
    """Token ids and log-probabilities as flat files of the narrowest plain types, memory-mapped."""
    arrays = []
    ids = targets.token_ids.clamp(min=0).numpy()
    for name, values, dtype in (
        ("ids", ids, np.uint16 if targets.vocab_size <= 2**16 else np.uint32),
        ("log_probs", targets.log_probs.numpy(), np.float16),
    ):
        array = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(times * len(values), *values.shape[1:])
        )
        for place in range(times):
            array[place * len(values) : (place + 1) * len(values)] = values
        arrays.append(array)
    return arrays


def _step(report: Report, recipe: Recipe, teacher: Teacher, cache: LogitCache, rounds: int) -> None:
    """Optimizer steps of one student on the same rows, each way of training in turn."""
    config = next((s for s in recipe.students.values() if s.mode == "cached"), None)
    if config is None:
        raise RecipeError("bench of a step needs a student with mode = 'cached' in the recipe")
    placement = choose_placement(config.device, config.dtype)
    device = placement.device
    student = _student(config, recipe, teacher).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    rows = np.arange(min(config.batch_rows, len(cache)))
    autocast = torch.autocast(device.type, placement.dtype, enabled=placement.dtype != torch.float32)
    kd, ce = (w if isinstance(w, float) else w.peak for w in (config.kd_weight, config.ce_weight))

    def with_targets() -> dict[str, Any]:
        return {key: value.to(device) for key, value in cache.batch(rows).items()}  # type: ignore[attr-defined]

    def without() -> dict[str, Any]:
        input_ids, segment_ids, labels = (torch.from_numpy(part).long() for part in cache.corpus.examples(rows))
        return {
            key: value.to(device)
            for key, value in {"input_ids": input_ids, "segment_ids": segment_ids, "labels": labels}.items()
        }

    def step(loss: Callable[[dict[str, Any]], Tensor], fetch: Callable[[], dict[str, Any]]) -> None:
        optimizer.zero_grad(set_to_none=True)
        batch = fetch()
        with autocast:
            value = loss(batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _wait(device)

    layer = OutputLayer.of(student)
    settings = LossSettings(config.temperature, kd, ce, config.tail, config.divergence, config.alpha)

    def hidden(batch: dict[str, Any]) -> Tensor:
        return body_hidden(student, batch["input_ids"], batch["segment_ids"])

    def cached(batch: dict[str, Any]) -> Tensor:
        targets = batch["targets"].restrict_vocabulary(layer.weight.shape[0])
        return fused_loss(hidden(batch), layer, targets, batch["labels"], settings).loss

    def ce_only(batch: dict[str, Any]) -> Tensor:
        return fused_loss(hidden(batch), layer, None, batch["labels"], LossSettings(kd_weight=0.0, ce_weight=1.0)).loss

    def plain(batch: dict[str, Any]) -> Tensor:
        loss: Tensor = student(**model_inputs(batch), labels=batch["input_ids"]).loss
        return loss

    def online(batch: dict[str, Any]) -> Tensor:
        labels = batch["labels"]
        teacher_ND = teacher.hidden(batch["input_ids"], batch["segment_ids"]).flatten(0, 1)

        def teacher_logits(rows: slice) -> Tensor:
            return teacher.output_layer.logits(teacher_ND[rows])

        kl = LossSettings(config.temperature, kd, ce)
        return fused_online_loss(hidden(batch), layer, teacher_logits, labels != IGNORE, labels, kl).loss

    jobs: dict[str, Callable[[], None]] = {
        "cached": partial(step, cached, with_targets),
        "ce": partial(step, ce_only, without),
        "hf": partial(step, plain, without),
        "online": partial(step, online, without),
    }
    seconds = in_turns(jobs, rounds)
    report.add("step_vs_ce", ratios(seconds["cached"], seconds["ce"]))
    report.add("step_vs_hf", ratios(seconds["cached"], seconds["hf"]))
    report.add("online_vs_cached", ratios(seconds["online"], seconds["cached"]))
    tokens = len(rows) * cache.row_length
    for name in ("cached", "online"):
        report.add(f"{name}_step_tokens_per_second", [tokens / s for s in seconds[name]])
    peaks = [
        {name: _peak_over_gradients(jobs[name], student, device) for name in ("cached", "hf")} for _ in range(rounds)
    ]
    report.add("memory_vs_hf", [peak["cached"] / peak["hf"] for peak in peaks])
    report.add("data_wait", _data_wait(config, student, cache, lambda batch: step(cached, lambda: batch), rounds))


def _peak_over_gradients(step: Callable[[], None], student: Any, device: torch.device) -> float:
    """Peak of a step beyond parameters, optimizer and the gradients, which are made anew in every step."""
    student.zero_grad(set_to_none=True)
    peak = peak_bytes(step, device)
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    return peak - float(sum(grad.numel() * grad.element_size() for grad in grads))


def _data_wait(
    config: StudentConfig, student: Any, cache: LogitCache, step: Callable[[dict[str, Any]], None], rounds: int
) -> list[float]:
    """Share of each step that is spent waiting for the batch, with the loader that Trainer is given."""
    args = TrainingArguments(
        output_dir=str(cache.path / "trainer"),
        per_device_train_batch_size=config.batch_rows,
        use_cpu=next(student.parameters()).device.type == "cpu",
        dataloader_num_workers=loader_workers(config, [str(cache.path)], next(student.parameters()).device),
        report_to="none",
    )
    # The first step starts the loader, and the last of an epoch waits for nothing: both are left out.
    rows = Subset(cache, np.arange((rounds + 3) * config.batch_rows) % len(cache))
    with quiet_transformers():
        batches = iter(DistillationTrainer(student, args, rows).get_train_dataloader())
    shares: list[float] = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter()
        step(batch)
        shares.append((waited - begin) / (time.perf_counter() - begin))
    return shares[1:]


def _student(config: StudentConfig, recipe: Recipe, teacher: Teacher) -> Any:
    if config.layers is None:
        return build_student(config, StudentPaths(recipe.run_dir), recipe.seed).train()
    return student_from_layers(teacher.model, config.layers).float().train()


def _students(report: Report) -> None:
    """Teacher's pass and N students against N students with the teacher beside them, per token of one pass."""
    once = [1 / speed for speed in report.runs["capture_tokens_per_second"]]
    cached = [1 / speed for speed in report.runs["cached_step_tokens_per_second"]]
    online = [1 / speed for speed in report.runs["online_step_tokens_per_second"]]
    for number in _STUDENTS:
        totals = [(a + number * b) / (number * c) for a, b, c in zip(once, cached, online, strict=True)]
        report.add(f"students_{number}_vs_online", totals)


def _first_rows(source: PackedRows, rows: int, folder: Path, times: int = 1) -> PackedRows:
    """A corpus of the first rows of another, perhaps several times over."""
    rows = min(rows, source.rows)
    writer = RowWriter(folder, source.row_length)
    take = np.arange(rows * times) % rows
    for first in range(0, len(take), 1024):
        input_ids, segment_ids = source.take(take[first : first + 1024])
        writer.write_rows(input_ids, segment_ids, np.ones_like(input_ids))
    writer.commit({})
    return PackedRows(folder)


def _help() -> None:
    subprocess.run([sys.executable, "-m", "logit_cache", "--help"], stdout=subprocess.DEVNULL, check=True)
