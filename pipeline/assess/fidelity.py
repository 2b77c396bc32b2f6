"""The fidelity table: bytes and errors of every support, measured on a few rows before a large job.

A setting is a support with the knots of its tail curve and a profile. The sample goes the whole way for each one:
reduced to targets, encoded by a codec that learns from one half of the rows, and decoded from the other half. Two
figures compare the result with the full distribution:

    KL at T       sum over the kept entries of p_T (log p_T - log p'_T), both renormalised, p' after the codec: the cost
                  of rounding. At T = 1 p is an entry's weight in training: of a sample, the mass that it stands for
    gradient      of the KD loss of one batch, with respect to all weights of a student: its angle to that of the full
                  distribution, and the ratio of their lengths: the cost of truncation and sampling
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.places import files_in
from ..corpus.labels import target_mask
from ..corpus.rows import PackedRows
from ..models.teacher import Teacher
from ..recipe.choices import DEFAULT_KNOTS, Profile
from ..recipe.schema import CacheConfig
from ..store.batch import text_batch
from ..store.codec import TargetCodec
from ..store.groups import write_group
from ..store.shard_file import ShardFile
from ..store.shard_reader import ShardReader, read_rows
from ..targets.knots import inverse_temperature
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support, row_seeds
from .gradient_probe import GradientProbe, compare_gradients

TEMPERATURES = (1.0, 2.0, 4.0)
GRADIENT_TEMPERATURES = (1.0, 2.0)
_CHUNK = 64
_PLACE_BYTES = 28
"""Of a chunk, in the index of a shard and in Zarr's."""
_RECORD_BYTES = 700


@dataclass(frozen=True)
class Setting:
    """One way to keep a teacher: support, knots and profile."""

    support: Support
    knots: tuple[float, ...] = (*DEFAULT_KNOTS, 1.0)
    profile: Profile = "compact"

    @classmethod
    def from_recipe(cls, cache: CacheConfig) -> Setting:
        """The setting of a recipe's [cache] section."""
        return cls(Support.from_recipe(cache), tuple(cache.knots), cache.profile)

    def __str__(self) -> str:
        numbers = {key: value for key, value in self.support.to_json().items() if key != "name"}
        only = ["T=1"] if self.knots == (1.0,) else []
        return " ".join([self.support.name, *(f"{key}={value:g}" for key, value in numbers.items()), *only])

    def serves(self, temperature: float) -> bool:
        """Whether students can be trained at this temperature."""
        try:
            inverse_temperature(temperature, self.knots)
        except ValueError:
            return False
        return True


def grid(knots: tuple[float, ...]) -> tuple[Setting, ...]:
    """The settings of the table with these knots; samples also for T = 1 alone, where they need a third less."""
    samples = [
        *(Support("threshold", tau=tau) for tau in (0.1, 0.05, 0.02)),
        *(Support("sampled", draws=draws) for draws in (20, 50)),
    ]
    return (
        *(Setting(Support("topk", k=k), knots) for k in (8, 16, 32, 64, 128)),
        Setting(Support("topk", k=64), knots, "fast"),
        *(Setting(Support("topp", k=128, p=p), knots) for p in (0.9, 0.98)),
        *(Setting(support, some) for support in samples for some in dict.fromkeys((knots, (1.0,)))),
    )


@dataclass(frozen=True)
class Measured:
    """One line of the fidelity table."""

    setting: Setting
    bytes_per_position: float
    """Chunks, their indexes, the group's metadata and commit record, and this cache's share of the codebook."""
    mass: float
    """Mean teacher probability on the head at T = 1."""
    kl: dict[float, float]
    angle: dict[float, float]
    """Degrees between the gradient of a batch and that of the full distribution."""
    norm_ratio: dict[float, float]
    """Length of that gradient over the full one. `kl`, `angle` and `norm_ratio` are by temperature, where served."""
    front: tuple[float, ...] = ()
    """Temperatures at which no other setting has fewer bytes and a smaller gradient error."""

    def gradient_error(self, temperature: float) -> float:
        """|g - g_full| / |g_full|."""
        ratio, cosine = self.norm_ratio[temperature], math.cos(math.radians(self.angle[temperature]))
        return math.sqrt(max(ratio * ratio + 1 - 2 * ratio * cosine, 0.0))

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "setting": str(self.setting),
            "profile": self.setting.profile,
            "gradient_error": {t: self.gradient_error(t) for t in self.angle},
        }


