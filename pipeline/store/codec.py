"""From targets to small integers and back: the lossy step, and the only one.

Two profiles keep the same numbers in different forms: `compact` for few bytes, `fast` for reading at memory speed. Entries
of a row stand end to end, position after position, head before samples; arrays are [row, entry] or [row, position, ...].

    head_counts, sample_counts   entries of each position, where the support varies
    codes | token_ids            compact: codes of a codebook, within a band ascending and differenced; fast: the ids
    top_steps, rest_steps |      compact: level of each entry, differenced along rank, the first 8 of a position apart from the
      levels                     others, whose differences are mostly 0; fast: the level itself
    draws                        how often each sample was drawn
    head_mass                    log-odds of the head's mass, in steps of 1/64 nat; of `threshold` about what the number of
                                 draws tells of the tail's
    tail_steps                   F(beta) at the knots other than 1, in steps of 1/128 nat about a linear prediction from those known

Log-probabilities are rounded to *levels*: x nats below the first head entry, or below 0 where there is none, is level log(1 + b x / a) / b, so that steps grow from
a where tokens are likely to a + b x where they are not. An error e_v in log p_v costs about 1/2 sum p_v e_v^2 of KL; with
a = 0.045 and b = 0.033 that is 4e-4 at T = 1 and less above. The head's mass is stored by itself and sets the sum right: one
likely token rounded by half a step would else move as much as 1 % of the probability between head and tail.

Entries of one level form a *band*. Their order says nothing, so they are sorted by code: log2(n!) bits less for a band of n, 12
bytes of 76 at k = 64. The first entry of a head is a band of its own, so that the teacher's choice survives.

Samples need levels for temperatures other than 1 only, where each is weighed by its own probability. A cache whose one knot is 1
keeps none of them: its samples are a single band, and of `threshold` that takes 17 bytes in place of 26.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support
from .arrays import Array, Arrays, Rows, _check_length, joined
from .codebook import Codebook
from .entry_kernels import TOP_ENTRIES, curve_of_steps, read_bands, read_ids, scale_levels, spread
from .levels import (
    _LARGEST,
    _LAST_LEVEL,
    _LOG_PROBS,
    _MASSES,
    _NO_TAIL,
    HEAD_MASS_STEP,
    LEVEL_GROWTH,
    LEVEL_STEP,
    TAIL_STEP,
    _masses_of_steps,
)

PROFILES = ("compact", "fast")
_LEARN_POSITIONS = 2**17


@dataclass(frozen=True)
class TargetCodec:
    """How targets of one cache are stored; recorded in the manifest and part of the identity."""

    support: Support
    knots: tuple[float, ...]
    vocab_size: int
    profile: str = "compact"
    tail_prediction: tuple[tuple[float, ...], ...] = ()
    """For each knot other than 1, nearest first: weights of a constant and of F at the knots before it, 1 first."""
    codebook: Codebook | None = None

    def learn(self, targets: SparseTargets, contexts: Array, positions: int) -> TargetCodec:
        """This codec, fitted to the first shard of a cache that will have `positions`.

        targets [R, L], contexts [R, L]: the token that stands at each position. `fast` has nothing to learn.
        """
        if self.profile == "fast":
            return self
        targets = targets.flatten()
        used = targets.mask.cpu().numpy()
        curve = targets.tail_curve.cpu().numpy().astype(np.float64)[used][:_LEARN_POSITIONS]
        curve = curve[np.isfinite(curve).all(-1)]
        known = [np.ones(len(curve)), curve[:, self.knots.index(1.0)]]
        prediction = []
        for knot in self._other_knots:
            wanted = curve[:, self.knots.index(knot)]
            # Too few positions would be learned by heart.
            enough = len(curve) > 8 * len(known)
            weights = np.linalg.lstsq(np.stack(known, 1), wanted, rcond=None)[0] if enough else np.zeros(len(known))
            # Rounded to what does not depend on the order in which some library sums, and the constant set right by it.
            slopes = [round(float(weight), 3) + 0.0 for weight in weights[1:]]
            rest = wanted - sum(slope * column for slope, column in zip(slopes, known[1:], strict=True))
            constant = round(float(rest.mean()), 3) + 0.0 if enough else 0.0
            prediction.append((constant, *slopes))
            known.append(wanted)
        ids, contexts = targets.token_ids.cpu().numpy()[used], contexts.reshape(-1)[used]
        book = Codebook.learn(ids, contexts, self.vocab_size, max(positions / max(len(ids), 1), 1.0))
        return replace(self, tail_prediction=tuple(prediction), codebook=book)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": "levels",
            "version": 1,
            "profile": self.profile,
            "support": self.support.to_json(),
            "knots": list(self.knots),
            "vocab_size": self.vocab_size,
            "level_step": LEVEL_STEP,
            "level_growth": LEVEL_GROWTH,
            "head_mass_step": HEAD_MASS_STEP,
            "tail_step": TAIL_STEP,
            "tail_prediction": [list(weights) for weights in self.tail_prediction],
            "codebook": None if self.codebook is None else self.codebook.digest,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], codebook: Codebook | None) -> TargetCodec:
        """Raises ValueError for a codec this version does not know, or a codebook that is another than it names."""
        check_vocab_size(value["vocab_size"])
        codec = cls(
            Support(**value["support"]),
            tuple(float(knot) for knot in value["knots"]),
            int(value["vocab_size"]),
            value["profile"],
            tuple(tuple(float(weight) for weight in weights) for weights in value["tail_prediction"]),
            codebook,
        )
        if codec.to_json() != value or codec.profile not in PROFILES or 1.0 not in codec.knots:
            raise ValueError(f"unknown target codec {value.get('name')!r} version {value.get('version')!r}")
        codec.support.check(codec.vocab_size)
        if codec.tail_prediction and [len(weights) for weights in codec.tail_prediction] != [
            2 + place for place in range(len(codec._other_knots))
        ]:
            raise ValueError("its tail prediction does not fit its knots")
        return codec

    def layout(self) -> dict[str, str]:
        """Name -> dtype of every stored array."""
        if self.profile == "compact":
            limit = self.vocab_size if self.codebook is None else self.codebook.code_limit
            names = {"codes": "uint16" if limit <= 2**16 else "uint32", "top_steps": "uint16", "rest_steps": "uint16"}
        else:
            names = {"token_ids": "uint16" if self.vocab_size <= 2**16 else "uint32", "levels": "uint8"}
        if self.support.varies and self.support.has_head:
            names["head_counts"] = "uint16"
        if self.support.has_samples:
            names |= {"sample_counts": "uint16", "draws": "uint16"}
        if self.support.has_head:
            names["head_mass"] = "int16"
        if len(self.knots) > 1:
            names["tail_steps"] = "int16"
        return names

    def encode(self, targets: SparseTargets, contexts: Array) -> Arrays:
        """Targets [R, L] and the token that stands at each position [R, L] -> arrays [R, ...]."""
        if (targets.knots, targets.vocab_size) != (self.knots, self.vocab_size):
            raise ValueError(f"targets of another kind than {self.to_json()}")
        arrays = self._encode_entries(targets, contexts) | self._encode_masses(targets)
        return {name: arrays[name].astype(dtype) for name, dtype in self.layout().items()}

    def _encode_entries(self, targets: SparseTargets, contexts: Array) -> Arrays:
        """Ids, levels and draws, and how many there are of each; n entries of all positions end to end."""
        shape = targets.mask.shape
        token_ids_PK = targets.token_ids.flatten(0, 1).cpu().numpy()
        used_PK = token_ids_PK >= 0
        ids = token_ids_PK[used_PK]
        log_probs = targets.log_probs.flatten(0, 1).cpu().numpy()[used_PK].astype(np.float64)
        drawn = None if targets.draws is None else targets.draws.flatten(0, 1).cpu().numpy()[used_PK]
        counts_P = used_PK.sum(-1)
        heads_P = counts_P if drawn is None else targets.head_mask.flatten(0, 1).sum(-1).cpu().numpy()
        leveled_P = counts_P if self._samples_have_levels else heads_P

        filled_P = counts_P > 0
        counts_N, heads_N = counts_P[filled_P], heads_P[filled_P]
        starts_N = np.cumsum(counts_N) - counts_N
        rank = np.arange(len(ids)) - np.repeat(starts_N, counts_N)
        has_level = None if leveled_P is counts_P else rank < np.repeat(leveled_P, counts_P)
        reference_N = np.where(heads_N > 0, log_probs[starts_N], 0.0)
        below = np.maximum(np.repeat(reference_N, counts_N) - log_probs, 0.0)
        levels = np.rint(np.log1p(LEVEL_GROWTH / LEVEL_STEP * below) / LEVEL_GROWTH)
        levels = np.minimum(levels, _LAST_LEVEL).astype(np.int64)

        def leveled(values: Array) -> Array:
            return values if has_level is None else values[has_level]

        def in_row(of_position_P: Array) -> Array:
            sums: Array = of_position_P.reshape(shape).sum(-1)
            return sums

        arrays: Arrays = {}
        if self.profile == "fast":
            arrays["token_ids"] = _by_row(ids, in_row(counts_P))
            arrays["levels"] = _by_row(leveled(levels), in_row(leveled_P))
        else:
            steps = np.diff(levels, prepend=0)
            steps[starts_N] = levels[starts_N]
            if has_level is not None:
                steps[~has_level] = 0
            band_starts = _band_starts(steps, starts_N, counts_N, heads_N)
            codes = ids
            if self.codebook is not None:
                codes = self.codebook.encode(ids, contexts.reshape(-1)[filled_P], counts_N)
            key = (np.cumsum(band_starts) << 24) + codes
            if drawn is None:
                codes = np.sort(key) & 0xFFFFFF
            else:
                order = np.argsort(key)
                codes, drawn = codes[order], drawn[order]
            in_top = leveled(rank) < TOP_ENTRIES
            steps = leveled(steps)
            top_of_row = in_row(np.minimum(leveled_P, TOP_ENTRIES))
            arrays["codes"] = _by_row(np.where(band_starts, codes, np.diff(codes, prepend=0)), in_row(counts_P))
            arrays["top_steps"] = _by_row(steps[in_top], top_of_row)
            arrays["rest_steps"] = _by_row(steps[~in_top], in_row(leveled_P) - top_of_row)
        if self.support.varies and self.support.has_head:
            arrays["head_counts"] = heads_P.reshape(shape)
        if drawn is not None:
            samples_P = counts_P - heads_P
            arrays["sample_counts"] = samples_P.reshape(shape)
            # Nearly all are 1, and so is what fills up the shorter rows.
            arrays["draws"] = _by_row(drawn[drawn > 0], in_row(samples_P), fill=1)
        return arrays

    def _encode_masses(self, targets: SparseTargets) -> Arrays:
        """The head's mass, and the tail curve at the knots other than 1."""
        mask = targets.mask.cpu().numpy()
        curve = np.where(mask[..., None], targets.tail_curve.cpu().numpy().astype(np.float64), 0.0)
        draws = None if targets.draws is None else targets.draws.sum(-1).cpu().numpy()
        arrays: Arrays = {}
        if self.support.has_head:
            on_head = torch.where(targets.head_mask, targets.log_probs, -torch.inf)
            log_odds = torch.logsumexp(on_head, -1).cpu().numpy().astype(np.float64) - curve[..., self.knots.index(1.0)]
            log_odds = np.where(mask, log_odds, 0.0)
            above = np.minimum(log_odds, 1e6) - self._expected_log_odds(draws)
            mass = np.clip(np.rint(above / HEAD_MASS_STEP), -_LARGEST, _LARGEST)
            arrays["head_mass"] = np.where(np.isposinf(log_odds), _NO_TAIL, np.where(mask, mass, 0.0))
        if self._other_knots:
            known = self._known(self._log_masses(arrays.get("head_mass"), mask.shape, draws)[1])
            columns = []
            for place, knot in enumerate(self._other_knots):
                predicted, value = self._predict(place, known), curve[..., self.knots.index(knot)]
                value = np.where(np.isfinite(value), value, predicted)
                step = np.clip(np.rint((value - predicted) / TAIL_STEP), -_LARGEST, _LARGEST)
                step = np.where(mask, step, 0.0)
                columns.append(step)
                known.append(predicted + step * TAIL_STEP)
            arrays["tail_steps"] = np.stack(columns, -1)
        return arrays

    def decode(self, rows: Rows, contexts: Array, mask: Array) -> SparseTargets:
        """Stored arrays of B rows, the token at each position [B, L] and where there are targets [B, L] -> targets [B, L].

        P = B L are all positions. Raises ValueError for numbers that no encoder writes.
        """
        shape = mask.shape
        entries = _Entries.of(self, rows, mask)
        shape_PK = (mask.size, entries.width)
        drawn_PK = draws = None
        if self.support.has_samples:
            samples_P = entries.counts_P - entries.heads_P
            drawn_n, drawn_PK = entries.of_positions("draws", samples_P), np.empty(shape_PK, np.int64)
            spread(*_words(drawn_n), entries.heads_P, samples_P, 0, drawn_PK)
            draws = drawn_PK.sum(-1).reshape(shape)
        head_mass = entries.fixed("head_mass").reshape(shape) if self.support.has_head else None
        log_head, log_tail = self._log_masses(head_mass, shape, draws)

        token_ids_PK, log_probs_PK = np.empty(shape_PK, np.int64), np.empty(shape_PK, np.float32)
        log_head_P = log_head.reshape(-1)
        if self.profile == "fast":
            self._decode_ids(entries, log_head_P, token_ids_PK, log_probs_PK)
        else:
            levels_n = self._decode_bands(entries, contexts.reshape(-1), token_ids_PK)
            scale_levels(levels_n, entries.heads_P, entries.leveled_P, log_head_P, _LOG_PROBS, _MASSES, log_probs_PK)
        if drawn_PK is not None and draws is not None and not self._samples_have_levels:
            # All that is known of a sample is what it stands for.
            one_P = (log_tail - np.log(np.maximum(draws, 1))).reshape(-1)
            log_weights_PK = np.log(np.maximum(drawn_PK, 1)) + one_P[:, None]
            log_probs_PK = np.where(drawn_PK > 0, log_weights_PK.astype(np.float32), log_probs_PK)

        def of_entries(values_PK: Array) -> Tensor:
            return torch.from_numpy(values_PK).view(*shape, entries.width)

        return SparseTargets(
            of_entries(token_ids_PK),
            of_entries(log_probs_PK),
            torch.from_numpy(self._decode_curve(entries, log_tail, mask)),
            torch.from_numpy(mask),
            self.knots,
            self.vocab_size,
            None if drawn_PK is None else of_entries(drawn_PK),
        )

    def _decode_ids(self, entries: _Entries, log_head_P: Array, token_ids_PK: Array, log_probs_PK: Array) -> None:
        """Of `fast`: writes token ids, -1 where there is no entry, and log-probabilities. Row by row, none is copied."""
        ids = entries.first_of_rows("token_ids", entries.counts_P)
        levels = entries.first_of_rows("levels", entries.leveled_P)
        length = entries.shape[1]
        for row in range(entries.shape[0]):
            here = slice(row * length, (row + 1) * length)
            highest_id = read_ids(
                *_words(ids[row]),
                levels[row],
                entries.counts_P[here],
                entries.heads_P[here],
                entries.leveled_P[here],
                log_head_P[here],
                _LOG_PROBS,
                _MASSES,
                token_ids_PK[here],
                log_probs_PK[here],
            )
            if highest_id >= self.vocab_size:
                raise ValueError("token ids outside the vocabulary")

    def _decode_bands(self, entries: _Entries, contexts_P: Array, token_ids_PK: Array) -> Array:
        """Of `compact`: writes token ids, -1 where there is no entry; returns the levels uint8 of those that have one, end to end."""
        # What stands where nothing is kept may be anything.
        contexts_P = np.where(entries.counts_P > 0, contexts_P, 0)
        if int(contexts_P.min(initial=0)) < 0 or int(contexts_P.max(initial=0)) >= self.vocab_size:
            raise ValueError("tokens outside the vocabulary")
        book = self._book
        in_top_P = np.minimum(entries.leveled_P, TOP_ENTRIES)
        codes = entries.of_positions("codes", entries.counts_P)
        top_steps = entries.of_positions("top_steps", in_top_P)
        rest_steps = entries.of_positions("rest_steps", entries.leveled_P - in_top_P)
        levels_n = np.empty(int(entries.leveled_P.sum()), np.uint8)
        highest_place, highest_level = read_bands(
            *_words(codes),
            top_steps,
            rest_steps,
            entries.counts_P,
            entries.heads_P,
            entries.leveled_P,
            contexts_P.astype(np.int32),
            book.start,
            book.length,
            book.table,
            token_ids_PK,
            levels_n,
        )
        if highest_place >= len(book.table) or highest_level > _LAST_LEVEL:
            raise ValueError("levels or codes outside the scale")
        return levels_n

    def _decode_curve(self, entries: _Entries, log_tail: Array, mask: Array) -> Array:
        """F at every knot, float32 [B, L, C]."""
        curve = np.empty((mask.size, len(self.knots)), np.float32)
        others = self._other_knots
        steps_PS = np.zeros((mask.size, 0), np.int16)
        if others:
            steps_PS = entries.fixed("tail_steps", len(others)).reshape(mask.size, len(others))
        weights_SM = np.zeros((len(others), len(others) + 1))
        for place, weights in enumerate(self.tail_prediction):
            weights_SM[place, : len(weights)] = weights
        places_S = np.array([self.knots.index(knot) for knot in others], np.int64)
        log_tail_P = np.where(mask, log_tail, -np.inf).reshape(-1)
        curve_of_steps(steps_PS, TAIL_STEP, log_tail_P, weights_SM, places_S, self.knots.index(1.0), curve)
        return curve.reshape(*mask.shape, -1)

    @property
    def _samples_have_levels(self) -> bool:
        """Whether samples are stored with their own probabilities, which T other than 1 needs."""
        return len(self.knots) > 1

    @cached_property
    def _book(self) -> Codebook:
        """The codebook; without one a code is the token's id, as in a book of no lists."""
        return self.codebook or Codebook(self.vocab_size, *(np.empty(0, np.int64) for _ in range(4)))

    @property
    def _other_knots(self) -> list[float]:
        return sorted((knot for knot in self.knots if knot != 1.0), key=lambda knot: (abs(knot - 1.0), knot))

    def _known(self, log_tail: Array) -> list[Array]:
        """What the first prediction is made from: a constant, and F(1) where there is a tail."""
        return [np.ones(log_tail.shape), np.where(np.isneginf(log_tail), 0.0, log_tail)]

    def _predict(self, place: int, known: list[Array]) -> Array:
        """F at the knot in this place from a constant and what is known of it."""
        total = np.zeros(known[0].shape)
        if self.tail_prediction:
            for weight, values in zip(self.tail_prediction[place], known, strict=False):
                total += weight * values
        return total

    def _expected_log_odds(self, draws: Array | None) -> Array | float:
        """The head's log-odds where its tail was drawn from so often [...]: n draws are made of a mass of (n - 1) tau to n tau."""
        if draws is None or self.support.tau is None:
            return 0.0
        tail = np.minimum(np.maximum(draws - 0.5, 0.5) * self.support.tau, 1.0 - 0.25 * self.support.tau)
        return np.log1p(-tail) - np.log(tail)

    def _log_masses(
        self, head_mass: Array | None, shape: tuple[int, ...], draws: Array | None = None
    ) -> tuple[Array, Array]:
        """log of the head's and the tail's mass at T = 1, from stored log-odds and draws; without a head all is tail."""
        if head_mass is None:
            return np.full(shape, -np.inf), np.zeros(shape)
        if draws is not None:
            steps = head_mass.astype(np.float64)
            log_odds = np.where(steps == _NO_TAIL, np.inf, steps * HEAD_MASS_STEP + self._expected_log_odds(draws))
            return -np.logaddexp(0.0, -log_odds), -np.logaddexp(0.0, log_odds)
        # By table: an int16 has no more than 65,536 values.
        log_head, log_tail = _masses_of_steps()
        steps = head_mass.astype(np.int16).view(np.uint16)
        return log_head[steps], log_tail[steps]


