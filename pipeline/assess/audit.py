"""Does a cache hold its teacher's distribution? Some rows run through the teacher again, and the numbers are compared.

Checksums show that the bytes are the written ones; the audit shows that the written ones were right. It finds a
teacher, dtype or tokenizer other than the identity names, targets shifted against their tokens, and documents that saw
each other.

Two honest runs may differ by this much:

* Rounding to levels costs nothing: the values of the second run are rounded as well, and levels compared. The
  boundaries between levels are independent of the values, so the mean difference of levels, in nats, is the mean
  difference of the values, however small.
* Another kernel, batch or device sums in another order. The last rounding of a logit of size x costs eps(dtype) x / 4
  on average; those of the earlier layers add up to several times that, in float32 accumulators whatever the dtype. The
  limit of `noise` is 4 eps(dtype) x, x the mean of |log p| over the entries, plus 2e-4 for the sums. SmolLM2-135M in
  bfloat16 against itself in float32 differs by 0.07 nats: two fifths of the limit for bfloat16, and 350 times the limit
  for float32.
* The tail curve is stored to half a step of the head's log-odds, to which the same noise is added.
* Coordinates are stored to half a step. An error of length d in them changes the tail's logits by d or more, in the
  mean square: their basis is scaled so. So no coordinate differs by more than half a step and the noise of logits.
* A label outside the entries is compared as they are, in levels below the cached mass of the tail; of few, one may round
  to the next level, which is less than a nat away. The teacher's loss on a row is stored as it was.
* A token outside the head may be likelier than one inside by the noise of one entry; the largest of many is allowed
  eight times the mean.
* Draws repeat where the distribution repeats: exactly in float32; in other dtypes only their probabilities are
  compared.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import RecipeError
from ..base.progress import Meter
from ..corpus.labels import IGNORE
from ..corpus.tokenizer import tokenizer_digest
from ..models.adapters import base_of_adapter
from ..models.loading import load_tokenizer
from ..models.teacher import Teacher, load_teacher
from ..recipe.schema import TeacherConfig
from ..store.arrays import RowLosses
from ..store.basis_file import read_stored_basis
from ..store.batch import Batch
from ..store.levels import round_to_levels
from ..store.masses import HEAD_MASS_STEP
from ..store.reader import LogitCache
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import row_seeds

TOLERANCE_SUMS_NATS = 2e-4
"""Mean difference of log p from the order of summation, in any dtype."""
ENTRY_NOISE_FACTOR = 8.0
"""Largest noise of a single entry over the mean."""
MAX_ODD_SHARE = 0.01
MIN_REDRAWN_SHARE = 0.99
CHUNK_POSITIONS = 64


@dataclass(frozen=True)
class TeacherAudit:
    """Differences between a cache and a second run of its teacher over some rows."""

    rows: int
    positions: int
    dtype: str
    size: float
    """Mean of |log p| over the entries, in nats."""
    noise: float
    """Mean difference of log p, rounding to levels not counted, in nats."""
    tail: float
    """Mean difference of the tail curve, in nats."""
    coordinates: float | None
    """Mean difference of a coordinate of the tail's shape; None for a cache without."""
    odd: float
    """Share of the positions whose head lacks a token clearly likelier than one of its own, or has another length."""
    redrawn: float | None
    """Share of the samples that the second run draws too; None for a cache without samples."""
    fields: tuple[str, ...]
    """Differences between the identities of cache and teacher, a line each."""
    tail_step: float = 0.0
    """Step of the coordinates."""
    labels: LabelAudit | None = None
    """None for a cache without label_log_probs."""

    @property
    def noise_limit(self) -> float:
        return noise_limit(self.dtype, self.size)

    @property
    def problems(self) -> list[str]:
        """Every difference above its limit, a line each."""
        problems = list(self.fields)
        if not self.noise <= self.noise_limit:
            problems.append(
                f"log-probabilities differ by {self.noise:.2g} nats on average, {self.noise_limit:.2g} allowed"
            )
        tail_limit = HEAD_MASS_STEP / 2 + self.noise_limit
        if not self.tail <= tail_limit:
            problems.append(f"the tail curve differs by {self.tail:.2g} nats on average, {tail_limit:.2g} allowed")
        shape_limit = self.tail_step / 2 + self.noise_limit
        if self.coordinates is not None and not self.coordinates <= shape_limit:
            problems.append(
                f"coordinates of the tail's shape differ by {self.coordinates:.2g} on average, {shape_limit:.2g} allowed"
            )
        if self.labels is not None:
            problems += self.labels.problems(self.dtype)
        if not self.odd <= MAX_ODD_SHARE:
            problems.append(f"{self.odd:.1%} of the positions keep other tokens, {MAX_ODD_SHARE:.0%} allowed")
        if self.redrawn is not None and self.dtype == "float32" and not self.redrawn >= MIN_REDRAWN_SHARE:
            problems.append(f"{self.redrawn:.1%} of the samples are drawn again, {MIN_REDRAWN_SHARE:.0%} expected")
        return problems

    def __str__(self) -> str:
        line = (
            f"{self.rows} rows, {self.positions:,} positions in {self.dtype}: log-probabilities within "
            f"{self.noise:.2g} nats on average ({self.noise_limit:.2g} allowed), tail curve within {self.tail:.2g}, "
            + ("" if self.coordinates is None else f"coordinates within {self.coordinates:.2g}, ")
            + ("" if self.labels is None else f"losses of rows within {self.labels.mean_loss_noise:.2g}, ")
            + f"{self.odd:.1%} of the positions keep other tokens"
        )
        return line if self.redrawn is None else f"{line}, {self.redrawn:.1%} of the samples drawn again"


