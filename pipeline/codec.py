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

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codebook import Codebook
from pipeline.supports import Support
from pipeline.targets import SparseTargets

PROFILES = ("compact", "fast")
LEVEL_STEP = 0.045
LEVEL_GROWTH = 0.033
HEAD_MASS_STEP = 1 / 64
TAIL_STEP = 1 / 128

_TOP_ENTRIES = 8
_LAST_LEVEL = 255  # 10,000 nats below the first
_LEVEL_SHIFT = np.uint32(24)
_CODE_BITS = np.uint32(2**24 - 1)
_NO_TAIL = 32767
_LARGEST = 32766
_LEARN_POSITIONS = 2**17

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]
Rows = dict[str, list[Array]]
"""Array name -> one array for each row."""

_LEVELS = np.expm1(LEVEL_GROWTH * np.arange(_LAST_LEVEL + 1)) * (LEVEL_STEP / LEVEL_GROWTH)


def _pairs(by_level: Array) -> Array:
    """Two float32 as one number for each pair of levels: half as many look-ups."""
    second, first = np.meshgrid(by_level, by_level, indexing="ij")
    return np.stack([first, second], -1).astype(np.float32).view(np.float64).reshape(-1)


_LOG_PROB_PAIRS = _pairs(-_LEVELS)
_PROB_PAIRS = _pairs(np.exp(-_LEVELS))


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
            context = np.repeat(contexts.reshape(-1), counts_P)
            codes = ids if self.codebook is None else self.codebook.encode(ids, context)
            key = (np.cumsum(band_starts) << 24) + codes
            if drawn is None:
                codes = np.sort(key) & 0xFFFFFF
            else:
                order = np.argsort(key)
                codes, drawn = codes[order], drawn[order]
            in_top = leveled(rank) < _TOP_ENTRIES
            steps = leveled(steps)
            top_of_row = in_row(np.minimum(leveled_P, _TOP_ENTRIES))
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

        P = B L are all positions, N those with stored entries: of `topk` the ones that have a target, else all. Raises
        ValueError or IndexError for numbers that no encoder writes.
        """
        shape, mask_P = mask.shape, mask.reshape(-1)
        entries = _Entries.of(self.support, rows, mask, self._samples_have_levels)
        counts_P, heads_P = entries.counts_P, entries.heads_P
        ids_PK, levels_PK = self._decode_ids(entries, contexts.reshape(-1)[entries.kept_P])
        ranks_K = np.arange(entries.width)
        drawn_PK = draws = None
        if self.support.has_samples:
            is_sample_PK = (ranks_K >= heads_P[:, None]) & (ranks_K < counts_P[:, None])
            drawn_PK = np.zeros(is_sample_PK.shape, np.int64)
            drawn_PK[is_sample_PK] = _joined(rows, "draws", (counts_P - heads_P).reshape(shape).sum(-1))
            draws = drawn_PK.sum(-1).reshape(shape)
        head_mass = _joined(rows, "head_mass").reshape(shape) if self.support.has_head else None
        log_head, log_tail = self._log_masses(head_mass, shape, draws)

        log_probs_PK = torch.from_numpy(_looked_up(_LOG_PROB_PAIRS, levels_PK))
        if self.support.has_head:
            p_PK = torch.from_numpy(_looked_up(_PROB_PAIRS, levels_PK))
            if not entries.uniform:
                p_PK *= torch.from_numpy(ranks_K < heads_P[:, None])
            mass_P = p_PK.sum(-1).numpy()
            # Where there are samples only, there is nothing to set right.
            offset_P = np.where(heads_P > 0, log_head.reshape(-1) - np.log(np.where(mass_P > 0, mass_P, 1.0)), 0.0)
            log_probs_PK += torch.from_numpy(offset_P.astype(np.float32)).unsqueeze(-1)
        if drawn_PK is not None and draws is not None and not self._samples_have_levels:
            # All that is known of a sample is what it stands for.
            one_P = (log_tail - np.log(np.maximum(draws, 1))).reshape(-1)
            log_weights_PK = (np.log(np.maximum(drawn_PK, 1)) + one_P[:, None]).astype(np.float32)
            log_probs_PK = torch.from_numpy(np.where(drawn_PK > 0, log_weights_PK, log_probs_PK.numpy()))
        if entries.uniform:
            empty_P = torch.from_numpy(np.flatnonzero(~mask_P))
            ids_PK.index_fill_(0, empty_P, -1)
            log_probs_PK.index_fill_(0, empty_P, -math.inf)
        else:
            unused_PK = torch.from_numpy(ranks_K >= counts_P[:, None])
            ids_PK.masked_fill_(unused_PK, -1)
            log_probs_PK.masked_fill_(unused_PK, -math.inf)
        return SparseTargets(
            ids_PK.view(*shape, entries.width),
            log_probs_PK.view(*shape, entries.width),
            torch.from_numpy(self._decode_curve(rows, log_tail, mask)),
            torch.from_numpy(mask),
            self.knots,
            self.vocab_size,
            None if drawn_PK is None else torch.from_numpy(drawn_PK).view(*shape, entries.width),
        )

    def _decode_ids(self, entries: _Entries, contexts_N: Array) -> tuple[Tensor, Array]:
        """Token ids int64 and levels uint8, both [P, K]; anything where there is no entry."""
        if self.profile == "fast":
            ids_PK = _spread(entries.dense("token_ids", entries.counts_P, 0, entries.width), entries.kept_P)
            return self._checked(ids_PK), _spread(
                entries.dense("levels", entries.leveled_P, 0, entries.width), entries.kept_P
            )
        words_KN = _summed_bands(entries)
        if self.codebook is not None:
            codes_KN = (words_KN & _CODE_BITS).view(np.int32)
            words_KN &= ~_CODE_BITS
            words_KN |= self.codebook.places(codes_KN, contexts_N).view(np.uint32)
        words_PK = _spread(_on_side(words_KN), entries.kept_P)
        levels_PK = (words_PK >> _LEVEL_SHIFT).astype(np.uint8)
        words_PK &= _CODE_BITS
        if self.codebook is None:
            return self._checked(words_PK), levels_PK
        return self.codebook.tokens(words_PK.view(np.int32)), levels_PK

    def _decode_curve(self, rows: Rows, log_tail: Array, mask: Array) -> Array:
        """F at every knot, float32 [B, L, C]."""
        curve = np.empty((*mask.shape, len(self.knots)), np.float32)
        curve[..., self.knots.index(1.0)] = log_tail
        if self._other_knots:
            tail_steps = _joined(rows, "tail_steps").reshape(*mask.shape, -1)
            known = self._known(log_tail)
            for place, knot in enumerate(self._other_knots):
                known.append(self._predict(place, known) + tail_steps[..., place] * TAIL_STEP)
                curve[..., self.knots.index(knot)] = known[-1]
        curve[np.isneginf(log_tail) | ~mask] = -np.inf
        return curve

    @property
    def _samples_have_levels(self) -> bool:
        """Whether samples are stored with their own probabilities, which T other than 1 needs."""
        return len(self.knots) > 1

    @property
    def _other_knots(self) -> list[float]:
        return sorted((knot for knot in self.knots if knot != 1.0), key=lambda knot: (abs(knot - 1.0), knot))

    def _checked(self, token_ids: Array) -> Tensor:
        """Stored ids, which have no sign, as int64. Raises ValueError for those outside the vocabulary."""
        if int(token_ids.max(initial=0)) >= self.vocab_size:
            raise ValueError("token ids outside the vocabulary")
        return torch.from_numpy(token_ids.astype(np.int64))

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


@cache
def _masses_of_steps() -> tuple[Array, Array]:
    """log p(head) and log p(tail) [65536] for a stored int16 of head_mass, seen as uint16."""
    stored = np.arange(2**16).astype(np.uint16).view(np.int16)
    log_odds = stored * HEAD_MASS_STEP
    log_tail = -np.logaddexp(0.0, log_odds)
    empty = stored == _NO_TAIL
    return np.where(empty, 0.0, log_odds + log_tail), np.where(empty, -np.inf, log_tail)


@dataclass(frozen=True)
class _Entries:
    """Stored entries of some rows and how many each position has."""

    rows: Rows
    shape: tuple[int, ...]
    counts_P: Array
    heads_P: Array
    """Of these, how many are of the head; the others are samples."""
    leveled_P: Array
    """Of each position so many entries have a level."""
    kept_P: Array
    """[P] bool: positions with an own place in the arrays."""
    uniform: int
    """Entries of every position with a target, 0 where positions differ."""

    @classmethod
    def of(cls, support: Support, rows: Rows, mask: Array, samples_have_levels: bool) -> _Entries:
        mask_P = mask.reshape(-1)
        uniform = 0 if support.varies else int(support.k or 0)
        counts_P = mask_P * np.int64(uniform)
        if support.varies and support.has_head:
            counts_P = counts_P + _joined(rows, "head_counts")
        heads_P = counts_P
        if support.has_samples:
            counts_P = counts_P + _joined(rows, "sample_counts").astype(np.int64)
        leveled_P = counts_P if samples_have_levels else heads_P
        return cls(rows, mask.shape, counts_P, heads_P, leveled_P, mask_P if uniform else np.ones_like(mask_P), uniform)

    @property
    def width(self) -> int:
        return self.uniform or max(int(self.counts_P.max(initial=0)), 1)

    def dense(self, name: str, counts_P: Array, start: int, stop: int) -> Array:
        """[N, stop - start]: the values of ranks start to stop, 0 where there are none, of an array with `counts_P` at each position."""
        stored_P, width = np.clip(counts_P, start, stop) - start, stop - start
        values = _joined(self.rows, name, stored_P.reshape(self.shape).sum(-1))
        if self.uniform:
            return values.reshape(-1, width)
        out = np.zeros((len(stored_P), width), values.dtype)
        out[np.arange(width) < stored_P[:, None]] = values
        return out


def _summed_bands(entries: _Entries) -> Array:
    """Levels and codes of compact entries [K, N], as 32-bit words with the level in the 8 bits above the code's.

    A level is the one before it and a step; a code the one before it and a gap, or stands for itself where a band begins.
    Sums along rank run over words turned on their side, where each is a sum of whole vectors, level and code at once.
    """
    width = entries.width
    split = min(width, _TOP_ENTRIES)
    codes_NK = entries.dense("codes", entries.counts_P, 0, width)
    words_NK = np.empty(codes_NK.shape, np.uint32)
    words_NK[:, :split] = entries.dense("top_steps", entries.leveled_P, 0, split)
    if width > split:
        words_NK[:, split:] = entries.dense("rest_steps", entries.leveled_P, split, width)
    # A step or a code too large would run into the other.
    fits = int(words_NK.max(initial=0)) <= _LAST_LEVEL and int(codes_NK.max(initial=0)) <= _CODE_BITS
    words_NK <<= _LEVEL_SHIFT
    words_NK |= codes_NK
    words_KN = _on_side(words_NK)
    steps_KN = words_KN >> _LEVEL_SHIFT
    if not fits or int(steps_KN.sum(0).max(initial=0)) > _LAST_LEVEL:
        raise ValueError("levels or codes outside the scale")
    # What goes on from one rank to the next: all bits where the step is 0, else the level's.
    steps_KN -= np.uint32(1)
    steps_KN.view(np.int32)[:] >>= 31
    steps_KN |= ~_CODE_BITS
    if width > 1:
        steps_KN[1, slice(None) if entries.uniform else entries.heads_P > 0] = ~_CODE_BITS
    mixed = np.flatnonzero(entries.counts_P > entries.heads_P)
    steps_KN[entries.heads_P[mixed], mixed] = ~_CODE_BITS
    words, going_on = list(words_KN), list(steps_KN)
    for rank in range(1, width):
        going_on[rank] &= words[rank - 1]
        words[rank] += going_on[rank]
    return words_KN


def _spread(values_NK: Array, kept_P: Array) -> Array:
    """Values of the kept positions [N, K] -> of all [P, K]; the others hold anything."""
    if len(values_NK) == len(kept_P):
        return values_NK
    if not len(values_NK):
        return np.zeros((len(kept_P), values_NK.shape[1]), values_NK.dtype)
    all_PK: Array = values_NK.take(np.maximum(np.cumsum(kept_P) - 1, 0), axis=0)
    return all_PK


def check_vocab_size(vocab_size: Any) -> None:
    """Raises ValueError for what cannot be the size of a vocabulary: token codes have 24 bits."""
    if type(vocab_size) is not int or not 1 <= vocab_size < 2**24:
        raise ValueError(f"{vocab_size!r} is not the size of a vocabulary")


def _on_side(values: Array) -> Array:
    """The transpose, as a new array: torch's copy works in blocks that stay in cache."""
    signed = values.view(values.dtype.str.replace("u", "i"))
    return torch.from_numpy(signed).t().contiguous().numpy().view(values.dtype)


def _looked_up(pairs: Array, levels: Array) -> Array:
    """What a table has for each level [...], float32 [...]."""
    flat = levels.reshape(-1)
    odd = len(flat) % 2
    if odd:
        flat = np.append(flat, np.uint8(0))
    found = pairs.take(flat.view("<u2"), mode="clip").view(np.float32)
    return found[: len(found) - odd].reshape(levels.shape)


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


def _joined(rows: Rows, name: str, lengths: Array | None = None) -> Array:
    """One stored array of all rows, end to end; of each row only so many values as `lengths` says.

    Raises ValueError where a row has fewer.
    """
    parts = [part.reshape(-1) for part in rows[name]]
    if lengths is not None:
        parts = [part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)]
        if [len(part) for part in parts] != lengths.tolist():
            raise ValueError(f"fewer {name} than positions need")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