@dataclass(frozen=True)
class _Entries:
    """Stored entries of some rows and how many each position has."""

    rows: Rows
    dtypes: dict[str, str]
    shape: tuple[int, int]
    width: int
    counts_P: Array
    heads_P: Array
    """Of these, how many are of the head; the others are samples."""
    leveled_P: Array
    """Of each position so many entries have a level."""

    @classmethod
    def of(cls, codec: TargetCodec, rows: Rows, mask: Array) -> _Entries:
        support = codec.support
        alike = 0 if support.varies else int(support.k or 0)
        counts_P = mask.reshape(-1) * np.int64(alike)
        entries = cls(rows, codec.layout(), mask.shape, alike, counts_P, counts_P, counts_P)
        if not support.varies:
            return entries
        if support.has_head:
            counts_P = counts_P + entries.fixed("head_counts")
        heads_P = counts_P
        if support.has_samples:
            counts_P = counts_P + entries.fixed("sample_counts")
        width = max(int(counts_P.max(initial=0)), 1)
        if width > 2 * support.entry_limit:
            raise ValueError(f"{width} entries at a position")  # no room is made for so many
        leveled_P = counts_P if codec._samples_have_levels else heads_P
        return replace(entries, width=width, counts_P=counts_P, heads_P=heads_P, leveled_P=leveled_P)

    def fixed(self, name: str, values: int = 1) -> Array:
        """[n] a stored array with so many values for each position. Raises ValueError where a row has another number."""
        lengths = [self.shape[1] * values] * self.shape[0]
        return joined(name, self.rows[name], self.dtypes[name], lengths, whole=True)

    def of_positions(self, name: str, counts_P: Array) -> Array:
        """[n] a stored array of which each position has so many values. Raises ValueError where a row has fewer."""
        return joined(name, self.rows[name], self.dtypes[name], self._per_row(counts_P), whole=False)

    def first_of_rows(self, name: str, counts_P: Array) -> list[Array]:
        """The same row by row, of an array that is stored as it is: views, read-only."""
        views = []
        for stored, length in zip(self.rows[name], self._per_row(counts_P), strict=True):
            assert isinstance(stored, np.ndarray)  # the caller asks for no other
            _check_length(name, len(stored), length)
            views.append(stored[:length])
            views[-1].flags.writeable = False
        return views

    def _per_row(self, counts_P: Array) -> list[int]:
        sums: list[int] = counts_P.reshape(self.shape).sum(-1).tolist()
        return sums