@dataclass
class LabelAudit:
    """Counts and summed differences of log p of the labels outside the entries, and of the losses of rows, in nats."""

    labels: int = 0
    size: float = 0.0
    noise: float = 0.0
    rows: int = 0
    loss: float = 0.0
    loss_noise: float = 0.0

    @property
    def mean_loss_noise(self) -> float:
        return self.loss_noise / max(self.rows, 1)

    def problems(self, dtype: str) -> list[str]:
        """Every difference above its limit, a line each."""
        problems, labels = [], max(self.labels, 1)
        noise, limit = self.noise / labels, noise_limit(dtype, self.size / labels) + 1 / labels
        if not noise <= limit:
            problems.append(f"log-probabilities of labels differ by {noise:.2g} nats on average, {limit:.2g} allowed")
        limit = noise_limit(dtype, self.loss / max(self.rows, 1))
        if not self.mean_loss_noise <= limit:
            problems.append(
                f"the teacher's losses on rows differ by {self.mean_loss_noise:.2g} nats on average, {limit:.2g} allowed"
            )
        return problems

    def add(self, cached: SparseTargets, labels: Tensor, now: Tensor, losses: RowLosses) -> None:
        """Add rows [B, L]: their targets, labels and losses [B] from the cache, log p of the labels from the second run."""
        assert cached.label_log_probs is not None
        has_label = cached.mask & (labels != IGNORE)
        own = cached.head_mask if cached.knots == (1.0,) else cached.token_ids >= 0
        outside = has_label & ~((cached.token_ids == labels.unsqueeze(-1)) & own).any(-1)
        log_tail = cached.tail_curve[..., cached.knots.index(1.0)]
        reference = torch.where(log_tail.isneginf(), 0.0, log_tail)
        levels = [
            round_to_levels((reference - log_p)[outside].double().numpy()) for log_p in (cached.label_log_probs, now)
        ]
        self.labels += int(outside.sum())
        self.size += float(now[outside].double().abs().sum())
        self.noise += float(np.abs(levels[0] - levels[1]).sum())
        now_B = -torch.where(has_label, now, 0.0).double().sum(-1) / has_label.sum(-1).clamp(min=1)
        self.rows += len(now_B)
        self.loss += float(now_B.sum())
        self.loss_noise += float(np.abs(losses - now_B.numpy()).sum())


def noise_limit(dtype: str, size: float) -> float:
    """Mean difference of log p that two runs in a dtype may have, in nats; `size` is the mean of |log p|."""
    return 4 * float(torch.finfo(getattr(torch, dtype)).eps) * size + TOLERANCE_SUMS_NATS


