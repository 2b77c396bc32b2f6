"""Knots of the tail curve: the inverse temperatures at which a cache stores the tail mass."""

from __future__ import annotations

import math
from collections.abc import Sequence


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


def common_base(knots: Sequence[float]) -> tuple[float, list[int]]:
    """The largest base of which every knot is a multiple of at most 16, and the multiples; (1, []) if there is none."""
    for parts in (1, 2, 3):
        base = min(knots) / parts
        multiples = [round(knot / base) for knot in knots]
        if max(multiples) <= 16 and all(abs(m * base - knot) < 1e-12 for m, knot in zip(multiples, knots, strict=True)):
            return base, multiples
    return 1.0, []