@dataclass(frozen=True)
class Fidelity:
    """The table, and the sample behind it."""

    lines: list[Measured]
    positions: int
    batch_positions: int
    teacher_tokens_per_second: float
    """Speed of stage one with the first setting: forward pass, reduction to targets and encoding."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "lines": [line.to_json() for line in self.lines]}


@dataclass(frozen=True)
class _Sample:
    """Rows of a corpus with the teacher's last hidden states."""

    batch: dict[str, Tensor]
    rows: np.ndarray[Any, np.dtype[np.int64]]
    hidden_BLD: Tensor
    seconds: float
    """Of the teacher's pass."""
    learned: slice
    """Rows that codecs learn from."""
    held: slice
    """Rows that they are measured on."""


def measure_fidelity(
    teacher: Teacher,
    student: Any,
    corpus: PackedRows,
    settings: Sequence[Setting],
    *,
    shard_rows: int,
    seed: int,
    sample_rows: int,
    gradient_rows: int,
    batch_rows: int,
    targets_on: str = "masked",
    progress: Callable[[str], None] = lambda _: None,
) -> Fidelity:
    """Measure every setting on rows spread over the corpus; codecs learn from half of them.

    `student` is a trainable model of the teacher's vocabulary; `gradient_rows` rows give its gradient. `progress` is
    called with the name of each setting.
    """
    sample = _run_teacher(teacher, corpus, sample_rows, batch_rows, targets_on)
    held_rows = len(sample.rows[sample.held])
    gradient_rows = min(gradient_rows, held_rows)
    batch = {name: values[sample.held][:gradient_rows] for name, values in sample.batch.items()}
    probe = GradientProbe(student, batch, sample.hidden_BLD[sample.held][:gradient_rows])
    full = {t: probe.gradient(None, teacher, t) for t in GRADIENT_TEMPERATURES}
    reduced, reduction_seconds = _reduce(teacher, sample, settings, seed)
    lines: list[Measured] = []
    encoding_seconds = 0.0
    for setting, targets in zip(settings, reduced, strict=True):
        progress(str(setting))
        exact = targets[sample.held]
        codec = TargetCodec(setting.support, setting.knots, teacher.vocab_size, setting.profile)
        decoded, size, seconds = _through_codec(codec, targets, sample, corpus, shard_rows)
        if not lines:
            encoding_seconds = seconds * len(sample.rows) / held_rows
        compared = {
            t: compare_gradients(probe.gradient(decoded, teacher, t), full[t])
            for t in filter(setting.serves, GRADIENT_TEMPERATURES)
        }
        on_head = torch.where(exact.head_mask, exact.log_probs.exp(), 0.0).sum(-1)
        lines.append(
            Measured(
                setting=setting,
                bytes_per_position=size,
                mass=float(on_head[exact.mask].mean()),
                kl={t: rounding_kl(exact, decoded, t) for t in filter(setting.serves, TEMPERATURES)},
                angle={t: angle for t, (angle, _) in compared.items()},
                norm_ratio={t: ratio for t, (_, ratio) in compared.items()},
            )
        )
    seconds = sample.seconds + reduction_seconds + encoding_seconds
    return Fidelity(
        lines=mark_fronts(lines),
        positions=int(sample.batch["mask"][sample.held].sum()),
        batch_positions=gradient_rows * corpus.row_length,
        teacher_tokens_per_second=sample.batch["input_ids"].numel() / max(seconds, 1e-9),
    )


