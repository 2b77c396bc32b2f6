"""Stored entries to token ids and log-probabilities: compiled loops over entries.

Stored entries of all positions stand end to end, [E]; results are dense, [N, K]. This is the part of reading that runs
once per entry, 64 times a position: as array operations it takes a dozen passes over memory, as loops two.

No input makes a kernel touch memory outside its arrays: the results tell the caller of numbers that no encoder writes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from ..base.kernels import compiled
from .arrays import Array
from .levels import MASS_UNIT, TOP_ENTRIES

_TOGETHER = 256  # positions


@register_jitable
def _widen(stored: Array, words: int, out: Array) -> None:
    """Values of one or two uint16 words each, the low word first, to the front of an int64 array."""
    if words == 1:
        for i in range(len(stored)):
            out[i] = stored[i]
    else:
        for i in range(len(stored) // 2):
            out[i] = np.int64(stored[2 * i]) | np.int64(stored[2 * i + 1]) << 16


@register_jitable
def _highest(stored: Array, words: int) -> Any:
    """The largest of such values; 0 where there are none."""
    if words == 1:
        highest_word = np.uint16(0)  # half the time of a pass over the widened values
        for place in range(len(stored)):
            highest_word = max(highest_word, stored[place])
        return np.int64(highest_word)
    highest = np.int64(0)
    for i in range(len(stored) // 2):
        highest = max(highest, np.int64(stored[2 * i]) | np.int64(stored[2 * i + 1]) << 16)
    return highest


@compiled
def read_bands(
    codes: Array,
    words: int,
    top_steps: Array,
    rest_steps: Array,
    counts_N: Array,
    heads_N: Array,
    leveled_N: Array,
    contexts_N: Array,
    start_V: Array,
    length_V: Array,
    table: Array,
    token_ids_NK: Array,
    levels_E: Array,
) -> tuple[Any, Any]:
    """Codes and steps of `compact` to ids, -1 where unused, and levels of the entries with a level.

    A level is the previous level plus a step; a code is the previous code plus a gap, or absolute where a band begins.
    Codes are uint16 [E words], one or two words each, and index a codebook (`codebook` has `start_V`, `length_V` and
    `table`). Returns the highest place in the table and the highest level; ids and levels are valid if both are inside.
    """
    # One simple operation per loop, over data in the first cache: all loops but the two running sums along rank handle
    # eight entries at a time, and the two sums run in parallel.
    order, last = len(table) - len(length_V), len(table) - 1
    width = token_ids_NK.shape[1]
    step_K, goes_on_K, code_K = np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int64)
    entry = leveled = top = rest = 0
    highest_place = highest_level = 0
    for position in range(len(counts_N)):
        count, heads, with_level = counts_N[position], heads_N[position], leveled_N[position]
        in_top = min(with_level, TOP_ENTRIES)
        stored, levels = codes[words * entry : words * (entry + count)], levels_E[leveled : leveled + with_level]
        firsts, others = top_steps[top : top + in_top], rest_steps[rest : rest + with_level - in_top]
        entry, leveled, top, rest = entry + count, leveled + with_level, top + in_top, rest + with_level - in_top

        for rank in range(in_top):
            step_K[rank] = firsts[rank]
        for rank in range(with_level - in_top):
            step_K[in_top + rank] = others[rank]
        step_K[with_level:count] = 0
        # All bits set where a band continues, none where a band begins.
        for rank in range(count):
            goes_on_K[rank] = -np.int64(step_K[rank] == 0)
        if count > 0:
            goes_on_K[0] = 0
        if count > 1 and heads > 0:
            goes_on_K[1] = 0
        if heads < count:
            goes_on_K[heads] = 0
        _widen(stored, words, code_K)

        level_K = step_K
        level = code = 0
        for rank in range(count):
            level += step_K[rank]
            code = code_K[rank] + (code & goes_on_K[rank])
            level_K[rank], code_K[rank] = level, code
        for rank in range(with_level):
            levels[rank] = level_K[rank]
        highest_level = max(highest_level, level)

        start, length = start_V[contexts_N[position]], length_V[contexts_N[position]]
        skip = order - length - start
        for rank in range(count):
            past = -np.int64(code_K[rank] >= length)  # all bits set where the code is past the list
            place = start + code_K[rank] + (skip & past)
            highest_place = max(highest_place, place)
            code_K[rank] = min(place, last)
        token_ids_K = token_ids_NK[position]
        for rank in range(count):
            token_ids_K[rank] = table[code_K[rank]]
        token_ids_K[count:] = -1
    return highest_place, highest_level


@register_jitable
def _scale_levels(
    levels_E: Array,
    heads_N: Array,
    leveled_N: Array,
    log_head_N: Array,
    log_prob_by_level: Array,
    mass_by_level: Array,
    log_probs_NK: Array,
) -> None:
    """Levels to log-probabilities; those of a head sum to its mass. -inf where there is no level."""
    entry = 0
    for position in range(len(heads_N)):
        heads, with_level = heads_N[position], leveled_N[position]
        levels, log_probs_K = levels_E[entry : entry + with_level], log_probs_NK[position]
        entry += with_level
        mass = 0
        for rank in range(heads):
            level = np.uint64(levels[rank])
            mass += mass_by_level[level]
            log_probs_K[rank] = log_prob_by_level[level]
        for rank in range(heads, with_level):
            log_probs_K[rank] = log_prob_by_level[np.uint64(levels[rank])]
        # Samples alone are not normalised.
        if heads > 0:
            offset = np.float32(log_head_N[position] - math.log(max(mass, 1) * MASS_UNIT))
            for rank in range(with_level):
                log_probs_K[rank] += offset
        log_probs_K[with_level:] = -np.inf


@register_jitable
def _spread(values: Array, words: int, firsts_N: Array, counts_N: Array, unused: int, out_NK: Array) -> None:
    """Values end to end, one or two uint16 words each, to [N, K], those of a position from rank `firsts_N` on."""
    entry = 0
    for position in range(len(counts_N)):
        first, count = firsts_N[position], counts_N[position]
        stored, out_K = values[words * entry : words * (entry + count)], out_NK[position]
        entry += count
        out_K[:first] = unused
        _widen(stored, words, out_K[first : first + count])
        out_K[first + count :] = unused


scale_levels = compiled(_scale_levels)
spread = compiled(_spread)


@compiled
def read_ids(
    ids: Array,
    words: int,
    levels_E: Array,
    counts_N: Array,
    heads_N: Array,
    leveled_N: Array,
    log_head_N: Array,
    log_prob_by_level: Array,
    mass_by_level: Array,
    token_ids_NK: Array,
    log_probs_NK: Array,
) -> Any:
    """Ids of `fast`, one or two uint16 words each, and levels to ids, -1 where unused, and log-probabilities.

    Returns the highest id.
    """
    _spread(ids, words, np.zeros_like(counts_N), counts_N, -1, token_ids_NK)
    _scale_levels(levels_E, heads_N, leveled_N, log_head_N, log_prob_by_level, mass_by_level, log_probs_NK)
    return _highest(ids, words)


@compiled
def curve_of_steps(
    steps_NJ: Array,
    step: float,
    log_tail_N: Array,
    weights_JM: Array,
    places_J: Array,
    known_place: int,
    curve_NJ: Array,
) -> None:
    """F at every knot: F(1) as given, F at the J others a step from its prediction; all -inf where there is no tail.

    `weights_JM`: of a constant, of F(1), and of F at the knots before; `places_J`: columns of the knots in the curve.
    """
    # C positions at a time, knot by knot: the CPU works on four positions at once, and its first cache holds the block.
    known_MC = np.ones((2 + len(places_J), _TOGETHER))
    for start in range(0, len(log_tail_N), _TOGETHER):
        stop = min(start + _TOGETHER, len(log_tail_N))
        count = stop - start
        log_tail_C, steps_CJ, curve_CJ = log_tail_N[start:stop], steps_NJ[start:stop], curve_NJ[start:stop]
        for i in range(count):
            known_MC[1, i] = curve_CJ[i, known_place] = log_tail_C[i]
        for knot in range(len(places_J)):
            value_C = known_MC[2 + knot]
            value_C[:] = 0.0
            for place in range(2 + knot):
                weight, known_C = weights_JM[knot, place], known_MC[place]
                for i in range(count):
                    value_C[i] += weight * known_C[i]
            for i in range(count):
                value_C[i] += steps_CJ[i, knot] * step
                curve_CJ[i, places_J[knot]] = value_C[i]
        for i in range(count):
            if log_tail_C[i] == -np.inf:
                curve_CJ[i] = -np.inf
