"""Knots of the tail curve: the inverse temperatures at which a cache stores the tail mass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def inverse_temperature(temperature: float, knots: Sequence[float]) -> float:
    """beta = 1/T, rounded to the nearest knot where the two agree to 1e-9.

    Raises ValueError where T is not a positive finite number, where beta lies above the largest knot, and where the
    curve has one knot and beta is another number.
    """
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature {temperature} must be a positive number")
    beta = 1.0 / temperature
    if beta > max(knots) + 1e-12:
        raise ValueError(
            f"temperature {temperature:g} needs the tail mass at inverse temperature {beta:g}, but the cache stores it "
            f"only up to {max(knots):g}: add {beta:g} to cache.knots and cache again, or use T >= {1 / max(knots):g}"
        )
    if len(knots) == 1 and abs(beta - knots[0]) > 1e-9:
        raise ValueError(
            f"temperature {temperature:g} needs the tail mass at inverse temperature {beta:g}, but these targets have it "
            f"at {knots[0]:g} only (imported top-k log-probabilities, or the mean of several teachers): "
            f"use T = {1 / knots[0]:g}"
        )
    nearest = min(knots, key=lambda knot: abs(knot - beta))
    return nearest if abs(nearest - beta) < 1e-9 else beta


def serves(temperature: float, knots: Sequence[float]) -> bool:
    """Whether students can be trained at this temperature from a cache with these knots."""
    try:
        inverse_temperature(temperature, knots)
    except ValueError:
        return False
    return True


def curve_at(tail_curve: Tensor, knots: Sequence[float], beta: float, left_out: Tensor) -> Tensor:
    """F(beta) [...] of a tail curve [..., J], by Lagrange interpolation through (0, log|R|) and the knots.

    left_out [...]: |R|, the number of tokens in the tail.
    """
    if beta in knots:
        return tail_curve[..., knots.index(beta)]
    nodes = (0.0, *knots)
    basis = [math.prod((beta - y) / (x - y) for y in nodes if y != x) for x in nodes]
    # An empty tail has F = -inf at every knot; a sum of +-inf terms would be NaN.
    empty = torch.isneginf(tail_curve[..., -1])
    curve = torch.where(empty.unsqueeze(-1), 0.0, tail_curve)
    value = basis[0] * left_out.clamp(min=1).to(curve.dtype).log()
    for weight, point in zip(basis[1:], curve.unbind(-1), strict=True):
        value = value + weight * point
    return torch.where(empty, -math.inf, value)


def common_base(knots: Sequence[float]) -> tuple[float, list[int]]:
    """The largest base of which every knot is a multiple of at most 16, and the multiples; (1, []) if there is none."""
    for parts in (1, 2, 3):
        base = min(knots) / parts
        multiples = [round(knot / base) for knot in knots]
        if max(multiples) <= 16 and all(abs(m * base - knot) < 1e-12 for m, knot in zip(multiples, knots, strict=True)):
            return base, multiples
    return 1.0, []