def _words(values: Array) -> tuple[Array, int]:
    """The uint16 words of stored values, and how many each has."""
    return values.view(np.uint16), values.itemsize // 2


def check_vocab_size(vocab_size: Any) -> None:
    """Raises ValueError for what cannot be the size of a vocabulary: token codes have 24 bits."""
    if type(vocab_size) is not int or not 1 <= vocab_size < 2**24:
        raise ValueError(f"{vocab_size!r} is not the size of a vocabulary")


def _band_starts(steps_n: Array, starts_N: Array, counts_N: Array, heads_N: Array) -> Array:
    """[n] bool: where a level begins, or a position, or the second entry of its head, or its samples."""
    begins: Array = steps_n > 0
    begins[starts_N] = True
    begins[starts_N[(counts_N > 1) & (heads_N > 0)] + 1] = True
    mixed = counts_N > heads_N
    begins[(starts_N + heads_N)[mixed]] = True
    return begins


def _by_row(values: Array, lengths: Array, fill: int = 0) -> Array:
    """Values of all rows end to end -> [R, longest], filled up behind the shorter ones. Never empty."""
    longest = max(int(lengths.max(initial=0)), 1)
    out = np.full((len(lengths), longest), fill, values.dtype)
    out[np.arange(longest) < lengths[:, None]] = values
    return out
