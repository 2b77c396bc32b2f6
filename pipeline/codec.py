"""From targets to small integers and back: the lossy step, and the only one.

Two profiles keep the same numbers in different forms: `compact` for few bytes, `fast` for reading at memory speed. Entries
of a row stand end to end, position after position, head before samples; arrays are [row, entry] or [row, position, ...].

    head_counts, sample_counts   entries of each position, where the support varies
    codes | token_ids            compact: codes of a codebook, within a band ascending and differenced; fast: the ids
    top_steps, rest_steps |      compact: level of each entry, differenced along rank, the first 8 of a position apart from the
      levels                     others, whose differences are mostly 0; fast: the level itself
    draws                        how often each sample was drawn
    head_mass                    log-odds of the head's mass, in steps of 1/64 nat
    tail_steps                   F(beta) at the knots other than 1, in steps of 1/128 nat about a linear prediction from those known

Log-probabilities are rounded to *levels*: x nats below the first head entry, or below 0 where there is none, is level log(1 + b x / a) / b, so that steps grow from
a where tokens are likely to a + b x where they are not. An error e_v in log p_v costs about 1/2 sum p_v e_v^2 of KL; with
a = 0.045 and b = 0.033 that is 4e-4 at T = 1 and less above. The head's mass is stored by itself and sets the sum right: one
likely token rounded by half a step would else move as much as 1 % of the probability between head and tail.

Entries of one level form a *band*. Their order says nothing, so they are sorted by code: log2(n!) bits less for a band of n, 12
bytes of 76 at k = 64. The first entry is a band of its own, so that the teacher's choice survives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

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
        rows, length = targets.mask.shape
        token_ids = targets.token_ids.flatten(0, 1).cpu().numpy()
        used = token_ids >= 0
        ids, log_probs = token_ids[used], targets.log_probs.flatten(0, 1).cpu().numpy()[used].astype(np.float64)
        counts = used.sum(-1)
        head_counts = counts if targets.draws is None else targets.head_mask.flatten(0, 1).sum(-1).cpu().numpy()
        arrays: Arrays = {}
        entries_of_row = counts.reshape(rows, length).sum(-1)

        starts = np.cumsum(counts) - counts
        firsts = starts[counts > 0]
        reference = np.where(head_counts[counts > 0] > 0, log_probs[firsts], 0.0)
        below = np.maximum(np.repeat(reference, counts[counts > 0]) - log_probs, 0.0)
        levels = np.rint(np.log1p(LEVEL_GROWTH / LEVEL_STEP * below) / LEVEL_GROWTH)
        levels = np.minimum(levels, _LAST_LEVEL).astype(np.int64)
        drawn = None if targets.draws is None else targets.draws.flatten(0, 1).cpu().numpy()[used]
        if self.profile == "fast":
            arrays["token_ids"] = _by_row(ids, entries_of_row)
            arrays["levels"] = _by_row(levels, entries_of_row)
        else:
            rank = np.arange(len(ids)) - np.repeat(starts, counts)
            steps = np.diff(levels, prepend=0)
            steps[firsts] = levels[firsts]
            filled = counts > 0
            band_starts = _band_starts(steps, firsts, counts[filled], head_counts[filled])
            context = np.repeat(contexts.reshape(-1), counts)
            codes = ids if self.codebook is None else self.codebook.encode(ids, context)
            key = (np.cumsum(band_starts) << 24) + codes
            if drawn is None:
                codes = np.sort(key) & 0xFFFFFF
            else:
                order = np.argsort(key)
                codes, drawn = codes[order], drawn[order]
            gaps = np.where(band_starts, codes, np.diff(codes, prepend=0))
            in_top = rank < _TOP_ENTRIES
            top_of_row = np.minimum(counts, _TOP_ENTRIES).reshape(rows, length).sum(-1)
            arrays["codes"] = _by_row(gaps, entries_of_row)
            arrays["top_steps"] = _by_row(steps[in_top], top_of_row)
            arrays["rest_steps"] = _by_row(steps[~in_top], entries_of_row - top_of_row)
        if drawn is not None:
            samples = (counts - head_counts).reshape(rows, length)
            arrays["sample_counts"] = samples
            arrays["draws"] = _by_row(drawn[drawn > 0], samples.sum(-1))
        if self.support.varies and self.support.has_head:
            arrays["head_counts"] = head_counts.reshape(rows, length)

        mask = targets.mask.cpu().numpy()
        curve = np.where(mask[..., None], targets.tail_curve.cpu().numpy().astype(np.float64), 0.0)
        if self.support.has_head:
            on_head = torch.where(targets.head_mask, targets.log_probs, -torch.inf)
            log_odds = torch.logsumexp(on_head, -1).cpu().numpy().astype(np.float64) - curve[..., self.knots.index(1.0)]
            log_odds = np.where(mask, log_odds, 0.0)
            mass = np.clip(np.rint(np.minimum(log_odds, 1e6) / HEAD_MASS_STEP), -_LARGEST, _LARGEST)
            arrays["head_mass"] = np.where(np.isposinf(log_odds), _NO_TAIL, mass)
        if self._other_knots:
            known = [np.ones(mask.shape), self._log_masses(arrays.get("head_mass"), mask.shape)[1]]
            columns = []
            for place, knot in enumerate(self._other_knots):
                predicted = self._predict(place, known)
                value = np.where(
                    np.isfinite(curve[..., self.knots.index(knot)]), curve[..., self.knots.index(knot)], predicted
                )
                step = np.clip(np.rint((value - predicted) / TAIL_STEP), -_LARGEST, _LARGEST)
                step = np.where(mask, step, 0.0)
                columns.append(step)
                known.append(predicted + step * TAIL_STEP)
            arrays["tail_steps"] = np.stack(columns, -1)
        return {name: arrays[name].astype(dtype) for name, dtype in self.layout().items()}

    def decode(self, rows: Rows, contexts: Array, mask: Array) -> SparseTargets:
        """Stored arrays of B rows, the token at each position [B, L] and where there are targets [B, L] -> targets [B, L].

        Arrays have P = B L positions and K entries, used or not. Sums along rank run over arrays turned on their side,
        [K, P], where each is K sums of whole vectors.
        """
        shape, mask_P = mask.shape, mask.reshape(-1)
        head_counts = _joined(rows, "head_counts") if self.support.varies and self.support.has_head else None
        sample_counts = _joined(rows, "sample_counts").astype(np.int64) if self.support.has_samples else None
        uniform = 0 if self.support.varies else int(self.support.k or 0)
        counts_P = mask_P * np.int64(uniform)
        for part in (head_counts, sample_counts):
            if part is not None:
                counts_P = counts_P + part
        heads_P = counts_P if sample_counts is None else counts_P - sample_counts
        width = uniform or max(int(counts_P.max(initial=0)), 1)
        split = min(width, _TOP_ENTRIES)

        def dense(name: str, start: int, stop: int) -> Array:
            """[P, stop - start]: the values of ranks start to stop, 0 where there are none."""
            stored_P = np.clip(counts_P, start, stop) - start
            values = _joined(rows, name, stored_P.reshape(shape).sum(-1))
            out = np.zeros((len(mask_P), stop - start), values.dtype)
            if uniform:
                out[mask_P] = values.reshape(-1, stop - start)
            else:
                out[np.arange(stop - start) < stored_P[:, None]] = values
            return out

        if self.profile == "fast":
            levels_PK = dense("levels", 0, width)
            ids_PK = torch.from_numpy(dense("token_ids", 0, width).astype(np.int64))
        else:
            top_PK = dense("top_steps", 0, split)
            steps_PK = np.concatenate([top_PK, dense("rest_steps", split, width)], 1) if width > split else top_PK
            levels_KP = _on_side(steps_PK)
            codes_KP = _on_side(dense("codes", 0, width))
            # A code is the one before it and a gap, or stands for itself where a band begins.
            goes_on_KP = (levels_KP == 0).astype(codes_KP.dtype)
            goes_on_KP[1:2] = 0
            if sample_counts is not None:
                mixed = np.flatnonzero(sample_counts)
                goes_on_KP[heads_P[mixed], mixed] = 0
            before_P = np.empty_like(codes_KP[0])
            levels, codes, goes_on = list(levels_KP), list(codes_KP), list(goes_on_KP)
            for rank in range(1, width):
                np.multiply(codes[rank - 1], goes_on[rank], before_P)
                np.add(codes[rank], before_P, codes[rank])
                np.add(levels[rank], levels[rank - 1], levels[rank])
            if int(levels[-1].max(initial=0)) > _LAST_LEVEL:
                raise ValueError("levels outside the scale")
            levels_PK = _on_side(levels_KP).astype(np.uint8)
            codes_PK = _on_side(codes_KP).astype(np.int32)
            ids_PK = (
                torch.from_numpy(codes_PK)
                if self.codebook is None
                else self.codebook.decode(codes_PK, contexts.reshape(-1))
            )

        ranks_K = np.arange(width)
        head_mass = _joined(rows, "head_mass").reshape(shape) if self.support.has_head else None
        log_head, log_tail = self._log_masses(head_mass, shape)
        log_probs_PK = torch.from_numpy(_looked_up(_LOG_PROB_PAIRS, levels_PK))
        if self.support.has_head:
            p_PK = torch.from_numpy(_looked_up(_PROB_PAIRS, levels_PK))
            if not uniform:
                p_PK *= torch.from_numpy(ranks_K < heads_P[:, None])
            mass_P = p_PK.sum(-1).numpy()
            # Where there are samples only, there is nothing to set right.
            offset_P = np.where(heads_P > 0, log_head.reshape(-1) - np.log(np.where(mass_P > 0, mass_P, 1.0)), 0.0)
            log_probs_PK += torch.from_numpy(offset_P.astype(np.float32)).unsqueeze(-1)
        # A codebook has refused what is not in its table.
        if self.codebook is None and len(ids_PK) and not 0 <= int(ids_PK.min()) <= int(ids_PK.max()) < self.vocab_size:
            raise ValueError("token ids outside the vocabulary")
        ids_PK = ids_PK.long()
        if uniform:
            empty_P = torch.from_numpy(np.flatnonzero(~mask_P))
            ids_PK.index_fill_(0, empty_P, -1)
            log_probs_PK.index_fill_(0, empty_P, -math.inf)
        else:
            unused_PK = torch.from_numpy(ranks_K >= counts_P[:, None])
            ids_PK.masked_fill_(unused_PK, -1)
            log_probs_PK.masked_fill_(unused_PK, -math.inf)

        curve = np.empty((*shape, len(self.knots)), np.float32)
        curve[..., self.knots.index(1.0)] = log_tail
        if self._other_knots:
            tail_steps = _joined(rows, "tail_steps").reshape(*shape, -1)
            known = [np.ones(shape), log_tail]
            for place, knot in enumerate(self._other_knots):
                known.append(self._predict(place, known) + tail_steps[..., place] * TAIL_STEP)
                curve[..., self.knots.index(knot)] = known[-1]
        curve[np.isneginf(log_tail)] = -np.inf
        curve[~mask] = -np.inf

        draws = None
        if sample_counts is not None:
            drawn_PK = np.zeros((len(mask_P), width), np.int64)
            is_sample_PK = (ranks_K >= heads_P[:, None]) & (ranks_K < counts_P[:, None])
            drawn_PK[is_sample_PK] = _joined(rows, "draws", sample_counts.reshape(shape).sum(-1))
            draws = torch.from_numpy(drawn_PK).view(*shape, width)
        return SparseTargets(
            ids_PK.view(*shape, width),
            log_probs_PK.view(*shape, width),
            torch.from_numpy(curve),
            torch.from_numpy(mask),
            self.knots,
            self.vocab_size,
            draws,
        )

    @property
    def _other_knots(self) -> list[float]:
        return sorted((knot for knot in self.knots if knot != 1.0), key=lambda knot: (abs(knot - 1.0), knot))

    def _predict(self, place: int, known: list[Array]) -> Array:
        """F at the knot in this place from a constant and what is known of it."""
        if not self.tail_prediction:
            return np.zeros(known[0].shape)
        total = np.zeros(known[0].shape)
        for weight, values in zip(self.tail_prediction[place], known, strict=False):
            total = total + weight * np.where(np.isfinite(values), values, 0.0)
        return total

    def _log_masses(self, head_mass: Array | None, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """log of the head's and the tail's mass at T = 1, from stored log-odds; without a head all is tail."""
        if head_mass is None:
            return np.full(shape, -np.inf), np.zeros(shape)
        log_odds = head_mass.astype(np.float64) * HEAD_MASS_STEP
        log_tail = -np.logaddexp(0.0, log_odds)
        empty = head_mass == _NO_TAIL
        return np.where(empty, 0.0, log_odds + log_tail), np.where(empty, -np.inf, log_tail)


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
    """[n] bool: where a level begins, or the first or second entry of a position, or its first sample."""
    begins: Array = steps_n > 0
    begins[starts_N] = True
    begins[starts_N[counts_N > 1] + 1] = True
    mixed = counts_N > heads_N
    begins[(starts_N + heads_N)[mixed]] = True
    return begins


def _by_row(values: Array, lengths: Array) -> Array:
    """Values of all rows end to end -> [R, longest], zeros behind the shorter ones. Never empty."""
    longest = max(int(lengths.max(initial=0)), 1)
    out = np.zeros((len(lengths), longest), values.dtype)
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
