"""Knots of the tail curve: the inverse temperatures at which the tail's mass is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

DEFAULT_KNOTS = (0.25, 0.5, 0.75, 0.875)
"""Chosen by the worst error of the tail mass at any T from 1 to 8, on SmolLM2's top 64 to 32: 0.006 to 0.011 at T = 1.1 without
7/8, 0.002 with it."""


def inverse_temperature(temperature: float, knots: Sequence[float]) -> float:
    """1/T, or ValueError where T is not positive or the tail curve does not reach it."""
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature {temperature} must be a positive number")
    beta = 1.0 / temperature
    if beta > max(knots) + 1e-12:
        raise ValueError(
            f"temperature {temperature:g} needs the tail mass at inverse temperature {beta:g}, but the cache keeps it only "
            f"up to {max(knots):g}: add {beta:g} to cache.knots and cache again, or use T >= {1 / max(knots):g}"
        )
    if len(knots) == 1 and abs(beta - knots[0]) > 1e-9:
        raise ValueError(
            f"temperature {temperature:g} needs the tail mass at inverse temperature {beta:g}, and these targets know it at "
            f"{knots[0]:g} only (imported top-k log-probabilities, or the mean of several teachers): use T = {1 / knots[0]:g}"
        )
    nearest = min(knots, key=lambda knot: abs(knot - beta))
    return nearest if abs(nearest - beta) < 1e-9 else beta


def common_base(knots: Sequence[float]) -> tuple[float, list[int]]:
    """The largest base of which all knots are small multiples, and these; 1 and none where there is no such base."""
    for parts in (1, 2, 3):
        base = min(knots) / parts
        multiples = [round(knot / base) for knot in knots]
        if max(multiples) <= 16 and all(abs(m * base - knot) < 1e-12 for m, knot in zip(multiples, knots, strict=True)):
            return base, multiples
    return 1.0, []
