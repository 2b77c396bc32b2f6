"""mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from ..base.errors import MismatchError
from ..targets.sparse_targets import SparseTargets
from .batch import Batch, IndexArray
from .row_source import Rows, _View
from .signals import Signal


class Mixture(_View):
    """Rows of several sources in given shares, as one dataset of `rows` rows.

    Of the `rows` rows, source s gives its share by weight (rounded so that the sum is right). A source that has fewer rows
    than its share repeats itself: every row appears equally often, give or take one; one that has more gives a random
    part. Which rows, and their order, is a function of `seed` alone. By default the mixture is as long as its sources
    together.

    Temperatures other than 1 need the same knots in all sources; where they differ the mixture offers T = 1 only. A row
    that several teachers cached may be mixed in from each: over an epoch the gradient of the forward KL is then that of
    their mean, at any temperature.

    Either all sources have samples (threshold, sampled) or none: the loss estimates the tail of a whole batch from its
    samples, or takes it as a bucket.
    """

    def __init__(
        self, sources: Sequence[Rows], weights: Sequence[float] | None = None, *, rows: int | None = None, seed: int = 0
    ) -> None:
        """Raises MismatchError for sources of different tokenizers or row lengths or of which only some have samples,
        ValueError for unusable weights."""
        _check_alike(sources, "mixed")
        if len({_has_samples(source) for source in sources if len(source)}) > 1:
            raise MismatchError(
                "caches with samples (threshold, sampled) and without (topk, topp) cannot be mixed: their losses take the "
                "tail in different ways; cache all of them with supports of one of these kinds"
            )
        super().__init__(sources[0])
        self._sources, self._seed = list(sources), seed
        sizes = [len(source) for source in sources]
        weights = [float(size) for size in sizes] if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(sizes) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(f"weights {weights}: give one number per source, none negative, not all 0")
        if any(weight > 0 and size == 0 for weight, size in zip(weights, sizes, strict=True)):
            raise ValueError("a source without rows cannot have a share")
        self._weights, self._total = weights, sum(sizes) if rows is None else rows
        counts = _apportion(weights, self._total)
        generator = np.random.default_rng([seed, 0])
        nothing = np.empty(0, np.int64)
        chosen = [
            np.concatenate([nothing, *(generator.permutation(size) for _ in range(-(-count // max(size, 1))))])[:count]
            for size, count in zip(sizes, counts, strict=True)
        ]
        order = generator.permutation(self._total)
        self._which = np.repeat(np.arange(len(sizes)), counts)[order]
        self._rows = np.concatenate(chosen).astype(np.int64)[order]

    @property
    def vocab_size(self) -> int:
        return max(source.vocab_size for source in self._sources)

    @property
    def signals(self) -> dict[str, Signal]:
        first, *others = (source.signals for source in self._sources)
        return {
            name: signal
            for name, signal in first.items()
            if all(name in other and other[name].shape == signal.shape for other in others)
        }

    @property
    def knots(self) -> tuple[float, ...]:
        return _common_knots(self._sources)

    def _made_of(self) -> list[Any]:
        return [[source.digest for source in self._sources], self._weights, self._total, self._seed]

    def __len__(self) -> int:
        return self._total

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        asked, order = self._by_source(indices)
        parts = [cast(dict[str, Any], source.batch(rows)) for source, rows in asked]
        targets = SparseTargets.cat([_at_knots(part["targets"], self.knots, self.vocab_size) for part in parts])
        left_out = {"targets", *(set(asked[0][0].signals) - set(self.signals))}
        names = [name for name in parts[0] if name not in left_out]
        together = {name: torch.cat([part[name] for part in parts])[order] for name in names}
        return cast(Batch, {**together, "targets": targets[order]})

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]:
        asked, order = self._by_source(indices)
        return np.concatenate([source.segment_ids(rows) for source, rows in asked])[order]

    def _by_source(self, indices: Sequence[int] | IndexArray) -> tuple[list[tuple[Rows, IndexArray]], IndexArray]:
        """The sources that hold these rows, each with its own of them, and the order that makes them the rows asked for."""
        wanted = self._checked(indices)
        which, rows = self._which[wanted], self._rows[wanted]
        slots = [np.flatnonzero(which == number) for number in range(len(self._sources))]
        asked = [(source, rows[slot]) for source, slot in zip(self._sources, slots, strict=True) if len(slot)]
        return asked, np.argsort(np.concatenate(slots))


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of `total` nearest to the weights: the floor of each, the rest to the largest remainders."""
    exact = [weight * total / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


class Ensemble(_View):
    """The same rows as several teachers of one tokenizer saw them: the weighted mean of their probabilities at T = 1.

        p(v) = sum_s w_s p_s(v)   for v in the union of the supports,     p(R) = 1 - sum_v p(v)

    A teacher that has not kept v itself has it in its tail, and its share of p(v) stays in the bucket p(R): p(v) is then
    too low by at most w_s times that teacher's k-th probability (bounded, and measured in the tests), and head and tail
    still sum to 1. The mean of softened distributions is not the softened mean, and a mean's tail curve is not known, so
    an ensemble offers T = 1 only; for other temperatures put the caches into a `Mixture`.
    """

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float] | None = None) -> None:
        """Raises MismatchError unless the sources hold the same rows, ValueError for unusable weights."""
        _check_alike(sources, "averaged")
        super().__init__(sources[0])
        self._sources = list(sources)
        weights = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(sources) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(f"weights {weights}: give one number per source, none negative, not all 0")
        self._weights = [weight / sum(weights) for weight in weights]
        if len({len(source) for source in sources}) > 1:
            raise MismatchError("the teachers' caches have different numbers of rows: cache the same corpus with each")
        if len(self) and any(_has_samples(source) for source in sources):
            raise ValueError("caches with samples (threshold, sampled) cannot be averaged: put them into a mixture")

    @property
    def vocab_size(self) -> int:
        return max(source.vocab_size for source in self._sources)

    @property
    def signals(self) -> dict[str, Signal]:
        return {}

    @property
    def knots(self) -> tuple[float, ...]:
        return (1.0,)

    def _made_of(self) -> list[Any]:
        return [[source.digest for source in self._sources], self._weights]

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        parts = [source.batch(indices) for source in self._sources]
        for part in parts[1:]:
            if not torch.equal(part["labels"], parts[0]["labels"]):
                raise MismatchError("the teachers' caches hold different rows: cache the same corpus with each")
        targets = mean_targets([part["targets"] for part in parts], self._weights)
        rows = {name: value for name, value in parts[0].items() if name not in self._source.signals}
        return cast(Batch, {**rows, "targets": replace(targets, vocab_size=self.vocab_size)})

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]:
        return self._source.segment_ids(indices)


