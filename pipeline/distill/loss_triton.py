"""KL and cross-entropy of rows of logits with their gradient, as one kernel of Triton for a GPU.

A program has some rows to itself. It reads the product of the output layer twice, once for the sums and once for the
gradient, which it writes in place; bias, scale and soft-cap of the logits, and the logits of the tail's shape, exist in
a tile only. All arithmetic is float32. Shapes: C rows, V vocabulary, K entries, R coordinates; in a program ROWS rows,
TILE tokens and HEAD entries at a time.
"""

# Triton's own types stand in the kernels: mypy sees none of them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

_MARK = tl.constexpr(-91)
"""As 16 or 32 bits of a float, a NaN that no arithmetic gives: the places of the entries between the two readings."""
_NONE = tl.constexpr(float("-inf"))


@triton.jit
def _tanh(x):
    """To 3e-7 of itself; (1 - e) / (1 + e) alone loses that near 0, where the series is short."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    small = tl.exp(-2 * tl.abs(x))
    ratio = (1 - small) / (1 + small)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def _marks(SHAPE: tl.constexpr, FLOAT: tl.constexpr):
    marks = tl.full(SHAPE, _MARK, tl.int32 if FLOAT.primitive_bitwidth == 32 else tl.int16)
    return marks.to(FLOAT, bitcast=True)


@triton.jit
def _is_mark(product):
    return product.to(tl.int32 if product.dtype.primitive_bitwidth == 32 else tl.int16, bitcast=True) == _MARK


@triton.jit
def _logits(product, bias_ptr, v, there, scale, softcap, SOFTCAP: tl.constexpr):
    """The logits of tokens v."""
    x = product.to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + v, mask=there, other=0.0).to(tl.float32)
    x *= scale
    if SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _slope(x, scale, softcap, SOFTCAP: tl.constexpr):
    """dx / d product."""
    slope = scale
    if SOFTCAP:
        slope = scale * (1 - (x / softcap) * (x / softcap))
    return slope


@triton.jit
def _tile(x_ptr, bias_ptr, v, used, size, width, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits of a tile, and which of its places hold tokens outside the entries; -inf at the others."""
    product = tl.load(x_ptr + v, mask=used & (v < width), other=0.0)
    x = _logits(product, bias_ptr, v, used & (v < size), scale, softcap, SOFTCAP)
    outside = used & (v < size) & (_is_mark(product) == 0)
    return tl.where(outside, x, _NONE), outside


@triton.jit
def _coordinates(z_ptr, start, used, rank, RANK: tl.constexpr):
    at = start + tl.arange(0, RANK)[None, :]
    return tl.load(z_ptr + at, mask=used & (at < rank), other=0.0)


@triton.jit
def _directions(u_ptr, start, token_stride, coordinate_stride, v, some, rank, RANK: tl.constexpr):
    at = start + tl.arange(0, RANK)[:, None]
    return tl.load(u_ptr + at * coordinate_stride + v * token_stride, mask=some & (at < rank), other=0.0)


@triton.jit
def _shape_tile(
    shape,
    v,
    used,
    outside,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    MORE: tl.constexpr,
):
    """beta t of a tile, -inf where `outside` is not and for tokens that the basis does not have.

    `shape` has the first coordinates, all that there are, offsets, directions with their strides, and four numbers.
    """
    z, z_ptr, offset_ptr, u_ptr, token_stride, coordinate_stride, rank, known, beta, softcap = shape
    some = v < known
    t = tl.zeros(outside.shape, tl.float32)
    t = tl.dot(z, _directions(u_ptr, 0, token_stride, coordinate_stride, v, some, rank, RANK), t, PRECISION)
    if MORE:
        for start in range(RANK, rank, RANK):
            u = _directions(u_ptr, start, token_stride, coordinate_stride, v, some, rank, RANK)
            t = tl.dot(_coordinates(z_ptr, start, used, rank, RANK), u, t, PRECISION)
    t += tl.load(offset_ptr + v, mask=some, other=0.0)
    if SOFTCAP:
        t = softcap * _tanh(t / softcap)
    return tl.where(outside & some, beta * t, _NONE)


