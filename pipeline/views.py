"""Other shapes of the same cache, all read like one: fewer rows, shorter rows, several caches, several teachers.

A view holds no data. It has what training asks of a cache (`len`, rows, `batch`, and the facts of `Rows`), so views nest
and go wherever a cache goes:

    Subset(cache, range(1000))               some rows
    ShorterRows(cache, 512)                  rows cut to 512 tokens
    Mixture([web, code], [0.7, 0.3])         rows of several caches in given shares
    Ensemble([teacher_a, teacher_b])         the same rows, the mean of several teachers
    RowStream(rows, seed=0)                  an iterable dataset: every row once per epoch, shared by workers and ranks
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pipeline.cache import Batch, IndexArray, LogitCache, each, split
from pipeline.config import StudentConfig
from pipeline.durable import json_digest
from pipeline.errors import MismatchError, RecipeError
from pipeline.order import permuted
from pipeline.signals import Signal
from pipeline.targets import SparseTargets

_SCAN_ROWS = 1024


class Rows(Protocol):
    """What a cache and every view of it can be asked."""

    @property
    def row_length(self) -> int:
        """Tokens per row, L."""

    @property
    def vocab_size(self) -> int:
        """The largest of the teachers' output layers."""

    @property
    def objective(self) -> str:
        """causal or masked: what labels and targets predict."""

    @property
    def signals(self) -> dict[str, Signal]:
        """What rows have beside the targets, by name."""

    @property
    def knots(self) -> tuple[float, ...]:
        """Inverse temperatures at which the tail is known."""

    @property
    def digest(self) -> str:
        """One digest of everything that determines the rows and their order."""

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer that made the token ids."""

    @property
    def tokenizer_dir(self) -> Path:
        """Where that tokenizer can be loaded from."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        """Rows in the order asked for, stacked on a leading axis."""

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]:
        """Which document of its row every token belongs to [R, L], without reading targets."""


class _View(Dataset[Batch]):
    """A view whose facts are those of its first source."""

    def __init__(self, source: Rows) -> None:
        self._source = source

    @property
    def row_length(self) -> int:
        return self._source.row_length

    @property
    def vocab_size(self) -> int:
        return self._source.vocab_size

    @property
    def objective(self) -> str:
        return self._source.objective

    @property
    def signals(self) -> dict[str, Signal]:
        return self._source.signals

    @property
    def knots(self) -> tuple[float, ...]:
        return self._source.knots

    @property
    def digest(self) -> str:
        return json_digest([type(self).__name__, *self._made_of()])

    @property
    def tokenizer_digest(self) -> str:
        return self._source.tokenizer_digest

    @property
    def tokenizer_dir(self) -> Path:
        return self._source.tokenizer_dir

    @abstractmethod
    def _made_of(self) -> list[Any]:
        """What the digest is taken of."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int] | IndexArray) -> Batch: ...

    @abstractmethod
    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]: ...

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        return split(self.batch(indices))

    def _checked(self, indices: Sequence[int] | IndexArray) -> IndexArray:
        wanted = np.asarray(indices, np.int64)
        if len(wanted) == 0 or wanted.min() < -len(self) or wanted.max() >= len(self):
            raise IndexError(f"rows {list(indices)} are outside 0..{len(self) - 1}")
        return np.where(wanted < 0, wanted + len(self), wanted)


class Subset(_View):
    """Some rows of a source, in the order given; a row may be named several times."""

    def __init__(self, source: Rows, rows: Sequence[int] | IndexArray) -> None:
        """Raises IndexError for a row that is not there."""
        super().__init__(source)
        self._rows = np.asarray(rows, np.int64)
        if len(self._rows) and (self._rows.min() < 0 or self._rows.max() >= len(source)):
            raise IndexError(f"a row of the subset is outside 0..{len(source) - 1}")

    def _made_of(self) -> list[Any]:
        return [self._source.digest, self._rows.tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        return self._source.batch(self._rows[self._checked(indices)])

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]:
        return self._source.segment_ids(self._rows[self._checked(indices)])


