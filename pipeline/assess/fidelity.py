"""The fidelity table: bytes and errors of many settings, measured on a few rows before a large job.

The sample goes the whole way for each setting: reduced to targets, encoded by a codec and in a tail basis that are
learned from some rows, and decoded from others. What is decoded is compared with the teacher's distribution:

    bytes       of a position in the finished cache: everything but `corpus/`
    KL at T     KL(p || p^), of settings with a tail shape; a bucket has no p^, and its KL is that of a uniform tail
    gradient    the error of the gradient of a student's output layer, by its length: of a student near the teacher, and
                of one far from it (`target_error`)
    rounding    sum over the kept entries of p_T (log p_T - log p'_T), both renormalised, p' after the codec: what
                rounding costs. At T = 1 p is an entry's weight in training: of a sample, the mass that it stands for
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..capture.learning import learning_rows
from ..corpus.rows import PackedRows
from ..models.teacher import Teacher
from ..store.basis_file import StoredBasis
from ..store.codec import TargetCodec
from ..store.manifest import Manifest
from ..targets.knots import serves
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support
from .grid import Setting
from .grid_bases import grid_bases
from .round_trip import learned_bytes, round_trip
from .sample import Sample, at_knots, reduce_sample, run_teacher, split_rows, student_states
from .target_error import Errors, Group, Shapes, States, Uniform, target_errors

TEMPERATURES = (1.0, 2.0, 4.0)
_BLOCK = 256
_REDUCE, _FIT, _SHAPE = 5.0, 12.0, 9.0
"""Times a block of logits and their softmax: for each position its targets, for each position learned from the fit of a
rank, for each one measured on the errors of a setting with a shape."""
_POSITIONS = 2048
"""Errors are measured on so many, or on fewer than twice as many."""


@dataclass(frozen=True)
class Measured:
    """One line of the fidelity table. Figures by temperature are of those that the setting serves."""

    setting: Setting
    bytes_per_position: float
    """Of the finished cache, with its share of codebook and tail basis."""
    mass: float
    """Mean teacher probability on the head at T = 1."""
    rounding: dict[float, float]
    kl: dict[float, float]
    """KL(p || p^); without a shape that of a uniform tail, and of samples empty."""
    gradient: dict[str, dict[float, float]]
    """Error of the gradient by student and temperature."""
    front: dict[str, list[float]] = field(default_factory=dict)
    """`kl` and each student -> the temperatures at which no other setting has fewer bytes and a smaller error."""

    @property
    def errors(self) -> dict[str, dict[float, float]]:
        """`kl`, where there is a shape, and each student -> error by temperature."""
        return {"kl": self.kl if self.setting.rank else {}, **self.gradient}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), **self.setting.to_json()}


@dataclass(frozen=True)
class Fidelity:
    """The table, and the sample behind it."""

    lines: list[Measured]
    """The first setting's, then by support and bytes."""
    positions: int
    """Measured on."""
    learned_positions: int
    """Learned from."""
    stage_one_positions: int
    """That stage one learns from: where they are more, its bases are better."""
    students: dict[str, int | list[int]]
    """Name -> the teacher's layers that it has."""
    teacher_tokens_per_second: float
    """Speed of stage one with the first setting: forward pass, reduction to targets and encoding."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "lines": [line.to_json() for line in self.lines]}


def measure_fidelity(
    teacher: Teacher,
    students: Mapping[str, int | list[int]],
    corpus: PackedRows,
    codec: TargetCodec,
    settings: Sequence[Setting],
    *,
    shard_rows: int,
    seed: int,
    learned_rows: int,
    measured_rows: int,
    batch_rows: int,
    targets_on: str = "real",
    progress: Callable[[str], None] = lambda _: None,
) -> Fidelity:
    """Measure every setting on some rows spread over the corpus; codecs and tail bases learn from others.

    Errors are those of 2,048 to 4,095 positions, where there are so many: of many rows, since positions of one text err
    alike.

    `students`: name -> the teacher's layers that it has, of each student whose gradient is measured. `codec` has what
    all settings share. `progress` is called with the name of each finished piece of work (`pieces`).
    """
    learned, held = (
        run_teacher(teacher, corpus, rows, batch_rows, targets_on)
        for rows in split_rows(corpus.rows, learned_rows, measured_rows)
    )
    progress("teacher")
    some = slice(None, None, max(int(held.mask_BL.sum()) // _POSITIONS, 1))
    states = {}
    for name, layers in students.items():
        of_student = student_states(teacher, held, layers, batch_rows)
        states[name] = replace(of_student, hidden_ND=of_student.hidden_ND[some])
        progress(f"student {name}")
    supports = list(dict.fromkeys(setting.support for setting in settings))
    knots = tuple(sorted({knot for setting in settings for knot in setting.knots}))
    to_learn, _ = reduce_sample(teacher, learned, supports, knots, seed)
    exact, reduction_seconds = reduce_sample(teacher, held, supports, knots, seed)
    progress("targets")

    tokens = corpus.rows * corpus.row_length
    positions = max(corpus.rows * int(held.mask_BL.sum()) // len(held.rows), 1)
    bases = _bases(teacher, learned, settings, to_learn, tokens, progress)
    manifest = Manifest.create(teacher.identity, corpus, codec, shard_rows, seed, targets_on=targets_on)
    sizes, decoded, encoding_seconds = [], [], 0.0
    for setting in settings:
        basis = bases.get(setting)
        known = at_knots(to_learn[setting.support], setting.knots)
        own = setting.codec(codec).learn(known, learned.columns["input_ids"], tokens)
        targets = at_knots(exact[setting.support], setting.knots)
        if basis is not None and own.coordinates is not None:
            own = replace(own, coordinates=replace(own.coordinates, basis=basis.basis()))
            targets = replace(targets, tail_coordinates=_coordinates(held, basis), basis=basis.basis())
        trip = round_trip(manifest.with_codec(own), held, targets)
        once = sum(learned_bytes(value) for value in (own.codebook, basis) if value is not None)
        sizes.append(trip.bytes_per_position + once / positions)
        decoded.append(trip.targets[held.mask_BL][some])
        encoding_seconds = encoding_seconds or trip.seconds
        progress(str(setting))
    device = teacher.placement.device
    teacher_states = States(held.states[some].to(device), teacher.output_layer)
    errors = _errors(teacher_states, states, settings, [targets.to(device) for targets in decoded])
    progress("errors")
    lines = []
    for setting, size, targets, found in zip(settings, sizes, decoded, errors, strict=True):
        whole = at_knots(exact[setting.support], setting.knots)[held.mask_BL][some]
        on_head = torch.where(whole.head_mask, whole.log_probs.exp(), 0.0).sum(-1)
        rounding = {t: rounding_kl(whole, targets, t) for t in TEMPERATURES if serves(t, setting.knots)}
        lines.append(Measured(setting, size, float(on_head.mean()), rounding, found.kl, found.gradient))
    teacher_seconds = (learned.seconds + held.seconds) / (learned.mask_BL.numel() + held.mask_BL.numel())
    seconds = teacher_seconds + (reduction_seconds + encoding_seconds) / held.mask_BL.numel()
    return Fidelity(
        lines=mark_fronts(lines),
        positions=len(teacher_states.hidden_ND),
        learned_positions=int(learned.mask_BL.sum()),
        stage_one_positions=len(learning_rows(corpus.rows, corpus.row_length)) * corpus.row_length,
        students=dict(students),
        teacher_tokens_per_second=1 / max(seconds, 1e-12),
    )


@torch.inference_mode()
def expected_seconds(
    teacher: Teacher,
    corpus: PackedRows,
    settings: Sequence[Setting],
    learned_rows: int,
    measured_rows: int,
    batch_rows: int,
) -> float:
    """About how long `measure_fidelity` takes on this machine, from one batch of the teacher and one block of logits.

    The counts are those of a run with SmolLM2 on two cores, in units of the block.
    """
    rows = np.arange(min(batch_rows, corpus.rows))
    run_teacher(teacher, corpus, rows, batch_rows, "real")  # the first pass is slower
    batch = run_teacher(teacher, corpus, rows, batch_rows, "real")
    some = batch.hidden_BLD.flatten(0, 1)[:_BLOCK].to(teacher.placement.device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        teacher.output_layer.logits(some).float().softmax(-1).sum().item()
        times.append((time.perf_counter() - start) / len(some))
    block = median(times[1:])
    learned, measured = (len(part) * corpus.row_length for part in split_rows(corpus.rows, learned_rows, measured_rows))
    shapes = sum(setting.rank > 0 for setting in settings)
    ranks = len({setting.rank for setting in settings if setting.rank})
    tokens = learned + measured
    blocks = _REDUCE * tokens + _FIT * ranks * learned + _SHAPE * shapes * min(measured, _POSITIONS)
    return 1.3 * batch.seconds / batch.mask_BL.numel() * tokens + block * blocks


def pieces(students: Mapping[str, int | list[int]], settings: Sequence[Setting]) -> int:
    """Pieces of work of `measure_fidelity`."""
    return 1 + len(students) + 1 + len({setting.rank for setting in settings if setting.rank}) + len(settings) + 1


def _bases(
    teacher: Teacher,
    learned: Sample,
    settings: Sequence[Setting],
    targets_of: Mapping[Support, SparseTargets],
    tokens: int,
    progress: Callable[[str], None],
) -> dict[Setting, StoredBasis]:
    """The tail basis of each setting that has one: of one rank and support for all steps."""
    found: dict[Setting, StoredBasis] = {}
    for rank in dict.fromkeys(setting.rank for setting in settings if setting.rank):
        of_rank = [setting for setting in settings if setting.rank == rank]
        supports = list(dict.fromkeys(setting.support for setting in of_rank))
        heads = [targets_of[support][learned.mask_BL] for support in supports]
        fitted = grid_bases(teacher, learned.states, rank, of_rank[0].step, heads, tokens)
        by_support = dict(zip(supports, fitted, strict=True))
        found |= {setting: by_support[setting.support] for setting in of_rank}
        progress(f"basis of rank {rank}")
    return found


def _coordinates(sample: Sample, basis: StoredBasis) -> Tensor:
    """Coordinates [B, L, R] of a sample, 0 at positions without a target."""
    coordinates_BLR = basis.to_coordinates.coordinates(sample.hidden_BLD)
    return torch.where(sample.mask_BL.unsqueeze(-1), coordinates_BLR, 0.0)


def _errors(
    teacher: States, students: Mapping[str, States], settings: Sequence[Setting], decoded: Sequence[SparseTargets]
) -> list[Errors]:
    """The errors of each setting's targets [N]."""
    everyone = list(students)
    by_place: list[tuple[list[int], Group]] = []
    plain: list[int] = []
    sampled: list[int] = []
    for place, (setting, targets) in enumerate(zip(settings, decoded, strict=True)):
        if targets.basis is not None and targets.tail_coordinates is not None:
            by_place.append(([place], Group(Shapes(targets.tail_coordinates, targets.basis), [targets], everyone)))
        else:
            (sampled if setting.support.has_samples else plain).append(place)
    by_place.append((plain, Group(Uniform(teacher), [decoded[place] for place in plain], [])))
    for name, states in students.items():
        by_place.append((plain, Group(states, [decoded[place] for place in plain], [name])))
    by_place.append((sampled, Group(None, [decoded[place] for place in sampled], everyone)))
    found = target_errors(teacher, students, [group for _, group in by_place], TEMPERATURES)
    errors = [Errors() for _ in settings]
    for (places, group), of_group in zip(by_place, found, strict=True):
        for place, one in zip(places, of_group, strict=True):
            # A bucket's distribution is the student's own: its KL says nothing of the target.
            if group.spread not in students.values():
                errors[place].kl |= one.kl
            errors[place].gradient |= one.gradient
    return errors