def mean_targets(targets: Sequence[SparseTargets], weights: Sequence[float]) -> SparseTargets:
    """Targets [...] of several teachers -> those of their weighted mean at T = 1, as `Ensemble` defines it."""
    flat = [target.flatten() for target in targets]
    ids_NJ = torch.cat([target.token_ids for target in flat], -1)
    parts = [
        target.at_temperature(1.0)[0].double().exp() * weight for target, weight in zip(flat, weights, strict=True)
    ]
    p_NJ = torch.cat(parts, -1)
    ids_NJ, order = ids_NJ.sort(-1)
    p_NJ = p_NJ.gather(-1, order)
    # Equal ids now stand together: sum each run into its first entry.
    first_NJ = torch.ones_like(ids_NJ, dtype=torch.bool)
    first_NJ[:, 1:] = ids_NJ[:, 1:] != ids_NJ[:, :-1]
    run_NJ = first_NJ.cumsum(-1) - 1
    p_NJ = torch.zeros_like(p_NJ).scatter_add_(-1, run_NJ, p_NJ)
    ids_NJ = torch.full_like(ids_NJ, -1).scatter_(-1, run_NJ, ids_NJ)
    p_NJ = torch.where(ids_NJ >= 0, p_NJ, 0.0)
    p_NJ, order = p_NJ.sort(dim=-1, descending=True, stable=True)
    ids_NJ = torch.where(p_NJ > 0, ids_NJ.gather(-1, order), -1)
    width = max(int((ids_NJ >= 0).sum(-1).max()), 1)
    p_NJ, ids_NJ = p_NJ[:, :width], ids_NJ[:, :width]
    tails = [
        target.at_temperature(1.0)[1].double().exp() * weight for target, weight in zip(flat, weights, strict=True)
    ]
    # What a teacher holds in its tail stays there; summed from the tails, it loses nothing to rounding.
    tail_N = torch.stack(tails).sum(0)
    result = SparseTargets(
        token_ids=ids_NJ,
        log_probs=p_NJ.log().float(),
        tail_curve=tail_N.log().float().unsqueeze(-1),
        mask=flat[0].mask,
        knots=(1.0,),
        vocab_size=max(target.vocab_size for target in targets),
    )
    return result.unflatten(tuple(targets[0].mask.shape))


def _check_alike(sources: Sequence[Rows], what: str) -> None:
    if not sources:
        raise ValueError("no source is given")
    for source in sources[1:]:
        if source.tokenizer_digest != sources[0].tokenizer_digest:
            raise MismatchError(
                f"caches of different tokenizers cannot be {what} (digests {sources[0].tokenizer_digest[:12]} and "
                f"{source.tokenizer_digest[:12]}): their token ids mean different text"
            )
        if source.objective != sources[0].objective:
            raise MismatchError(f"causal and masked rows cannot be {what}: their targets mean different things")
        if source.row_length != sources[0].row_length:
            raise MismatchError(
                f"rows of {sources[0].row_length} and {source.row_length} tokens cannot be {what}: cut the longer ones "
                "with ShorterRows"
            )


def _common_knots(sources: Sequence[Rows]) -> tuple[float, ...]:
    kinds = {source.knots for source in sources}
    return kinds.pop() if len(kinds) == 1 else (1.0,)


def _has_samples(source: Rows) -> bool:
    return source.batch([0])["targets"].draws is not None


def _at_knots(targets: SparseTargets, knots: tuple[float, ...], vocab_size: int) -> SparseTargets:
    """The same targets at some of their knots, over a vocabulary that may be larger."""
    columns = [targets.knots.index(knot) for knot in knots]
    return replace(targets, tail_curve=targets.tail_curve[..., columns], knots=knots, vocab_size=vocab_size)
