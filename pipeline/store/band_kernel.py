"""Entries to the integers of `compact`: one compiled loop over positions, the inverse of `entry_kernels.read_bands`.

As array operations it takes a dozen passes over 64 numbers a position, 3.3 us; as one loop, in the first cache, 1 us.
"""

from __future__ import annotations

import numpy as np

from ..base.kernels import compiled
from .arrays import Array
from .levels import LAST_LEVEL, TOP_ENTRIES

_LIST_BITS = 24
_DRAW_BITS = 24
_SHORT = 32
"""Entries of a band that are sorted by insertion."""


@compiled
def write_bands(
    token_ids_NK: Array,
    log_probs_NK: Array,
    draws_NK: Array,
    samples_have_levels: bool,
    contexts_N: Array,
    rank_V: Array,
    start_V: Array,
    length_V: Array,
    table: Array,
    bounds: Array,
    codes_E: Array,
    top_steps_E: Array,
    rest_steps_E: Array,
    draws_E: Array,
    counts_3N: Array,
) -> None:
    """Targets [N, K] to codes, steps, and the draws of samples, end to end; the arrays [E] have room for N K values.

    `draws_NK` is 0 for head entries, or [N, 0] for supports without samples. `bounds` [255] are the upper ends of the
    levels. `counts_3N` [3, N] becomes the entries, the head entries and the entries with a level of each position.
    """
    width, has_draws = token_ids_NK.shape[1], draws_NK.shape[1] > 0
    listed_V = np.zeros(len(rank_V), np.int64)
    # A key is a code above its number of draws.
    key_K, step_K = np.empty(width, np.int64), np.empty(width, np.int64)
    entry = top = rest = sample = 0
    for position in range(len(token_ids_NK)):
        token_ids_K, log_probs_K = token_ids_NK[position], log_probs_NK[position]
        count = heads = 0
        for place in range(width):
            if token_ids_K[place] >= 0:
                count += 1
                if not has_draws or draws_NK[position, place] == 0:
                    heads += 1
        leveled = count if samples_have_levels else heads
        counts_3N[0, position], counts_3N[1, position], counts_3N[2, position] = count, heads, leveled
        if count == 0:
            continue

        context = contexts_N[position]
        start, length, mark = start_V[context], np.int64(length_V[context]), (position + 1) << _LIST_BITS
        for place in range(length):
            listed_V[table[start + place]] = mark | place
        n, reference, level = 0, 0.0, 0
        for place in range(width):
            token = token_ids_K[place]
            if token < 0:
                continue
            listed = listed_V[token]
            code = listed & ((1 << _LIST_BITS) - 1) if listed >= mark else rank_V[token] + length
            key_K[n], step_K[n] = code << _DRAW_BITS, 0
            if has_draws:
                key_K[n] |= draws_NK[position, place]
            if n < leveled:
                if n == 0 and heads > 0:
                    reference = np.float64(log_probs_K[place])
                below, before = reference - np.float64(log_probs_K[place]), level
                while level < LAST_LEVEL and below > bounds[level]:
                    level += 1
                while level > 0 and below <= bounds[level - 1]:
                    level -= 1
                step_K[n] = level - before
            n += 1

        # Bands, each in the order of its codes; they are short, as most of a head's entries have a level of their own.
        first = 0
        while first < count:
            last = first + 1
            while last < count and step_K[last] <= 0 and not (last == 1 and heads > 0) and last != heads:
                last += 1
            if last - first > _SHORT:
                key_K[first:last].sort()
            else:
                for place in range(first + 1, last):
                    key, before = key_K[place], place - 1
                    while before >= first and key_K[before] > key:
                        key_K[before + 1] = key_K[before]
                        before -= 1
                    key_K[before + 1] = key
            code = np.int64(0)
            for place in range(first, last):
                codes_E[entry + place] = (key_K[place] >> _DRAW_BITS) - code
                code = key_K[place] >> _DRAW_BITS
            first = last
        for place in range(leveled):
            if place < TOP_ENTRIES:
                top_steps_E[top] = step_K[place]
                top += 1
            else:
                rest_steps_E[rest] = step_K[place]
                rest += 1
        if has_draws:
            for place in range(heads, count):
                draws_E[sample] = key_K[place] & ((1 << _DRAW_BITS) - 1)
                sample += 1
        entry += count
