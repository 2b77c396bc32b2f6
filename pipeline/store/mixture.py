"""Views of several caches: rows of each in given shares, or the mean of several teachers on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from ..base.errors import MismatchError
from ..targets.joint_basis import can_join, distinct, join_bases, joint_coordinates
from ..targets.mean_targets import MeanTargets
from ..targets.sparse_targets import SparseTargets
from .arrays import RowIndices, RowLosses
from .batch import Batch
from .row_source import RowSource, View


class _Combination(View):
    """A view of several sources of one tokenizer, objective and row length, with a weight for each."""

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float], verb: str) -> None:
        if not sources:
            raise ValueError("no source is given")
        super().__init__(sources[0])
        for source in sources[1:]:
            if source.tokenizer_digest != self.tokenizer_digest:
                raise MismatchError(
                    f"caches of different tokenizers cannot be {verb} (digests {self.tokenizer_digest[:12]} and "
                    f"{source.tokenizer_digest[:12]}): their token ids have different meanings"
                )
            if source.objective != self.objective:
                raise MismatchError(f"causal and masked rows cannot be {verb}: their targets predict different tokens")
            if source.row_length != self.row_length:
                raise MismatchError(
                    f"rows of {self.row_length} and {source.row_length} tokens cannot be {verb}: cut the longer ones "
                    "with ShorterRows"
                )
        self._sources, self._weights = list(sources), [float(weight) for weight in weights]
        if len(weights) != len(sources) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(f"weights {self._weights}: give one number per source, none negative, not all 0")
        self.vocab_size = max(source.vocab_size for source in sources)
        self.readers = [readers for source in sources for readers in source.readers]

    def _origins(self, number: int, rows: RowIndices) -> RowIndices:
        """Those of rows of one source, with the numbers of its caches here."""
        origins = self._sources[number].origins(rows)
        origins[0] += sum(len(source.readers) for source in self._sources[:number])
        return origins


class Mixture(_Combination):
    """Rows of several sources in given shares, as one dataset of `rows` rows.

    Each source has its share of the `rows` rows by weight (rounded so that the sum is `rows`). A source with fewer rows
    than its share repeats: all its rows appear equally often, give or take one. A source with more rows contributes a
    random part. `seed` alone determines the rows and their order. The default length is that of all sources together.

    Temperatures other than 1 need the same knots in all sources; with different knots the mixture serves T = 1 only.
    Rows that several teachers cached may come from each of them: over an epoch the gradient of the forward KL is then
    that of the teachers' mean, at any temperature.

    Either all sources have samples (threshold, sampled) or none: the loss takes the tail of a batch from its samples,
    or as a bucket.

    Tail shapes stay where all sources have one. Sources with tail bases of their own have a joint one (`joint_basis`),
    whose rank is the sum of theirs. Otherwise, and where teachers cap their logits differently, or one source is an
    `Ensemble`, every tail of the mixture is a bucket.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        weights: Sequence[float] | None = None,
        *,
        rows: int | None = None,
        seed: int = 0,
    ) -> None:
        """Raises MismatchError for sources of different tokenizers, objectives or row lengths, or where only some have
        samples; ValueError for unusable weights."""
        sizes = [len(source) for source in sources]
        super().__init__(sources, sizes if weights is None else weights, "mixed")
        first = [_as_sparse(targets) for targets in _first_targets(sources)]
        if len({targets.draws is None for targets in first}) > 1:
            raise MismatchError(
                "caches with samples (threshold, sampled) and without (topk, topp) cannot be mixed: their losses treat "
                "the tail differently: cache all of them with supports of one of the two kinds"
            )
        if any(weight > 0 and size == 0 for weight, size in zip(self._weights, sizes, strict=True)):
            raise ValueError("a source without rows cannot have a share")
        self.signals = {
            name: signal
            for name, signal in self.signals.items()
            if all(name in source.signals and source.signals[name].shape == signal.shape for source in sources)
        }
        self.knots = self.knots if all(source.knots == self.knots for source in sources) else (1.0,)
        bases = [targets.basis for targets in first if targets.basis is not None]
        self._bases = distinct(bases) if len(bases) == len(first) and can_join(bases) else []
        """The tail bases of the sources, empty where tails are buckets."""
        self._basis = join_bases(*self._bases) if self._bases else None
        self._has_label_log_probs = all(targets.label_log_probs is not None for targets in first)
        self._total, self._seed = sum(sizes) if rows is None else rows, seed
        counts = apportion(self._weights, self._total)
        generator = np.random.default_rng([seed, 0])
        none = np.empty(0, np.int64)
        chosen = [
            np.concatenate([none, *(generator.permutation(size) for _ in range(-(-count // max(size, 1))))])[:count]
            for size, count in zip(sizes, counts, strict=True)
        ]
        order = generator.permutation(self._total)
        self._which = np.repeat(np.arange(len(sizes)), counts)[order]
        self._rows = np.concatenate(chosen).astype(np.int64)[order]

    def _settings(self) -> list[Any]:
        return [[source.digest for source in self._sources], self._weights, self._total, self._seed]

    def batch(self, indices: Sequence[int] | RowIndices) -> Batch:
        requests, order = self._by_source(indices)
        parts = [cast(dict[str, Any], source.batch(rows)) for source, rows in requests]
        targets = SparseTargets.cat([self._alike(_as_sparse(part["targets"])) for part in parts])
        left_out = {"targets", *(set(requests[0][0].signals) - set(self.signals))}
        names = [name for name in parts[0] if name not in left_out]
        together = {name: torch.cat([part[name] for part in parts])[order] for name in names}
        return cast(Batch, {**together, "targets": targets[order]})

    def _alike(self, targets: SparseTargets) -> SparseTargets:
        """Targets of a source as those of every source: at common knots, in one basis, over one vocabulary."""
        coordinates, basis = targets.tail_coordinates, targets.basis
        if self._basis is None or coordinates is None or basis is None:
            coordinates = None
        else:
            coordinates = joint_coordinates(coordinates, basis, self._bases)
        return replace(
            _at_knots(targets, self.knots, self.vocab_size),
            basis=self._basis,
            tail_coordinates=coordinates,
            label_log_probs=targets.label_log_probs if self._has_label_log_probs else None,
        )

    def segment_ids(self, indices: RowIndices) -> np.ndarray[Any, Any]:
        requests, order = self._by_source(indices)
        return np.concatenate([source.segment_ids(rows) for source, rows in requests])[order]

    def origins(self, indices: RowIndices) -> RowIndices:
        wanted = self.checked(indices)
        which, rows = self._which[wanted], self._rows[wanted]
        parts = {number: self._origins(number, rows[which == number]) for number in np.unique(which).tolist()}
        most = max(part.shape[2] for part in parts.values())
        origins = np.empty((2, len(wanted), most), np.int64)
        for number, part in parts.items():
            # A row of fewer teachers names the last one again.
            origins[:, which == number] = np.pad(part, ((0, 0), (0, 0), (0, most - part.shape[2])), mode="edge")
        return origins

    def _by_source(self, indices: Sequence[int] | RowIndices) -> tuple[list[tuple[RowSource, RowIndices]], RowIndices]:
        """The rows of each source, and the permutation that brings them into the order of `indices`."""
        wanted = self.checked(indices)
        which, rows = self._which[wanted], self._rows[wanted]
        slots = [np.flatnonzero(which == number) for number in range(len(self._sources))]
        requests = [(source, rows[slot]) for source, slot in zip(self._sources, slots, strict=True) if len(slot)]
        return requests, np.argsort(np.concatenate(slots))


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Integer shares of `total` by weight: the floor of each, and one more for the largest remainders."""
    exact = [weight * total / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


class Ensemble(_Combination):
    """The same rows from several teachers of one tokenizer: the weighted mean of their distributions.

    Where every source has a tail shape, the mean is taken over the whole vocabulary, at any temperature that all of
    them serve (`MeanTargets`). Otherwise it serves T = 1 only, with the tail as a bucket; for other
    temperatures use a `Mixture`.
    """

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float] | None = None) -> None:
        """Raises MismatchError unless the sources hold the same rows, ValueError for unusable weights."""
        super().__init__(sources, [1.0] * len(sources) if weights is None else weights, "averaged")
        self._weights = [weight / sum(self._weights) for weight in self._weights]
        if len({len(source) for source in sources}) > 1:
            raise MismatchError(
                "the teachers' caches have different numbers of rows: cache the same corpus with every teacher"
            )
        first = _first_targets(sources)
        sparse = [targets for targets in first if isinstance(targets, SparseTargets)]
        self._has_shape = all(targets.basis is not None for targets in sparse)
        if not self._has_shape and any(targets.draws is not None for targets in sparse):
            raise ValueError(
                "caches with samples (threshold, sampled) cannot be averaged unless all have a tail shape: use a Mixture"
            )
        self.signals, self.knots = {}, (1.0,)

    def _settings(self) -> list[Any]:
        return [[source.digest for source in self._sources], self._weights]

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: Sequence[int] | RowIndices) -> Batch:
        parts = [source.batch(indices) for source in self._sources]
        for part in parts[1:]:
            if not torch.equal(part["labels"], parts[0]["labels"]):
                raise MismatchError(
                    "the teachers' caches have different rows: cache the same corpus with every teacher"
                )
            if not torch.equal(part["targets"].mask, parts[0]["targets"].mask):
                raise MismatchError(
                    "the teachers' caches have targets at different positions: cache with the same cache.targets_on"
                )
        targets = MeanTargets.of([part["targets"] for part in parts], self._weights)
        rows = {name: value for name, value in parts[0].items() if name not in self._source.signals}
        return cast(Batch, {**rows, "targets": targets if self._has_shape else targets.as_bucket()})

    def teacher_losses(self, indices: Sequence[int] | RowIndices | None = None) -> RowLosses:
        """The mean over the teachers."""
        losses = np.stack([source.teacher_losses(indices) for source in self._sources])
        mean: RowLosses = np.average(losses, 0, self._weights).astype(np.float32)
        return mean

    def origins(self, indices: RowIndices) -> RowIndices:
        return np.concatenate([self._origins(number, indices) for number in range(len(self._sources))], 2)

    def segment_ids(self, indices: RowIndices) -> np.ndarray[Any, Any]:
        return self._source.segment_ids(indices)


def _first_targets(sources: Sequence[RowSource]) -> list[SparseTargets | MeanTargets]:
    """Targets of one row of every source that has rows: what kind of targets it has."""
    return [source.batch([0])["targets"] for source in sources if len(source)]


def _as_sparse(targets: SparseTargets | MeanTargets) -> SparseTargets:
    return targets.as_bucket() if isinstance(targets, MeanTargets) else targets


def _at_knots(targets: SparseTargets, knots: tuple[float, ...], vocab_size: int) -> SparseTargets:
    """The same targets at a part of their knots, over a vocabulary that may be larger."""
    columns = [targets.knots.index(knot) for knot in knots]
    return replace(targets, tail_curve=targets.tail_curve[..., columns], knots=knots, vocab_size=vocab_size)