def rounding_kl(exact: SparseTargets, decoded: SparseTargets, temperature: float) -> float:
    """Mean over positions of KL(exact || decoded) at T, renormalised over the kept tokens of their common support."""
    parts = []
    for targets in (exact.flatten(), decoded.flatten()):
        some = targets[targets.mask]
        # Decoding does not keep the order of ids inside a level.
        key = torch.where(
            some.token_ids < 0, 2**40, some.token_ids + (0 if some.draws is None else (some.draws > 0) * 2**32)
        )
        log_p = some.log_probs.double() / temperature
        if temperature == 1 and some.draws is not None:
            log_p = torch.where(some.draws > 0, some.weights.double().log(), log_p)
        log_p = log_p.log_softmax(-1)
        parts.append(log_p.gather(-1, key.argsort(-1)))
    width = min(part.shape[-1] for part in parts)
    p, q = (part[:, :width] for part in parts)
    return float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).mean())


def mark_fronts(lines: list[Measured]) -> list[Measured]:
    """Mark of every kind of error and temperature the settings that no other beats in both bytes and error."""

    def front(line: Measured, kind: str) -> list[float]:
        return [t for t, error in line.errors[kind].items() if not beaten(line.bytes_per_position, error, kind, t)]

    def beaten(size: float, error: float, kind: str, t: float) -> bool:
        others = [(other.bytes_per_position, other.errors[kind][t]) for other in lines if t in other.errors[kind]]
        return any(a <= size and b <= error and (a, b) != (size, error) for a, b in others)

    return [replace(line, front={kind: front(line, kind) for kind in line.errors}) for line in lines]