@triton.jit(do_not_specialize=["count", "k", "rank", "known"])
def loss_rows(
    # The product [C, V], and what makes logits of it.
    x_ptr,
    stride,
    bias_ptr,
    scale,
    softcap,
    # Entries [C, K], -1 where unused: ids, weights and log p; room for their logits; log p(R), labels and weights [C].
    ids_ptr,
    weights_ptr,
    log_p_ptr,
    entries_ptr,
    log_tail_ptr,
    labels_ptr,
    kd_ptr,
    ce_ptr,
    # Coordinates [C, R], offsets [V] and directions [V, R] of the tail's shape.
    z_ptr,
    offset_ptr,
    u_ptr,
    token_stride,
    coordinate_stride,
    shape_softcap,
    # Results [C].
    kl_out_ptr,
    ce_out_ptr,
    agreed_ptr,
    # C, V, places of a row, K, R, tokens of the basis, 1 / T.
    count,
    size,
    width,
    k,
    rank,
    known,
    beta,
    SOFTCAP: tl.constexpr,
    SOFTENED: tl.constexpr,
    SHAPE: tl.constexpr,
    SHAPE_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD: tl.constexpr,
    RANK: tl.constexpr,
    MORE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """KL_T, CE and whether both have the same first choice, and over the product the gradient with respect to it of
    kd KL_T, taken by z = x / T, plus ce CE.

    With weights w of the entries, x_o the tail's largest logit, W the sum of w and p(R), the gradient by the logits is

        kd (W q_T - w) + ce (q_1 - [label])                                 at the entries
        kd (W q_T - p(R) r) + ce (q_1 - [label])                            in the tail

    with r the tail's shape, or q_T / q_T(R) where the tail is one outcome. Sums of exponentials start from x_o, so that
    r stays finite where q_T(R) rounds to 0.
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < count
    wide = row.to(tl.int64)[:, None]
    x_ptr += wide * stride
    tile, column = tl.arange(0, TILE)[None, :], tl.arange(0, HEAD)[None, :]
    label = tl.load(labels_ptr + row, mask=real, other=-1)
    log_tail = tl.load(log_tail_ptr + row, mask=real, other=_NONE)
    kd, ce = tl.load(kd_ptr + row, mask=real, other=0.0), tl.load(ce_ptr + row, mask=real, other=0.0)

    # The logits of label and entries.
    known_label = ((label >= 0) & (label < size))[:, None]
    at_label = tl.maximum(label, 0)[:, None]
    of_label = tl.load(x_ptr + at_label, mask=known_label, other=0.0)
    of_label = _logits(of_label, bias_ptr, at_label, known_label, scale, softcap, SOFTCAP)
    x_label = tl.sum(tl.where(known_label | (label < 0)[:, None], of_label, float("nan")), 1)
    top = tl.full([ROWS], _NONE, tl.float32)
    first = tl.full([ROWS], _NONE, tl.float32)
    has_first = tl.zeros([ROWS], tl.int32)
    has_entry = tl.zeros([ROWS], tl.int32)
    for start in range(0, k, HEAD):
        place = wide * k + start + column
        there = real[:, None] & (start + column < k)
        ids = tl.load(ids_ptr + place, mask=there, other=-1)
        entry = tl.load(x_ptr + ids, mask=ids >= 0, other=0.0)
        entry = _logits(entry, bias_ptr, ids, ids >= 0, scale, softcap, SOFTCAP)
        entry = tl.where(ids >= 0, entry, _NONE)
        tl.store(entries_ptr + place, entry, mask=there)
        top = tl.maximum(top, tl.max(entry, 1))
        first = tl.maximum(first, tl.max(tl.where(start + column == 0, entry, _NONE), 1))
        has_first += tl.sum(((start + column == 0) & (ids >= 0)).to(tl.int32), 1)
        has_entry += tl.sum((ids >= 0).to(tl.int32), 1)

    is_used = (label >= 0) | (has_entry > 0) | (log_tail > _NONE)
    used = is_used[:, None]
    if tl.max(is_used.to(tl.int32), 0) == 0:
        # Positions with neither target nor label have loss and gradient 0; their logits are not read.
        for start in range(0, width, TILE):
            v = start + tile
            tl.store(x_ptr + v, tl.zeros([ROWS, TILE], FLOAT), mask=real[:, None] & (v < width))
        tl.store(kl_out_ptr + row, tl.zeros([ROWS], tl.float32), mask=real)
        tl.store(ce_out_ptr + row, tl.zeros([ROWS], tl.float32), mask=real)
        tl.store(agreed_ptr + row, row < 0, mask=real)
        return

    tl.debug_barrier()  # a thread may mark what another has still to read
    for start in range(0, k, HEAD):
        there = real[:, None] & (start + column < k)
        ids = tl.load(ids_ptr + wide * k + start + column, mask=there, other=-1)
        tl.store(x_ptr + ids, _marks([ROWS, HEAD], FLOAT), mask=ids >= 0)
    tl.debug_barrier()

    # The sums outside, from the largest so far: of exp x and exp x / T, of exp y, y = t / T, and of exp y times
    # (y - largest y) - (x - largest x) / T.
    most = tl.full([ROWS], _NONE, tl.float32)
    most_y = tl.full([ROWS], _NONE, tl.float32)
    if SHAPE:
        z_ptr += wide * rank
        z = _coordinates(z_ptr, 0, used, rank, RANK)
        shape = z, z_ptr, offset_ptr, u_ptr, token_stride, coordinate_stride, rank, known, beta, shape_softcap
    one = tl.zeros([ROWS, TILE], tl.float32)
    soft, of_y, dot = one, one, one
    for start in tl.range(0, size, TILE, num_stages=STAGES):
        v = start + tile
        x, outside = _tile(x_ptr, bias_ptr, v, used, size, width, scale, softcap, SOFTCAP)
        larger = tl.maximum(most, tl.max(x, 1))
        shift = tl.where(larger == _NONE, 0.0, larger)
        step = tl.where(most == _NONE, 0.0, most - shift)
        gap = x - shift[:, None]
        one = one * tl.exp(step)[:, None] + tl.exp(gap)
        if SOFTENED:
            soft = soft * tl.exp(beta * step)[:, None] + tl.exp(beta * gap)
        most = larger
        if SHAPE:
            y = _shape_tile(shape, v, used, outside, SHAPE_SOFTCAP, PRECISION, RANK, MORE)
            larger_y = tl.maximum(most_y, tl.max(y, 1))
            shift_y = tl.where(larger_y == _NONE, 0.0, larger_y)
            step_y = tl.where(most_y == _NONE, 0.0, most_y - shift_y)
            gap_y = y - shift_y[:, None]
            term, factor = tl.exp(gap_y), tl.exp(step_y)[:, None]
            dot = factor * (dot + of_y * (step_y - beta * step)[:, None])
            dot += tl.where(term > 0, term * (gap_y - beta * gap), 0.0)
            of_y = factor * of_y + term
            most_y = larger_y
    if not SOFTENED:
        soft = one
    one, soft, of_y, dot = tl.sum(one, 1), tl.sum(soft, 1), tl.sum(of_y, 1), tl.sum(dot, 1)

    # The entries' part, from the largest of all.
    peak = tl.maximum(top, most)
    peak = tl.where(peak == _NONE, 0.0, peak)
    entries_1 = tl.zeros([ROWS, HEAD], tl.float32)
    entries_T, weight, terms = entries_1, entries_1, entries_1
    for start in range(0, k, HEAD):
        place = wide * k + start + column
        there = real[:, None] & (start + column < k)
        entry = tl.load(entries_ptr + place, mask=there, other=_NONE) - peak[:, None]
        w = tl.load(weights_ptr + place, mask=there, other=0.0)
        log_p = tl.load(log_p_ptr + place, mask=there, other=0.0)
        entries_1 += tl.exp(entry)
        entries_T += tl.exp(beta * entry)
        weight += w
        terms += tl.where(w > 0, w * (log_p - beta * entry), 0.0)
    log_1 = tl.log(tl.sum(entries_1, 1) + one * tl.exp(most - peak))
    log_T = tl.log(tl.sum(entries_T, 1) + soft * tl.exp(beta * (most - peak)))
    mass = tl.sum(weight, 1)
    kl = tl.sum(terms, 1) + mass * log_T
    p_tail = tl.exp(log_tail)
    if SHAPE:
        p_tail = tl.where(of_y > 0, p_tail, 0.0)
        some_y = tl.where(of_y > 0, of_y, 1.0)
        tail = log_tail - tl.log(some_y) + dot / some_y - (beta * (most - peak) - log_T)
        by_y = kd * p_tail / some_y
        by_T = tl.zeros([ROWS], tl.float32)
    else:
        tail = log_tail - (tl.log(soft) + beta * (most - peak) - log_T)
        by_y = tl.zeros([ROWS], tl.float32)
        by_T = -kd * p_tail / tl.where(soft > 0, soft, 1.0)
    kl += tl.where(p_tail > 0, p_tail * tail, 0.0)
    mass += p_tail
    by_T += kd * mass * tl.exp(beta * (most - peak) - log_T)
    by_1 = ce * tl.exp(most - peak - log_1)
    agreed = (has_first > 0) & (first >= tl.maximum(top, most))
    tl.store(kl_out_ptr + row, tl.where(is_used, kl, 0.0), mask=real)
    tl.store(ce_out_ptr + row, tl.where(is_used, log_1 - (x_label - peak), 0.0), mask=real)
    tl.store(agreed_ptr + row, agreed, mask=real)

    # The gradient: in the tail, and over it at the entries.
    tl.debug_barrier()
    shift = tl.where(most == _NONE, 0.0, most)[:, None]
    shift_y = tl.where(most_y == _NONE, 0.0, most_y)[:, None]
    for start in tl.range(0, size, TILE, num_stages=STAGES):
        v = start + tile
        x, outside = _tile(x_ptr, bias_ptr, v, used, size, width, scale, softcap, SOFTCAP)
        if SOFTENED:
            grad = by_T[:, None] * tl.exp(beta * (x - shift)) + by_1[:, None] * tl.exp(x - shift)
        else:
            grad = (by_T + by_1)[:, None] * tl.exp(x - shift)
        if SHAPE:
            y = _shape_tile(shape, v, used, outside, SHAPE_SOFTCAP, PRECISION, RANK, MORE)
            grad -= by_y[:, None] * tl.exp(y - shift_y)
        grad -= tl.where(v == label[:, None], ce[:, None], 0.0)
        grad = tl.where(used, grad * _slope(x, scale, softcap, SOFTCAP), 0.0)
        tl.store(x_ptr + v, grad.to(FLOAT), mask=real[:, None] & (v < width))
    tl.debug_barrier()
    for start in range(0, k, HEAD):
        place = wide * k + start + column
        there = real[:, None] & (start + column < k)
        ids = tl.load(ids_ptr + place, mask=there, other=-1)
        entry = tl.load(entries_ptr + place, mask=there, other=_NONE)
        w = tl.load(weights_ptr + place, mask=there, other=0.0)
        q_T = tl.exp(beta * (entry - peak[:, None]) - log_T[:, None])
        q_1 = tl.exp(entry - peak[:, None] - log_1[:, None])
        pull = kd[:, None] * (mass[:, None] * q_T - w)
        pull += ce[:, None] * (q_1 - tl.where(ids == label[:, None], 1.0, 0.0))
        pull *= _slope(entry, scale, softcap, SOFTCAP)
        tl.store(x_ptr + ids, pull.to(FLOAT), mask=ids >= 0)