def recorded_teacher(cache: LogitCache, model: str | None = None, trust_remote_code: bool = False) -> Teacher:
    """Load the teacher that a cache records, from `model` where it has moved.

    Raises RecipeError for imported targets, which have no teacher, and for a converted teacher without `model`.
    """
    recorded = cache.manifest.identity["teacher"]
    source = model or str(recorded["source"])
    if recorded.get("dtype") is None:
        raise RecipeError(f"{cache.path}: the targets were imported: there is no teacher to run")
    made = source.startswith("package:") or source.endswith(".gguf") or base_of_adapter(Path(source)) is not None
    if made:
        raise RecipeError(f"{cache.path}: the teacher was converted: give its directory, --teacher-model RUN/teacher")
    revision = None if model else recorded.get("revision")
    config = TeacherConfig(
        model=source, dtype=recorded["dtype"], revision=revision, trust_remote_code=trust_remote_code
    )
    return load_teacher(source, config, cache.objective)


def audit_teacher(
    cache: LogitCache, teacher: Teacher, *, rows: int = 16, batch_rows: int = 4, seed: int = 0
) -> TeacherAudit:
    """Run some rows of a cache, chosen by `seed`, through the teacher again.

    A teacher of another vocabulary size is not run: the difference of identities is enough.
    """
    recorded = cache.manifest.identity["teacher"]
    recorded = {**recorded, "rows' tokenizer": recorded.get("tokenizer")}
    current = {**teacher.identity, "rows' tokenizer": tokenizer_digest(load_tokenizer(str(cache.tokenizer_dir)))}
    fields = tuple(
        f"{name} is {str(recorded.get(name))[:16]} in the cache and {str(current[name])[:16]} now"
        for name in ("weights", "dtype", "vocab_size", "tokenizer", "rows' tokenizer")
        if recorded.get(name) != current[name]
    )
    dtype = str(recorded.get("dtype") or teacher.placement.dtype_name)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(cache))[:rows])
    sums, labels = _Sums(), LabelAudit() if cache.manifest.codec.label_log_probs else None
    if teacher.vocab_size == cache.vocab_size:
        with Meter("verify --teacher", len(chosen) * cache.row_length) as meter:
            for first in range(0, len(chosen), batch_rows):
                indices = chosen[first : first + batch_rows]
                batch = cache.batch(indices)
                now = _compare(cache, teacher, indices, batch, dtype, sums)
                if labels is not None:
                    labels.add(batch["targets"], batch["labels"], now, cache.teacher_losses(indices))
                meter.advance(batch["input_ids"].numel())
    shape = cache.manifest.codec.coordinates
    tail_step = 0.0 if shape is None else shape.step
    return TeacherAudit(len(chosen), sums.positions, dtype, *sums.means(), fields, tail_step, labels)


@dataclass
class _Sums:
    """Counts and summed differences over the positions compared so far."""

    positions: int = 0
    entries: int = 0
    size: float = 0.0
    noise: float = 0.0
    curves: int = 0
    tail: float = 0.0
    coordinates: int = 0
    coordinate_noise: float = 0.0
    odd: int = 0
    draws: int = 0
    redrawn: int = 0

    def means(self) -> tuple[float, float, float, float | None, float, float | None]:
        return (
            self.size / max(self.entries, 1),
            self.noise / max(self.entries, 1),
            self.tail / max(self.curves, 1),
            self.coordinate_noise / self.coordinates if self.coordinates else None,
            self.odd / max(self.positions, 1),
            self.redrawn / self.draws if self.draws else None,
        )