def _through_codec(
    codec: TargetCodec, targets: SparseTargets, sample: _Sample, corpus: PackedRows, shard_rows: int
) -> tuple[SparseTargets, float, float]:
    """Let a codec learn from one half of the targets, and encode, write, read and decode the other.

    Returns the decoded targets, their bytes per position, and the seconds of encoding and writing.
    """
    contexts = sample.batch["input_ids"].numpy()
    mask = sample.batch["mask"][sample.held].numpy()
    codec = codec.learn(targets[sample.learned], contexts[sample.learned], corpus.rows * corpus.row_length)
    layout, shapes = codec.layout(), codec.shapes(corpus.row_length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        start = time.perf_counter()
        shard = ShardFile(path, layout, shapes, codec.profile, len(mask), corpus.row_length)
        shard.add(shard.compressed(codec.encode(targets[sample.held], contexts[sample.held])))
        facts = shard.finish()
        seconds = time.perf_counter() - start
        reader = ShardReader(path, layout, codec.profile, len(mask), facts)
        size = _bytes_per_position(
            Path(folder), codec, mask, int(reader.chunks[..., 1].sum()), facts["size"], shard_rows, corpus
        )
        decoded = codec.decode(read_rows([(reader, row) for row in range(len(mask))]), contexts[sample.held], mask)
        reader.close()
    return decoded, size, seconds


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


def _run_teacher(teacher: Teacher, corpus: PackedRows, sample_rows: int, batch_rows: int, targets_on: str) -> _Sample:
    """Run the teacher over rows spread evenly over the corpus; those to learn from come first."""
    spread = np.unique(np.linspace(0, corpus.rows - 1, min(max(sample_rows, 2), corpus.rows)).astype(np.int64))
    rows = np.concatenate([spread[::2], spread[1::2]])
    learned = len(spread[::2])
    held = slice(learned, None) if learned < len(rows) else slice(None)  # one row serves both
    batch = text_batch(corpus.columns(rows))
    masked = corpus.objective == "masked"
    batch["mask"] = target_mask(batch["labels"], batch["segment_ids"], targets_on if masked else None)
    parts = [slice(start, start + batch_rows) for start in range(0, len(rows), batch_rows)]
    teacher.hidden(batch["input_ids"][parts[0]], batch["segment_ids"][parts[0]])  # warm up
    start = time.perf_counter()
    hidden = [teacher.hidden(batch["input_ids"][part], batch["segment_ids"][part]).cpu() for part in parts]
    seconds = time.perf_counter() - start
    return _Sample(batch, rows, torch.cat(hidden), seconds, slice(learned), held)


def _reduce(
    teacher: Teacher, sample: _Sample, settings: Sequence[Setting], seed: int
) -> tuple[list[SparseTargets], float]:
    """Targets [B, L] of the sample for every setting, from logits computed once, and the seconds of the first."""
    shape = sample.batch["labels"].shape
    hidden_ND, mask_N = sample.hidden_BLD.flatten(0, 1), sample.batch["mask"].flatten()
    seeds_N = row_seeds(seed, sample.rows, shape[1]).flatten()
    parts: list[list[SparseTargets]] = [[] for _ in settings]
    seconds = 0.0
    with torch.inference_mode():
        for first in range(0, len(hidden_ND), _CHUNK):
            some = slice(first, first + _CHUNK)
            start = time.perf_counter()
            logits_NV = teacher.output_layer.logits(hidden_ND[some].to(teacher.placement.device))
            mask = mask_N[some].to(logits_NV.device)
            for setting, found in zip(settings, parts, strict=True):
                targets = SparseTargets.from_logits(
                    logits_NV, support=setting.support, knots=setting.knots, seed=seeds_N[some], mask=mask
                )
                found.append(targets.to("cpu"))
                if setting is settings[0]:
                    seconds += time.perf_counter() - start
    return [SparseTargets.cat(found).unflatten(tuple(shape)).trim() for found in parts], seconds


def _bytes_per_position(
    folder: Path,
    codec: TargetCodec,
    mask: np.ndarray[Any, Any],
    chunks: int,
    whole: int,
    shard_rows: int,
    corpus: PackedRows,
) -> float:
    """Bytes of a position in the whole cache: `chunks` of a shard of `whole` bytes and their places in both indexes
    grow with the rows; metadata counts once per shard, the codebook once.
    """
    chunks += len(mask) * len(codec.layout()) * _PLACE_BYTES
    per_shard = whole - chunks + _RECORD_BYTES
    positions_a_row = max(float(mask.sum()) / len(mask), 1.0)
    book = 0
    if codec.codebook is not None:
        write_group(folder / "book", codec.codebook.arrays())
        book = sum(files_in(folder / "book").values())
    shards = -(-corpus.rows // shard_rows)
    return (chunks / len(mask) + (per_shard * shards + book) / corpus.rows) / positions_a_row


def mark_fronts(lines: list[Measured]) -> list[Measured]:
    """Mark at each temperature the settings that no other setting beats in both bytes and gradient error."""

    def beaten(line: Measured, t: float) -> bool:
        own = (line.bytes_per_position, line.gradient_error(t))
        others = [(other.bytes_per_position, other.gradient_error(t)) for other in lines if t in other.angle]
        return any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in others)

    return [replace(line, front=tuple(t for t in line.angle if not beaten(line, t))) for line in lines]