class ShorterRows(_View):
    """Rows of `length` tokens out of longer ones.

    A target at t depends on the tokens of its document up to t, and on nothing after. Cutting the *end* of a row
    therefore leaves every remaining target exactly what the teacher would say. Cutting the *start* in the middle of a
    document would not: the teacher saw what the student then does not. So pieces begin where a row or a document begins:
    the first `length` tokens of a row, then, from the first document that starts at or after the end of the piece before,
    the next ones, as long as a whole piece fits. Every token belongs to at most one piece; those that fit into none are
    left out (`kept` says what share is not).
    """

    def __init__(self, source: Rows, length: int) -> None:
        """Raises ValueError for a length that is not between 2 and the rows' own, and for masked rows."""
        super().__init__(source)
        if source.objective == "masked":
            raise ValueError("masked rows cannot be cut: the teacher saw both sides of every token")
        if not 2 <= length <= source.row_length:
            raise ValueError(f"length {length} is outside 2..{source.row_length}, the length of the cached rows")
        self._length = length
        rows: list[int] = []
        starts: list[int] = []
        for first in range(0, len(source), _SCAN_ROWS):
            segments = source.segment_ids(np.arange(first, min(first + _SCAN_ROWS, len(source))))
            for row, start in _pieces(segments, length):
                rows.append(first + row)
                starts.append(start)
        self._rows, self._starts = np.asarray(rows, np.int64), np.asarray(starts, np.int64)

    @property
    def row_length(self) -> int:
        return self._length

    @property
    def kept(self) -> float:
        """Share of the source's tokens that are in some piece."""
        return len(self) * self._length / max(len(self._source) * self._source.row_length, 1)

    def _made_of(self) -> list[Any]:
        return [self._source.digest, self._length]

    def __len__(self) -> int:
        return len(self._rows)

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]:
        wanted = self._checked(indices)
        whole = self._source.segment_ids(self._rows[wanted])
        at = self._starts[wanted, None] + np.arange(self._length)
        pieces: np.ndarray[Any, Any] = whole[np.arange(len(wanted))[:, None], at]
        pieces -= pieces[:, :1].copy()
        return pieces

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        wanted = self._checked(indices)
        whole = self._source.batch(self._rows[wanted])
        at = torch.from_numpy(self._starts[wanted]).unsqueeze(-1) + torch.arange(self._length)
        row = torch.arange(len(wanted)).unsqueeze(-1)
        # The last token's label lies outside the piece. It is still a valid thing to predict, and so is its target.
        pieces = cast(dict[str, Any], each(whole, lambda value: value[row, at]))
        pieces["segment_ids"] = pieces["segment_ids"] - pieces["segment_ids"][:, :1]
        for name in pieces:
            if name.startswith("attention."):  # [B, length, H, L]: the other end of each pair is cut too
                other = at[:, None, None].expand(*pieces[name].shape[:-1], self._length)
                pieces[name] = pieces[name].gather(-1, other)
        return cast(Batch, pieces)


def _pieces(segment_ids: np.ndarray[Any, Any], length: int) -> Iterator[tuple[int, int]]:
    """(row, start) of every piece of `length` tokens that starts where its row or a document starts."""
    for row, segments in enumerate(segment_ids):
        starts = np.concatenate([[0], np.flatnonzero(segments[1:] != segments[:-1]) + 1])
        free = 0
        for start in starts:
            if start >= free and start + length <= len(segments):
                yield row, int(start)
                free = start + length


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


def student_rows(config: StudentConfig, own: Rows, seed: int) -> Rows:
    """The rows that a student of a recipe trains on: the run's own cache, or the views of it that its settings name.

    Raises RecipeError naming the setting for a view that cannot be made.
    """
    try:
        rows = own
        if config.caches is not None:
            sources = [LogitCache(path) for path in config.caches]
            length = min(source.row_length for source in sources)
            alike = [s if s.row_length == length else ShorterRows(s, length) for s in sources]
            rows = Mixture(alike, list(config.caches.values()), seed=seed)
        elif config.teachers is not None:
            rows = Ensemble([LogitCache(path) for path in config.teachers])
        if config.row_length is not None and config.row_length != rows.row_length:
            rows = ShorterRows(rows, config.row_length)
        if config.max_rows is not None and config.max_rows < len(rows):
            rows = Subset(rows, np.sort(np.random.default_rng(seed).permutation(len(rows))[: config.max_rows]))
        return rows
    except ValueError as error:
        raise RecipeError(f"students: caches, teachers or row_length cannot be used: {error}") from error


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


@dataclass
class RowStream(IterableDataset[Batch]):
    """Every row once per epoch, one after the other, for DataLoader: `DataLoader(RowStream(cache), batch_size=8, ...)`.

    The order is a function of `seed` and the epoch alone; ranks (`rank` of `world_size`) and DataLoader workers share it
    out, each row to exactly one of them. `epochs=None` never ends. Rows are decoded `block` at a time. Ranks may differ by
    one row per epoch: bound the steps by number, or give `drop_last`, which leaves out the rows that do not divide evenly.
    """

    source: Rows
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = 1
    first_epoch: int = 0
    """Set to n to continue after n epochs."""
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    block: int = 64

    def order(self, epoch: int, places: IndexArray | None = None) -> IndexArray:
        """The rows in these places of one epoch's order, by default in all of them; for all ranks and workers together."""
        rows = len(self.source)
        if places is None:
            places = np.arange(rows - rows % self.world_size if self.drop_last else rows)
        return permuted(places, rows, self.seed, epoch) if self.shuffle else places

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        epoch = self.first_epoch
        while self.epochs is None or epoch < self.first_epoch + self.epochs:
            rows = len(self.source)
            if not rows:
                return
            stop = rows - rows % self.world_size if self.drop_last else rows
            mine = range(self.rank, stop, self.world_size)[worker_id::workers]
            for first in range(0, len(mine), self.block):
                yield from split(self.source.batch(self.order(epoch, np.asarray(mine[first : first + self.block]))))
            epoch += 1
