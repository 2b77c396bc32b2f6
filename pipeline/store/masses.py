"""The head's mass and the tail curve as small integers.

    head_mass    log-odds of the head's mass at T = 1, in steps of 1/64 nat; for `threshold` relative to the value
                 that the number of draws implies
    tail_steps   F(beta) at the knots other than 1, in steps of 1/64 nat relative to a linear prediction

The prediction of each knot is linear in F at the knots before it, F(1) first, the others by their distance from 1; its
weights are fitted to a sample of a cache's positions.

Shapes: B rows, L positions, N = B L, J knots other than 1, M terms of a prediction (a constant, F(1), F at the knots
before).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support
from .arrays import Array, Arrays, RowShape
from .entry_kernels import curve_of_steps

HEAD_MASS_STEP = 1 / 64
TAIL_STEP = 1 / 64
_NO_TAIL = 32767
_LARGEST = 32766
_LEARN_POSITIONS = 2**17

Prediction = tuple[tuple[float, ...], ...]
"""For each knot other than 1, nearest first: the weights of a constant, of F(1), and of F at the knots before it."""


def other_knots(knots: Sequence[float]) -> list[float]:
    """The knots other than 1, nearest first."""
    return sorted((knot for knot in knots if knot != 1.0), key=lambda knot: (abs(knot - 1.0), knot))


def learn_prediction(targets: SparseTargets) -> Prediction:
    """Least squares over those positions [N] of a sample that have a tail."""
    curve = targets.tail_curve.cpu().numpy().astype(np.float64)[targets.mask.cpu().numpy()][:_LEARN_POSITIONS]
    curve = curve[np.isfinite(curve).all(-1)]
    known = [np.ones(len(curve)), curve[:, targets.knots.index(1.0)]]
    prediction = []
    for knot in other_knots(targets.knots):
        wanted = curve[:, targets.knots.index(knot)]
        # Too few positions would be fitted exactly and say nothing about the others.
        enough = len(curve) > 8 * len(known)
        weights = np.linalg.lstsq(np.stack(known, 1), wanted, rcond=None)[0] if enough else np.zeros(len(known))
        # Rounded, so that the weights do not depend on a library's order of summation; the constant corrects the mean.
        slopes = [round(float(weight), 3) + 0.0 for weight in weights[1:]]
        rest = wanted - sum(slope * column for slope, column in zip(slopes, known[1:], strict=True))
        constant = round(float(rest.mean()), 3) + 0.0 if enough else 0.0
        prediction.append((constant, *slopes))
        known.append(wanted)
    return tuple(prediction)


@dataclass(frozen=True)
class MassCodec:
    """Encodes and decodes the head's mass and the tail curve of one cache."""

    support: Support
    knots: tuple[float, ...]
    prediction: Prediction

    def layout(self) -> dict[str, str]:
        """Name -> dtype of the stored arrays."""
        arrays = {"head_mass": self.support.has_head, "tail_steps": len(self.knots) > 1}
        return {name: "int16" for name, stored in arrays.items() if stored}

    def shapes(self, row_length: int) -> dict[str, RowShape]:
        """Name -> shape of a row of the stored arrays."""
        shapes: dict[str, RowShape] = {
            "head_mass": (row_length,),
            "tail_steps": (row_length, len(other_knots(self.knots))),
        }
        return {name: shapes[name] for name in self.layout()}

    def encode(self, targets: SparseTargets) -> tuple[Arrays, Array]:
        """Targets [B, L] -> head_mass [B, L] and tail_steps [B, L, J]; and log p(R) [B, L] as it is decoded."""
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
        log_tail = self.log_masses(arrays.get("head_mass"), mask.shape, draws)[1]
        if others := other_knots(self.knots):
            known = [np.ones(log_tail.shape), np.where(np.isneginf(log_tail), 0.0, log_tail)]
            columns = []
            for place, knot in enumerate(others):
                predicted, value = np.zeros(log_tail.shape), curve[..., self.knots.index(knot)]
                for weight, values in zip(self.prediction[place] if self.prediction else (), known, strict=False):
                    predicted += weight * values
                value = np.where(np.isfinite(value), value, predicted)
                step = np.where(mask, np.clip(np.rint((value - predicted) / TAIL_STEP), -_LARGEST, _LARGEST), 0.0)
                columns.append(step)
                known.append(predicted + step * TAIL_STEP)
            arrays["tail_steps"] = np.stack(columns, -1)
        return arrays, log_tail

    def log_masses(self, head_mass: Array | None, shape: tuple[int, ...], draws: Array | None) -> tuple[Array, Array]:
        """log of the head's and the tail's mass at T = 1, both of `shape`, from stored log-odds and counts of draws.

        Without a head all mass is in the tail.
        """
        if head_mass is None:
            return np.full(shape, -np.inf), np.zeros(shape)
        if draws is not None:
            steps = head_mass.astype(np.float64)
            log_odds = np.where(steps == _NO_TAIL, np.inf, steps * HEAD_MASS_STEP + self._expected_log_odds(draws))
            return -np.logaddexp(0.0, -log_odds), -np.logaddexp(0.0, log_odds)
        # By table: an int16 has 65,536 values.
        log_head, log_tail = _masses_of_steps()
        steps = head_mass.astype(np.int16).view(np.uint16)
        return log_head[steps], log_tail[steps]

    def decode_curve(self, tail_steps: Array | None, log_tail: Array, mask: Array) -> Array:
        """tail_steps [N J] and F(1) [B, L] -> F at every knot, float32 [B, L, knots]; -inf where there is no tail."""
        curve = np.empty((mask.size, len(self.knots)), np.float32)
        weights_JM, places_J = self._weights
        steps_NJ = np.zeros((mask.size, 0), np.int16) if tail_steps is None else tail_steps.reshape(mask.size, -1)
        log_tail_N = np.where(mask, log_tail, -np.inf).reshape(-1)
        curve_of_steps(steps_NJ, TAIL_STEP, log_tail_N, weights_JM, places_J, self.knots.index(1.0), curve)
        return curve.reshape(*mask.shape, -1)

    @cached_property
    def _weights(self) -> tuple[Array, Array]:
        """Weights of the predictions [J, M], and the places of their knots in the curve [J]."""
        others = other_knots(self.knots)
        weights_JM = np.zeros((len(others), len(others) + 1))
        for place, weights in enumerate(self.prediction):
            weights_JM[place, : len(weights)] = weights
        return weights_JM, np.array([self.knots.index(knot) for knot in others], np.int64)

    def _expected_log_odds(self, draws: Array | None) -> Array | float:
        """The head's log-odds that n draws [...] imply: `threshold` makes n of a tail mass of (n - 1) tau to n tau."""
        if draws is None or self.support.tau is None:
            return 0.0
        tail = np.minimum(np.maximum(draws - 0.5, 0.5) * self.support.tau, 1.0 - 0.25 * self.support.tau)
        return np.log1p(-tail) - np.log(tail)


@cache
def _masses_of_steps() -> tuple[Array, Array]:
    """log p(head) and log p(tail) [65536] by a stored int16 of head_mass, viewed as uint16."""
    stored = np.arange(2**16).astype(np.uint16).view(np.int16)
    log_odds = stored * HEAD_MASS_STEP
    log_tail = -np.logaddexp(0.0, log_odds)
    empty = stored == _NO_TAIL
    return np.where(empty, 0.0, log_odds + log_tail), np.where(empty, -np.inf, log_tail)
