"""Does a cache hold what its teacher says? Some rows are run again and compared, number by number.

Checksums tell that bytes are those that were written; this tells that the right ones were. It finds a teacher, dtype or
tokenizer other than the identity names, targets that are shifted against their tokens, and documents that saw each other.

How much two honest runs may differ:

* Rounding to levels costs nothing: the values of the second run are rounded as well, and levels compared. Where a boundary
  between levels falls has nothing to do with the value, so the mean difference of levels, in nats, is the mean difference
  of the values themselves, however small.
* Another kernel, batch or device sums in another order. The last rounding of a logit of size x costs eps(dtype) x / 4 on
  average; those of the layers before add up to several times that, in float32 accumulators whatever the dtype. `noise` is
  allowed 4 eps(dtype) x, x the mean of |log p| over the entries, and 2e-4 for the sums. SmolLM2-135M in bfloat16 against
  itself in float32 differs by 0.07 nats: two fifths of what is allowed to bfloat16, and 350 times what is to float32.
* The tail curve is known to half a step of the head's log-odds, to which the same noise is added.
* A token that was not kept may be likelier than one that was by the noise of one entry, of which the largest of many is
  allowed eight times the mean.
* Draws repeat where the distribution repeats: exactly in float32, in other precisions they are not compared. Their
  probabilities are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.progress import Meter
from ..corpus.tokenizer import tokenizer_digest
from ..models.loading import load_tokenizer
from ..models.teacher import Teacher
from ..store.batch import Batch
from ..store.levels import HEAD_MASS_STEP, LEVEL_GROWTH, LEVEL_STEP
from ..store.reader import LogitCache
from ..targets.reduce import reduce_logits
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import row_seeds

_SUMS = 2e-4
_ENTRY = 8.0
_ODD_POSITIONS = 0.01
_REDRAWN = 0.99


@dataclass(frozen=True)
class TeacherAudit:
    """How a second run of the teacher over some rows differs from a cache."""

    rows: int
    positions: int
    dtype: str
    size: float
    """Mean of |log p| over the entries, in nats."""
    noise: float
    """Mean difference of log p, rounding to levels not counted, in nats."""
    tail: float
    """Mean difference of the tail curve, in nats."""
    odd: float
    """Share of the positions whose head lacks a token that is clearly likelier than one that it has, or has another length."""
    redrawn: float | None
    """Share of the samples that are drawn again; None where there are none."""
    fields: tuple[str, ...]
    """What differs between the identities of cache and teacher."""

    @property
    def noise_limit(self) -> float:
        return noise_limit(self.dtype, self.size)

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line each; none if all is well."""
        found = list(self.fields)
        if not self.noise <= self.noise_limit:
            found.append(
                f"log-probabilities differ by {self.noise:.2g} nats on average, {self.noise_limit:.2g} allowed"
            )
        tail_limit = HEAD_MASS_STEP / 2 + self.noise_limit
        if not self.tail <= tail_limit:
            found.append(f"the tail curve differs by {self.tail:.2g} nats on average, {tail_limit:.2g} allowed")
        if not self.odd <= _ODD_POSITIONS:
            found.append(f"{self.odd:.1%} of the positions keep other tokens, {_ODD_POSITIONS:.0%} allowed")
        if self.redrawn is not None and self.dtype == "float32" and not self.redrawn >= _REDRAWN:
            found.append(f"{self.redrawn:.1%} of the samples are drawn again, {_REDRAWN:.0%} expected")
        return found

    def __str__(self) -> str:
        line = (
            f"{self.rows} rows, {self.positions:,} positions in {self.dtype}: log-probabilities within {self.noise:.2g} nats "
            f"on average ({self.noise_limit:.2g} allowed), tail curve within {self.tail:.2g}, {self.odd:.1%} of the positions "
            "keep other tokens"
        )
        return line if self.redrawn is None else f"{line}, {self.redrawn:.1%} of the samples drawn again"


def noise_limit(dtype: str, size: float) -> float:
    """Mean difference of log p that two runs in a dtype may have, in nats; `size` is the mean of |log p|."""
    return 4 * float(torch.finfo(getattr(torch, dtype)).eps) * size + _SUMS


def audit_teacher(
    cache: LogitCache, teacher: Teacher, *, rows: int = 16, batch_rows: int = 4, seed: int = 0
) -> TeacherAudit:
    """Run some rows of a cache, chosen by `seed`, through the teacher again.

    A teacher with another vocabulary is not run: that its identity differs is enough.
    """
    told = cache.manifest.identity["teacher"]
    mine = {**teacher.identity, "rows' tokenizer": tokenizer_digest(load_tokenizer(str(cache.tokenizer_dir)))}
    named = {**told, "rows' tokenizer": told.get("tokenizer")}
    fields = tuple(
        f"{name} is {str(named.get(name))[:16]} in the cache and {str(mine[name])[:16]} now"
        for name in ("weights", "dtype", "vocab_size", "tokenizer", "rows' tokenizer")
        if named.get(name) != mine[name]
    )
    dtype = str(told.get("dtype") or teacher.placement.dtype_name)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(cache))[:rows])
    sums = _Sums()
    if teacher.vocab_size == cache.vocab_size:
        with Meter("verify --teacher", len(chosen) * cache.row_length) as meter:
            for first in range(0, len(chosen), batch_rows):
                numbers = chosen[first : first + batch_rows]
                batch = cache.batch(numbers)
                _compare(cache, teacher, numbers, batch, dtype, sums)
                meter.advance(batch["input_ids"].numel())
    return TeacherAudit(len(chosen), sums.positions, dtype, *sums.means(), fields)


