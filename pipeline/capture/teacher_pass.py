"""One pass of the teacher over a batch of rows: each chunk of logits is reduced to targets before the next one exists.

Shape suffixes as in pipeline/README.md: B rows, L positions of a row, N = B L, D hidden size, V vocabulary, C chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base.errors import RecipeError
from ..corpus.labels import IGNORE
from ..corpus.rows import Int64Array
from ..models.output_layer import room_for_logits
from ..models.placement import to_device
from ..models.taps import Tap
from ..models.teacher import Teacher, chunk_positions
from ..store.basis_file import StoredBasis
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support


@dataclass(frozen=True)
class PassResult:
    """Output of one pass. On a GPU its tensors may still be computing when it is returned."""

    targets: SparseTargets
    """[B, L]"""
    nats_B: Tensor
    """The teacher's loss on the labels, summed over each row, float64, nats."""
    signals: dict[str, Tensor]
    """Name -> value [B, L, ...] of each requested signal."""
    hidden_BLD: Tensor
    """The states that the output layer reads."""


class TeacherPass:
    """Runs a teacher over batches of rows and reduces its distribution to targets of one support."""

    def __init__(
        self,
        teacher: Teacher,
        support: Support,
        knots: tuple[float, ...],
        signals: Sequence[str] = (),
        basis: StoredBasis | None = None,
    ) -> None:
        """`signals` names the signals that the pass records in addition to the targets (`models.taps`); with a `basis`
        the targets' tails have their shape in it."""
        self._teacher, self._support, self._knots = teacher, support, knots
        self._tail = None if basis is None else (basis.basis(), basis.to_coordinates)
        self._tap = Tap(signals) if signals else None
        self._logits_CV: Tensor | None = None
        """The buffer for the logits of every chunk: on a CPU, fresh memory pages cost time."""

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        segment_ids: Tensor,
        labels: Tensor,
        *,
        seeds: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> PassResult:
        """Rows [B, L] -> targets, and the teacher's loss on the labels.

        `mask` [B, L] marks the positions that get a target, by default those with a label; it must include them.
        `seeds` [B, L] int64 determine the draws of supports that sample.
        """
        teacher = self._teacher
        teacher.lead((input_ids, segment_ids))
        hidden_ND = teacher.hidden(input_ids, segment_ids, self._tap).flatten(0, 1)
        labels_N = to_device(labels, hidden_ND.device).flatten()
        has_label_N = labels_N != IGNORE
        mask_N = has_label_N if mask is None else to_device(mask, hidden_ND.device).flatten()
        seeds_N = None if seeds is None else to_device(seeds.reshape(-1), hidden_ND.device)
        chunk = chunk_positions(hidden_ND)
        if self._logits_CV is None:
            self._logits_CV = room_for_logits(hidden_ND, chunk, teacher.vocab_size)
        parts, losses = [], []
        for start in range(0, len(hidden_ND), chunk):
            hidden_CD = hidden_ND[start : start + chunk]
            positions = slice(start, start + len(hidden_CD))
            logits_CV = teacher.output_layer.logits(hidden_CD, out=self._logits_CV[: len(hidden_CD)])
            logits_CV = logits_CV.to(hidden_ND.device)
            part = SparseTargets.from_logits(
                logits_CV,
                support=self._support,
                knots=self._knots,
                seed=0 if seeds_N is None else seeds_N[positions],
                mask=mask_N[positions],
            )
            # log p(label) = x(label) - x(first) + log p(first): the normaliser is known through the first entry.
            ids_C2 = torch.stack([labels_N[positions].clamp(min=0), part.token_ids[:, 0].clamp(min=0)], -1)
            x_C2 = logits_CV.gather(-1, ids_C2).double()
            log_p_C = x_C2[:, 0] - x_C2[:, 1] + part.log_probs[:, 0]
            log_p_C = torch.where(has_label_N[positions], log_p_C, 0.0)
            parts.append(replace(self._with_shape(part, hidden_CD), label_log_probs=log_p_C.float()))
            losses.append(-log_p_C)
        nats_B = torch.cat(losses).reshape(labels.shape).sum(-1)
        return PassResult(
            SparseTargets.cat(parts).unflatten(tuple(labels.shape)),
            nats_B,
            {} if self._tap is None else self._tap.values,
            hidden_ND.view(*labels.shape, -1),
        )

    def _with_shape(self, targets: SparseTargets, hidden_CD: Tensor) -> SparseTargets:
        """Targets [C] with the shape of their tails, where the pass has a basis."""
        if self._tail is None:
            return targets
        # In float64, so that the roundings of a product, which differ with the size of a batch, change no coordinate.
        basis, projection = self._tail = (
            self._tail[0].to(hidden_CD.device),
            self._tail[1].to(hidden_CD.device, torch.float64),
        )
        coordinates_CR = torch.where(targets.mask.unsqueeze(-1), projection.coordinates(hidden_CD), 0.0)
        return replace(targets, tail_coordinates=coordinates_CR.float(), basis=basis)


def check_numbers(targets: SparseTargets, nats_B: Tensor, rows_B: Sequence[int] | Int64Array, where: str) -> None:
    """Raise RecipeError for logits that are no distribution: after quantisation nobody could tell.

    `targets` [B, L] and losses of rows, which are copied from a GPU once for all their batches; `rows_B` are their numbers
    in the corpus, and `where` begins the message.
    """
    first_BL, curve_BLJ = targets.log_probs[..., 0], targets.tail_curve
    # -inf is valid: an empty tail, or the first entry of a support without a head.
    numbers_BL = (first_BL < torch.inf) & (curve_BLJ < torch.inf).all(-1)
    wrong = torch.nonzero(targets.mask & ~numbers_BL)
    if len(wrong):
        row, position = wrong[0].tolist()
        raise RecipeError(
            f"{where}: the teacher's logits are not finite numbers at {len(wrong)} of {int(targets.mask.sum())} positions, "
            f"first at position {position} of row {rows_B[row]}: set another teacher.dtype, float16 may have overflowed"
        )
    impossible = torch.nonzero(~torch.isfinite(nats_B))
    if len(impossible):
        raise RecipeError(
            f"{where}: the teacher gives a token of row {rows_B[int(impossible[0])]} probability 0: is it the right model "
            "and tokenizer for this text?"
        )
