"""Imported sequences packed into rows, and their candidates as sparse targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..base.errors import RecipeError
from ..corpus.labels import IGNORE, next_token_labels
from ..store.codec import TargetCodec
from ..targets.basis import TailBasis
from ..targets.sparse_targets import SparseTargets
from .sequence import TokenSequence

_SMALLEST_TAIL = 2.0**-24
"""Resolution of a tail: an engine's float32 log-probabilities are right to a few roundings of the largest one."""
_MASS_TOLERANCE = 0.01
"""More than rounding: bf16 log-probabilities near 0 are off by up to 2^-9."""


class ImportedRow:
    """One packed row: sequences end to end, then padding outside the loss mask."""

    COLUMNS = ("input_ids", "segment_ids", "loss_mask")

    def __init__(self, length: int, padding: int) -> None:
        self.input_ids = np.full(length, padding, np.int32)
        self.segment_ids = np.zeros(length, np.int32)
        self.loss_mask = np.zeros(length, np.int32)
        self.candidates: list[list[tuple[float, int]] | None] = [None] * length
        self.tail_curve: list[list[float | None] | None] = [None] * length
        self.tail_coordinates: list[list[float] | None] = [None] * length
        self.label_log_probs: list[float | None] = [None] * length
        self.where = [""] * length
        """Of every position, for messages."""
        self.cut = 0
        """Tokens beyond the row's end, which are lost."""

    def targets(self, codec: TargetCodec, basis: TailBasis | None = None) -> SparseTargets:
        """Targets [L]: the best candidates where there is a label; without a tail curve that of `tail_at_one`.

        With a basis the tails have shapes, from the coordinates of every position. Raises RecipeError for a position
        without them, and as `tail_at_one`.
        """
        length, k = len(self.input_ids), codec.support.entry_limit
        token_ids = torch.full((length, k), -1)
        log_probs = torch.full((length, k), -math.inf)
        tail_curve = torch.full((length, len(codec.knots)), -math.inf)
        coordinates = None if basis is None else torch.zeros(length, basis.rank)
        mask = torch.from_numpy(next_token_labels(self.input_ids, self.segment_ids, self.loss_mask) != IGNORE)
        for position in torch.nonzero(mask).squeeze(-1).tolist():
            candidates = self.candidates[position]
            assert candidates is not None
            best = sorted(candidates, key=lambda entry: -entry[0])[:k]
            log_probs[position, : len(best)] = torch.tensor([log_p for log_p, _ in best])
            token_ids[position, : len(best)] = torch.tensor([token for _, token in best])
            curve = self.tail_curve[position]
            if curve is not None and len(codec.knots) == len(curve):
                tail_curve[position] = torch.tensor([-math.inf if f is None else f for f in curve])
            else:
                tail_curve[position] = tail_at_one(best, codec.vocab_size, self.where[position])
            if coordinates is not None:
                of_position = self.tail_coordinates[position] or []
                if len(of_position) != coordinates.shape[-1]:
                    raise RecipeError(
                        f"{self.where[position]}: {len(of_position)} tail_coordinates for a tail basis of rank "
                        f"{coordinates.shape[-1]}: export the cache again"
                    )
                coordinates[position] = torch.tensor(of_position)
        return SparseTargets(
            token_ids,
            log_probs,
            tail_curve,
            mask,
            codec.knots,
            codec.vocab_size,
            tail_coordinates=coordinates,
            label_log_probs=self._label_log_probs(mask),
            basis=basis,
        )

    def _label_log_probs(self, mask: torch.Tensor) -> torch.Tensor | None:
        """[L] of the labels, 0 elsewhere; None where some are unknown."""
        known = [value for value, used in zip(self.label_log_probs, mask.tolist(), strict=True) if used]
        values = [value for value in known if value is not None]
        return torch.zeros(len(mask)).masked_scatter(mask, torch.tensor(values)) if len(values) == len(known) else None

    def nats(self) -> float:
        """The teacher's loss on the labels. Where a label's own log-probability is unknown and it is no candidate, it
        counts as the least likely candidate: a lower bound."""
        labels = next_token_labels(self.input_ids, self.segment_ids, self.loss_mask)
        total = 0.0
        for position in np.flatnonzero(labels != IGNORE):
            candidates = self.candidates[position] or []
            known = [log_p for log_p, token in candidates if token == labels[position]]
            if (of_label := self.label_log_probs[position]) is not None:
                known = [of_label]
            total -= known[0] if known else min(log_p for log_p, _ in candidates)
        return total


def tail_at_one(best: Sequence[tuple[float, int]], vocab_size: int, where: str) -> float:
    """log of the mass outside `best` at T = 1, from (log-probability, id) pairs, most probable first.

    One minus the head, which float32 log-probabilities resolve to about 1e-7; at most the mass of all tokens left out
    if each had the probability of the last one kept. Raises RecipeError where the head's mass is above 1: the values
    are not log-probabilities of a softmax at T = 1.
    """
    mass = math.fsum(math.exp(log_p) for log_p, _ in best)
    if mass > 1 + _MASS_TOLERANCE:
        raise RecipeError(
            f"{where}: the probabilities sum to {mass:.3g}: they are not log-probabilities at T = 1 (vLLM: leave "
            "logprobs_mode at raw_logprobs)"
        )
    left_out = vocab_size - len(best)
    if left_out <= 0:
        return -math.inf
    largest = math.log(left_out) + best[-1][0]
    return min(math.log(max(1 - mass, _SMALLEST_TAIL)), largest)


def pack_rows(sequences: Iterable[TokenSequence], length: int, padding: int) -> Iterator[ImportedRow]:
    """Pack sequences in order, as many into a row as fit whole; a sequence longer than a row loses its end."""
    row = ImportedRow(length, padding)
    filled = segment = 0
    for sequence in sequences:
        count = min(len(sequence.token_ids), length)
        if filled + count > length:
            yield row
            row, filled, segment = ImportedRow(length, padding), 0, 0
        at = slice(filled, filled + count)
        row.input_ids[at] = sequence.token_ids[:count]
        segments = sequence.segment_ids[:count] if sequence.segment_ids is not None else [0] * count
        row.segment_ids[at] = np.asarray(segments) + segment
        known = [candidates is not None for candidates in sequence.candidates[: count - 1]]
        row.loss_mask[filled + 1 : filled + count] = known
        if sequence.labels is not None:
            row.loss_mask[filled + 1 : filled + count] &= np.asarray(sequence.labels[: count - 1]) != IGNORE
        row.candidates[at] = sequence.candidates[:count]
        for name in ("tail_curve", "tail_coordinates", "label_log_probs"):
            values = getattr(sequence, name)
            getattr(row, name)[at] = [None] * count if values is None else values[:count]
        row.where[at] = [sequence.where] * count
        row.cut += len(sequence.token_ids) - count
        filled += count
        segment = int(row.segment_ids[filled - 1]) + 1
        row.segment_ids[filled:] = segment
    if filled:
        yield row