@dataclass
class _Sums:
    positions: int = 0
    entries: int = 0
    size: float = 0.0
    noise: float = 0.0
    curves: int = 0
    tail: float = 0.0
    odd: int = 0
    draws: int = 0
    redrawn: int = 0

    def means(self) -> tuple[float, float, float, float, float | None]:
        return (
            self.size / max(self.entries, 1),
            self.noise / max(self.entries, 1),
            self.tail / max(self.curves, 1),
            self.odd / max(self.positions, 1),
            self.redrawn / self.draws if self.draws else None,
        )


@torch.inference_mode()
def _compare(
    cache: LogitCache, teacher: Teacher, rows: np.ndarray[Any, Any], batch: Batch, dtype: str, sums: _Sums
) -> None:
    codec, length = cache.manifest.codec, cache.row_length
    hidden_ND = teacher.hidden(batch["input_ids"], batch["segment_ids"]).flatten(0, 1)
    seeds = row_seeds(cache.manifest.identity.get("seed", 0), cache.row_numbers(rows), length).flatten()
    cached = batch["targets"].flatten()
    places = torch.nonzero(cached.mask).squeeze(-1)
    for part in torch.split(places, 64):
        logits_NV = teacher.output_layer.logits(hidden_ND[part.to(hidden_ND.device)]).float().cpu()
        again = reduce_logits(logits_NV, codec.support, knots=codec.knots, seed=seeds[part])
        _compare_positions(cached[part], again, logits_NV.log_softmax(-1), dtype, sums)


def _compare_positions(cached: SparseTargets, again: SparseTargets, log_p_NV: Tensor, dtype: str, sums: _Sums) -> None:
    """Targets of N positions from the cache and from the second run, and all of that run's log-probabilities."""
    # Samples of a cache that serves T = 1 only are stored without probabilities of their own.
    used_NK = cached.head_mask if cached.knots == (1.0,) else cached.token_ids >= 0
    now_NK = log_p_NV.gather(-1, cached.token_ids.clamp(min=0))
    has_head = cached.head_mask.any(-1, keepdim=True)
    differences = []
    for log_p_NK in (cached.log_probs, now_NK):
        reference = torch.where(has_head, log_p_NK[:, :1], 0.0)
        differences.append(_round(torch.where(used_NK, reference - log_p_NK, 0.0)))
    sums.positions += len(cached.mask)
    sums.entries += int(used_NK.sum())
    sums.size += float(now_NK[used_NK].double().abs().sum())
    sums.noise += float((differences[0] - differences[1]).double().abs()[used_NK].sum())

    both = torch.isfinite(cached.tail_curve) & torch.isfinite(again.tail_curve)
    sums.curves += int(both.sum())
    sums.tail += float((cached.tail_curve - again.tail_curve)[both].double().abs().sum())

    head_NK = cached.head_mask
    if bool(head_NK.any()):
        slack = _ENTRY * noise_limit(dtype, float(now_NK[head_NK].abs().mean()))
        least_N = torch.where(head_NK, now_NK, torch.inf).amin(-1)
        outside_NV = log_p_NV.scatter(-1, torch.where(head_NK, cached.token_ids, cached.token_ids[:, :1]), -torch.inf)
        lacking_N = outside_NV.amax(-1) > least_N + slack
        lengths_N = head_NK.sum(-1), again.head_mask.sum(-1)
        # Whether the next token still belongs to the head may hang on the last digit.
        odd_length_N = (lengths_N[0] - lengths_N[1]).abs() > 1 + slack * lengths_N[0]
        sums.odd += int((lacking_N | odd_length_N).sum())
    if cached.draws is not None and again.draws is not None:
        for ids, draws, other_ids, other_draws in zip(
            cached.token_ids.tolist(),
            cached.draws.tolist(),
            again.token_ids.tolist(),
            again.draws.tolist(),
            strict=True,
        ):
            mine, theirs = (
                {i: n for i, n in zip(*pair, strict=True) if n > 0} for pair in ((ids, draws), (other_ids, other_draws))
            )
            sums.draws += sum(mine.values())
            sums.redrawn += sum(min(count, theirs.get(token, 0)) for token, count in mine.items())


def _round(below: Tensor) -> Tensor:
    """Nats below the reference, to the nearest level of the codec."""
    levels = torch.round(torch.log1p(below.double().clamp(min=0) * (LEVEL_GROWTH / LEVEL_STEP)) / LEVEL_GROWTH)
    return torch.expm1(levels * LEVEL_GROWTH) * (LEVEL_STEP / LEVEL_GROWTH)
