"""Stored entries to token ids and log-probabilities: the loops over entries, compiled.

Entries of all positions stand end to end, P positions with n entries together; what comes out is dense, [P, K]. This is
all of reading that is done once for every entry, 64 times a position: as array operations it is a dozen passes over memory,
as loops it is two.

Whatever the numbers, nothing outside the arrays is touched: the caller sees from what is returned that they were none
that an encoder writes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from ..base.kernels import compiled

TOP_ENTRIES = 8
"""Levels of so many first entries are stored apart."""
MASS_UNIT = 2.0**-40
"""Probabilities are summed as integers of this, so that sums do not depend on their order."""
_TOGETHER = 256  # positions
Array = np.ndarray[Any, np.dtype[Any]]


@register_jitable
def _widen(stored: Array, words: int, out: Array) -> None:
    """uint16 values of one or two words each, the lower first, to the front of an int64 array."""
    if words == 1:
        for i in range(len(stored)):
            out[i] = stored[i]
    else:
        for i in range(len(stored) // 2):
            out[i] = np.int64(stored[2 * i]) | np.int64(stored[2 * i + 1]) << 16


@register_jitable
def _highest(stored: Array, words: int) -> Any:
    """Of values as `_widen` takes them; 0 where there are none."""
    if words == 1:
        highest_word = np.uint16(0)  # half the time of looking at what they are widened to
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
    counts_P: Array,
    heads_P: Array,
    leveled_P: Array,
    contexts_P: Array,
    start_V: Array,
    length_V: Array,
    table: Array,
    token_ids_PK: Array,
    levels_n: Array,
) -> tuple[Any, Any]:
    """Codes and steps of `compact` to ids, -1 where unused, and levels of the entries that have one.

    A level is the one before it and a step; a code the one before it and a gap, or stands for itself where a band begins.
    Codes are uint16 [n words], of one or two words each, and those of a codebook (see there for `start_V`, `length_V` and
    `table`). Returns the highest place in the table and the highest level that were found; ids and levels are right if both
    are inside.
    """
    # Loops of one kind each, over what stays in the first cache: all but the sums along rank run eight entries at a time, and
    # of those two one waits no longer than the other.
    order, last = len(table) - len(length_V), len(table) - 1
    width = token_ids_PK.shape[1]
    step_K, goes_on_K, code_K = np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int64)
    entry = leveled = top = rest = 0
    highest_place = highest_level = 0
    for position in range(len(counts_P)):
        count, heads, with_level = counts_P[position], heads_P[position], leveled_P[position]
        in_top = min(with_level, TOP_ENTRIES)
        stored, levels = codes[words * entry : words * (entry + count)], levels_n[leveled : leveled + with_level]
        firsts, others = top_steps[top : top + in_top], rest_steps[rest : rest + with_level - in_top]
        entry, leveled, top, rest = entry + count, leveled + with_level, top + in_top, rest + with_level - in_top

        for rank in range(in_top):
            step_K[rank] = firsts[rank]
        for rank in range(with_level - in_top):
            step_K[in_top + rank] = others[rank]
        step_K[with_level:count] = 0
        # All bits where a band goes on, none where one begins.
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

        start, length = start_V[contexts_P[position]], length_V[contexts_P[position]]
        skip = order - length - start
        for rank in range(count):
            past = -np.int64(code_K[rank] >= length)  # all bits where the code is past the list
            place = start + code_K[rank] + (skip & past)
            highest_place = max(highest_place, place)
            code_K[rank] = min(place, last)
        token_ids_K = token_ids_PK[position]
        for rank in range(count):
            token_ids_K[rank] = table[code_K[rank]]
        token_ids_K[count:] = -1
    return highest_place, highest_level


@register_jitable
def _scale_levels(
    levels_n: Array,
    heads_P: Array,
    leveled_P: Array,
    log_head_P: Array,
    log_prob_by_level: Array,
    mass_by_level: Array,
    log_probs_PK: Array,
) -> None:
    """Levels to log-probabilities of which those of the head sum to its mass; -inf where there is no level."""
    entry = 0
    for position in range(len(heads_P)):
        heads, with_level = heads_P[position], leveled_P[position]
        levels, log_probs_K = levels_n[entry : entry + with_level], log_probs_PK[position]
        entry += with_level
        mass = 0
        for rank in range(heads):
            level = np.uint64(levels[rank])
            mass += mass_by_level[level]
            log_probs_K[rank] = log_prob_by_level[level]
        for rank in range(heads, with_level):
            log_probs_K[rank] = log_prob_by_level[np.uint64(levels[rank])]
        # Where there are samples only, there is nothing to set right.
        if heads > 0:
            offset = np.float32(log_head_P[position] - math.log(max(mass, 1) * MASS_UNIT))
            for rank in range(with_level):
                log_probs_K[rank] += offset
        log_probs_K[with_level:] = -np.inf


@register_jitable
def _spread(values: Array, words: int, firsts_P: Array, counts_P: Array, unused: int, out_PK: Array) -> None:
    """Values end to end, uint16 of one or two words each, to [P, K], those of a position from its rank `firsts_P` on."""
    entry = 0
    for position in range(len(counts_P)):
        first, count = firsts_P[position], counts_P[position]
        stored, out_K = values[words * entry : words * (entry + count)], out_PK[position]
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
    levels_n: Array,
    counts_P: Array,
    heads_P: Array,
    leveled_P: Array,
    log_head_P: Array,
    log_prob_by_level: Array,
    mass_by_level: Array,
    token_ids_PK: Array,
    log_probs_PK: Array,
) -> Any:
    """Ids of `fast`, uint16 of one or two words each, and levels to ids, -1 where unused, and log-probabilities.

    Returns the highest id.
    """
    _spread(ids, words, np.zeros_like(counts_P), counts_P, -1, token_ids_PK)
    _scale_levels(levels_n, heads_P, leveled_P, log_head_P, log_prob_by_level, mass_by_level, log_probs_PK)
    return _highest(ids, words)


@compiled
def curve_of_steps(
    steps_PS: Array,
    step: float,
    log_tail_P: Array,
    weights_SM: Array,
    places_S: Array,
    known_place: int,
    curve_PC: Array,
) -> None:
    """F at every knot: at T = 1 as given, at each of the S others a step from its prediction; all -inf where there is no tail.

    `weights_SM` are those of a constant, of F(1), and of F at the knots before it; knot s stands at `places_S` of the curve.
    """
    # Knot by knot for some positions at a time: four of them are worked on together, and the first cache holds what is known of all.
    known_MN = np.ones((2 + len(places_S), _TOGETHER))
    for start in range(0, len(log_tail_P), _TOGETHER):
        stop = min(start + _TOGETHER, len(log_tail_P))
        count = stop - start
        log_tail_N, steps_NS, curve_NC = log_tail_P[start:stop], steps_PS[start:stop], curve_PC[start:stop]
        for i in range(count):
            known_MN[1, i] = curve_NC[i, known_place] = log_tail_N[i]
        for knot in range(len(places_S)):
            value_N = known_MN[2 + knot]
            value_N[:] = 0.0
            for place in range(2 + knot):
                weight, known_N = weights_SM[knot, place], known_MN[place]
                for i in range(count):
                    value_N[i] += weight * known_N[i]
            for i in range(count):
                value_N[i] += steps_NS[i, knot] * step
                curve_NC[i, places_S[knot]] = value_N[i]
        for i in range(count):
            if log_tail_N[i] == -np.inf:
                curve_NC[i] = -np.inf
