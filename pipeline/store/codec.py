"""The codec: targets to small integers and back, the only lossy step of the pipeline.

A target has several parts. `masses` stores the head's mass and the tail curve, `coordinates` the tail's shape,
`label_log_probs` the log-probability of the label. An entry form stores token ids and levels (`levels`):
`entries_compact` in the fewest bytes, `entries_fast` for reading at memory speed; the profile of a cache chooses one.
Arrays are [row, entry] or [row, position, ...].

The head's mass is stored separately and normalises the head's entries: one likely token that is rounded by half a step
would otherwise move as much as 1 % of the probability between head and tail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ..corpus.labels import IGNORE
from ..recipe.choices import Profile
from ..targets.basis import TailBasis
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support
from .arrays import Array, Rows, RowShape, StoredRows, flat_rows
from .codebook import Codebook
from .coordinates import NAME as COORDINATES
from .coordinates import CoordinateCodec
from .entries import StoredEntries, counts_layout, counts_shapes
from .entries_compact import CompactEntries
from .entries_fast import FastEntries
from .label_log_probs import LABEL_LEVELS, LabelCodec, leveled_counts
from .levels import LEVEL_GROWTH, LEVEL_STEP
from .masses import HEAD_MASS_STEP, TAIL_STEP, MassCodec, Prediction, learn_prediction, other_knots


@dataclass(frozen=True)
class TargetCodec:
    """The stored form of the targets of one cache: a part of its manifest and of its identity."""

    support: Support
    knots: tuple[float, ...]
    vocab_size: int
    profile: Profile = "compact"
    tail_prediction: Prediction = ()
    codebook: Codebook | None = None
    coordinates: CoordinateCodec | None = None
    """The stored form of the tails' shapes; None where a tail is a bucket."""
    label_log_probs: bool = False
    """Whether the log-probabilities of labels are kept."""

    @property
    def learns(self) -> bool:
        """Whether `learn` fits anything: `fast` has nothing to fit."""
        return self.profile != "fast"

    def learn(self, targets: SparseTargets, contexts: Array, positions: int) -> TargetCodec:
        """This codec, fitted to a sample of a cache that will have `positions`.

        targets [B, L], contexts [B, L]: the token at each position.
        """
        if not self.learns:
            return self
        targets = targets.flatten()
        used_N = targets.mask.cpu().numpy()
        ids_NK, contexts_N = targets.token_ids.cpu().numpy()[used_N], contexts.reshape(-1)[used_N]
        book = Codebook.learn(ids_NK, contexts_N, self.vocab_size, max(positions / max(len(ids_NK), 1), 1.0))
        return replace(self, tail_prediction=learn_prediction(targets), codebook=book)

    def learned_as(self, other: TargetCodec) -> TargetCodec:
        """This codec with what another one has learned, as far as it has a place for that."""
        coordinates, theirs = self.coordinates, other.coordinates
        if coordinates is not None and theirs is not None:
            coordinates = replace(coordinates, basis=theirs.basis)
        return replace(self, tail_prediction=other.tail_prediction, codebook=other.codebook, coordinates=coordinates)

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
            "coordinates": None if self.coordinates is None else self.coordinates.to_json(),
            "label_log_probs": self.label_log_probs,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], codebook: Codebook | None, basis: TailBasis | None) -> TargetCodec:
        """Raises ValueError for a codec that this version does not know, or another codebook or basis than it names."""
        check_vocab_size(value["vocab_size"])
        codec = cls(
            Support(**value["support"]),
            tuple(float(knot) for knot in value["knots"]),
            int(value["vocab_size"]),
            value["profile"],
            tuple(tuple(float(weight) for weight in weights) for weights in value["tail_prediction"]),
            codebook,
            None if basis is None else CoordinateCodec.from_json(value["coordinates"], basis),
            label_log_probs=value["label_log_probs"],
        )
        if codec.to_json() != value or codec.profile not in get_args(Profile) or 1.0 not in codec.knots:
            raise ValueError(f"unknown target codec {value.get('name')!r} version {value.get('version')!r}")
        codec.support.check(codec.vocab_size)
        lengths = [2 + place for place in range(len(other_knots(codec.knots)))]
        if codec.tail_prediction and [len(weights) for weights in codec.tail_prediction] != lengths:
            raise ValueError("its tail prediction does not fit its knots")
        return codec

    def layout(self) -> dict[str, str]:
        """Name -> dtype of every stored array."""
        parts = self._masses, self.coordinates, self._labels
        others = {name: dtype for part in parts if part is not None for name, dtype in part.layout().items()}
        return self._entries.layout() | counts_layout(self.support) | others

    def shapes(self, row_length: int) -> dict[str, RowShape]:
        """Name -> shape of a row of every stored array, in the order of `layout`."""
        entries: dict[str, RowShape] = dict.fromkeys(self._entries.layout())
        if not self.support.varies:
            # Filled up to the values of a row with a target at every position: known before the first row, and no axis
            # is empty.
            k = int(self.support.k or 0)
            entries = {name: (max(row_length * width, 1),) for name, width in self._entries.widths(k, k).items()}
        parts = self._masses, self.coordinates, self._labels
        others = {name: shape for part in parts if part is not None for name, shape in part.shapes(row_length).items()}
        return entries | counts_shapes(self.support, row_length) | others

    def encode(self, targets: SparseTargets, contexts: Array, labels: Array | None = None) -> Rows:
        """Targets [B, L], and at each position [B, L] its token and its label -> the rows of every array.

        Raises ValueError for targets of other knots or another vocabulary, and where log-probabilities of labels are to
        be kept and there are none.
        """
        if (targets.knots, targets.vocab_size) != (self.knots, self.vocab_size):
            raise ValueError(
                f"targets of knots {targets.knots} and vocabulary {targets.vocab_size}: the codec has {self.knots} "
                f"and {self.vocab_size}"
            )
        rows, counts, draws_E = self._entries.encode(targets, contexts.reshape(-1), self._samples_have_levels)
        masses, log_tail = self._masses.encode(targets)
        rows |= counts.rows(self.support, draws_E) | flat_rows(masses)
        if self.coordinates is not None:
            rows |= flat_rows(self.coordinates.encode(targets))
        if self._labels is not None:
            if labels is None:
                raise ValueError("a codec with label_log_probs needs the labels")
            leveled = leveled_counts(targets, self._samples_have_levels)
            rows |= flat_rows(self._labels.encode(targets, labels, log_tail, leveled))
        return {name: [row.astype(dtype) for row in rows[name]] for name, dtype in self.layout().items()}

    def decode(self, rows: StoredRows, contexts: Array, mask: Array, labels: Array | None = None) -> SparseTargets:
        """Stored rows, and at each position [B, L] its token and whether it has a target -> targets [B, L].

        Their log-probabilities of labels need the labels [B, L], and are None without.

        Raises ValueError for numbers that no encoder writes.
        """
        shape = mask.shape
        entries = StoredEntries.of(rows, self.layout(), self.support, mask, self._samples_have_levels)
        draws_NK = entries.draws() if self.support.has_samples else None
        draws = None if draws_NK is None else draws_NK.sum(-1).reshape(shape)
        head_mass = entries.fixed("head_mass").reshape(shape) if self.support.has_head else None
        log_head, log_tail = self._masses.log_masses(head_mass, shape, draws)

        token_ids_NK = np.empty((mask.size, entries.width), np.int64)
        log_probs_NK = np.empty((mask.size, entries.width), np.float32)
        self._entries.decode(entries, contexts.reshape(-1), log_head.reshape(-1), token_ids_NK, log_probs_NK)
        if draws_NK is not None and draws is not None and not self._samples_have_levels:
            # Such a sample has its share of the tail mass instead of its own probability.
            share_N = (log_tail - np.log(np.maximum(draws, 1))).reshape(-1)
            log_weights_NK = np.log(np.maximum(draws_NK, 1)) + share_N[:, None]
            log_probs_NK = np.where(draws_NK > 0, log_weights_NK.astype(np.float32), log_probs_NK)
        others = len(self.knots) - 1
        tail_steps = entries.fixed("tail_steps", others) if others else None
        coordinates, basis = None, None
        if self.coordinates is not None:
            basis = self.coordinates.basis
            steps = entries.fixed(COORDINATES, self.coordinates.rank)
            z_NR = self.coordinates.decode(steps, token_ids_NK, entries.heads_N, mask.reshape(-1))
            coordinates = torch.from_numpy(z_NR).view(*shape, -1)
        label_log_probs = None
        if self._labels is not None and labels is not None:
            of_labels = np.where(mask, labels, IGNORE).reshape(-1), log_tail.reshape(-1), token_ids_NK, log_probs_NK
            log_p_N = self._labels.decode(entries.fixed(LABEL_LEVELS), *of_labels, entries.leveled_N)
            label_log_probs = torch.from_numpy(log_p_N).view(shape)

        def of_entries(values_NK: Array) -> Tensor:
            return torch.from_numpy(values_NK).view(*shape, entries.width)

        return SparseTargets(
            of_entries(token_ids_NK),
            of_entries(log_probs_NK),
            torch.from_numpy(self._masses.decode_curve(tail_steps, log_tail, mask)),
            torch.from_numpy(mask),
            self.knots,
            self.vocab_size,
            None if draws_NK is None else of_entries(draws_NK),
            tail_coordinates=coordinates,
            basis=basis,
            label_log_probs=label_log_probs,
        )

    @property
    def _samples_have_levels(self) -> bool:
        """Samples have levels where students may train at T other than 1."""
        return len(self.knots) > 1

    @cached_property
    def _entries(self) -> CompactEntries | FastEntries:
        """The one place where the profile chooses a form."""
        fast = self.profile == "fast"
        return FastEntries(self.vocab_size) if fast else CompactEntries(self.vocab_size, self.codebook)

    @cached_property
    def _labels(self) -> LabelCodec | None:
        return LabelCodec(self.profile) if self.label_log_probs else None

    @cached_property
    def _masses(self) -> MassCodec:
        return MassCodec(self.support, self.knots, self.tail_prediction)


def check_vocab_size(vocab_size: Any) -> None:
    """Raises ValueError for a number that is no vocabulary size: token codes have 24 bits."""
    if type(vocab_size) is not int or not 1 <= vocab_size < 2**24:
        raise ValueError(f"{vocab_size!r} is not the size of a vocabulary")