@torch.inference_mode()
def _compare(
    cache: LogitCache, teacher: Teacher, rows: np.ndarray[Any, Any], batch: Batch, dtype: str, sums: _Sums
) -> Tensor:
    """Add the rows of a batch. Returns log p of the labels [B, L] from the second run, 0 without a target."""
    codec, length = cache.manifest.codec, cache.row_length
    hidden_ND = teacher.hidden(batch["input_ids"], batch["segment_ids"]).flatten(0, 1)
    seeds = row_seeds(cache.manifest.identity.get("seed", 0), cache.row_numbers(rows), length).flatten()
    cached = batch["targets"].flatten()
    shape = codec.coordinates
    if cached.tail_coordinates is not None and shape is not None and shape.basis is not None:
        projection = read_stored_basis(cache.path, shape.basis.digest).to_coordinates
        states_ND = hidden_ND[cached.mask.to(hidden_ND.device)].cpu()
        difference = projection.to(states_ND.device, torch.float64).coordinates(states_ND)
        difference -= cached.tail_coordinates[cached.mask]
        sums.coordinates += difference.numel()
        sums.coordinate_noise += float(difference.abs().sum())
    labels_N = batch["labels"].flatten().clamp(min=0)
    now_N = torch.zeros(len(labels_N))
    for part in torch.split(torch.nonzero(cached.mask).squeeze(-1), CHUNK_POSITIONS):
        logits_NV = teacher.output_layer.logits(hidden_ND[part.to(hidden_ND.device)]).float().cpu()
        again = SparseTargets.from_logits(logits_NV, support=codec.support, knots=codec.knots, seed=seeds[part])
        log_p_NV = logits_NV.log_softmax(-1)
        now_N[part] = log_p_NV.gather(-1, labels_N[part, None])[:, 0]
        _compare_positions(cached[part], again, log_p_NV, dtype, sums)
    return now_N.view(batch["labels"].shape)


def _compare_positions(cached: SparseTargets, again: SparseTargets, log_p_NV: Tensor, dtype: str, sums: _Sums) -> None:
    """Add N positions: their targets from the cache and from the second run, and all log-probabilities of that run."""
    # A cache that serves T = 1 only stores its samples without probabilities.
    used_NK = cached.head_mask if cached.knots == (1.0,) else cached.token_ids >= 0
    now_NK = log_p_NV.gather(-1, cached.token_ids.clamp(min=0))
    has_head = cached.head_mask.any(-1, keepdim=True)
    differences = []
    for log_p_NK in (cached.log_probs, now_NK):
        reference = torch.where(has_head, log_p_NK[:, :1], 0.0)
        below_NK = torch.where(used_NK, reference - log_p_NK, 0.0)
        differences.append(torch.from_numpy(round_to_levels(below_NK.double().numpy())))
    sums.positions += len(cached.mask)
    sums.entries += int(used_NK.sum())
    sums.size += float(now_NK[used_NK].double().abs().sum())
    sums.noise += float((differences[0] - differences[1]).abs()[used_NK].sum())

    both = torch.isfinite(cached.tail_curve) & torch.isfinite(again.tail_curve)
    sums.curves += int(both.sum())
    sums.tail += float((cached.tail_curve - again.tail_curve)[both].double().abs().sum())

    head_NK = cached.head_mask
    if bool(head_NK.any()):
        slack = ENTRY_NOISE_FACTOR * noise_limit(dtype, float(now_NK[head_NK].abs().mean()))
        least_N = torch.where(head_NK, now_NK, torch.inf).amin(-1)
        outside_NV = log_p_NV.scatter(-1, torch.where(head_NK, cached.token_ids, cached.token_ids[:, :1]), -torch.inf)
        lacking_N = outside_NV.amax(-1) > least_N + slack
        lengths_N = head_NK.sum(-1), again.head_mask.sum(-1)
        # Rounding may decide whether the next token still belongs to the head.
        odd_length_N = (lengths_N[0] - lengths_N[1]).abs() > 1 + slack * lengths_N[0]
        sums.odd += int((lacking_N | odd_length_N).sum())
    if cached.draws is not None and again.draws is not None:
        pairs = zip(_drawn(cached.token_ids, cached.draws), _drawn(again.token_ids, again.draws), strict=True)
        for before, after in pairs:
            sums.draws += before.total()
            sums.redrawn += (before & after).total()


def _drawn(token_ids_NK: Tensor, draws_NK: Tensor) -> list[Counter[int]]:
    """How often each token is drawn, by position."""
    rows = zip(token_ids_NK.tolist(), draws_NK.tolist(), strict=True)
    return [Counter(dict(zip(ids, draws, strict=True))) for ids, draws in rows]
