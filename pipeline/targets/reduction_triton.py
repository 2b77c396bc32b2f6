"""`head_and_rest` of `reduction` on a GPU: one Triton kernel, a program per row, that reads the logits from memory once.

A row is cut into blocks of W neighbouring tokens. The pass over it leaves of each block the largest logit and, relative
to that, the sums of powers of one exponential. What is below the (k + 1)-th largest of these maxima is beaten by k + 1
others, so only the *listed* blocks, whose maximum is not below it, hold members of the head: the candidates are read from
them, and of them alone the sums are taken anew, without the head. All other blocks are in the rest as they are. So no
sum is ever a difference, and all that follows the pass is small and lies in the caches.

Everything is float32; a value and a token id make one int64 that orders both.

Shapes: N rows, K kept entries, J knots, G blocks of W neighbouring tokens.
"""

# Triton's own types stand in the kernels: mypy sees none of them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""Logits that a program holds in registers at a time."""
_MOST_BLOCKS = 4096
"""Block maxima that a program holds at a time."""
_WARPS = 8
_CANDIDATES = 4
"""Candidates of a row that there is room for, times k + 1. Likely tokens are neighbours: over 798 positions of SmolLM2
there are 1.5 to 2 (k + 1) on average and 3.7 (k + 1) at most."""


@triton.jit
def ordered(x):
    """float32 -> an int32 of the same order; -0 is 0."""
    bits = x.to(tl.int32, bitcast=True)
    turned = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return turned + (turned == -1).to(tl.int32)


@triton.jit
def from_ordered(number):
    """The inverse of `ordered`."""
    return (number ^ ((number >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def finite_or_zero(x):
    """0 for -inf, from which nothing can be subtracted."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def next_power(power, root, STEPS: tl.constexpr, KNOT: tl.constexpr):
    """From the power of the root at one knot to that of the next."""
    steps: tl.constexpr = STEPS[KNOT]
    for _ in tl.static_range(steps):
        power = power * root
    return power


@triton.jit
def listed_members(x_ptr, list_ptr, start, listed, size, W: tl.constexpr, MEMBERS: tl.constexpr):
    """Members of the listed blocks from number `start` on [MEMBERS]: logits, token ids, whether there is one; by id."""
    lane = tl.arange(0, MEMBERS)
    place = start + lane // W
    token = tl.load(list_ptr + place, mask=place < listed, other=0) * W + lane % W
    here = (place < listed) & (token < size)
    return tl.load(x_ptr + token, mask=here, other=-float("inf")).to(tl.float32), token, here


@triton.jit(do_not_specialize=["k", "most", "room"])
def head_and_rest_kernel(
    x_ptr,  # [N, V]
    row_stride,
    size,
    width,  # places of a row that may be read, V or a few more
    k,
    scale,  # exponent of 2 per nat, of the base whose multiples the knots are
    most,
    room,
    values_ptr,  # [N, most], the min(k + 1, V) largest
    ids_ptr,
    rest_ptr,  # [N, J], the sums
    maxima_ptr,  # [N, BLOCKS], scratch, as are those that follow
    sums_ptr,  # [N, J, BLOCKS]
    list_ptr,  # [N, BLOCKS]
    keys_ptr,  # [N, room]
    W: tl.constexpr,
    TILE: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECE: tl.constexpr,
    STEPS: tl.constexpr,  # from each multiple of the base to the next
    KNOTS: tl.constexpr,  # their number as a power of two
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    maxima_ptr += row * BLOCKS
    sums_ptr += row * len(STEPS) * BLOCKS
    list_ptr += row * BLOCKS
    keys_ptr += row * room
    values_ptr += row * most
    ids_ptr += row * most
    rows: tl.constexpr = TILE // W
    lowest: tl.constexpr = -(2**31)

    # 1. The pass: maximum and sums of every block. fmax passes over NaN, the sums do not.
    block = tl.arange(0, rows)
    for start in range(0, size, TILE):
        token = start + block[:, None] * W + tl.arange(0, W)[None, :]
        x = tl.load(x_ptr + token, mask=token < width, other=0.0).to(tl.float32)
        x = tl.where(token < size, x, -float("inf"))
        largest = tl.max(x, 1)
        root = tl.exp2((x - finite_or_zero(largest)[:, None]) * scale)
        place = start // W + block
        tl.store(maxima_ptr + place, ordered(largest))
        power = root
        for knot in tl.static_range(len(STEPS)):
            power = next_power(power, root, STEPS, knot)
            tl.store(sums_ptr + knot * BLOCKS + place, tl.sum(power, 1))
    tl.debug_barrier()  # each thread now reads what others have written

    # 2. The (k + 1)-th largest maximum, by bisection; below all numbers where there are fewer blocks.
    block = tl.arange(0, BLOCKS)
    used = block < tl.cdiv(size, W)
    maxima = tl.load(maxima_ptr + block, mask=used, other=lowest)
    low = tl.full((), lowest, tl.int64)
    high = tl.max(maxima, 0).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum((maxima >= middle).to(tl.int32), 0) > k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)

    # 3. The blocks that reach it, and their members that do.
    is_listed = used & (maxima >= low)
    tl.store(list_ptr + tl.cumsum(is_listed.to(tl.int32), 0) - 1, block, mask=is_listed)
    listed = tl.sum(is_listed.to(tl.int32), 0)
    tl.debug_barrier()
    found = 0
    for start in range(0, listed, MEMBERS // W):
        x, token, here = listed_members(x_ptr, list_ptr, start, listed, size, W, MEMBERS)
        number = ordered(x).to(tl.int64)
        keep = here & (number >= low)
        place = found + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(keys_ptr + place, (number << 32) - token, mask=keep & (place < room))
        found += tl.sum(keep.to(tl.int32), 0)

    # 4. More than there is room for, where many are equal or neighbours: then exactly k + 1 of them.
    if found > room:
        high = tl.max(maxima, 0).to(tl.int64)
        while low < high:  # the (k + 1)-th largest of all, which are among the members of the listed blocks
            middle = low + (high - low + 1) // 2
            reached = 0
            for start in range(0, listed, MEMBERS // W):
                x, token, here = listed_members(x_ptr, list_ptr, start, listed, size, W, MEMBERS)
                reached += tl.sum((here & (ordered(x) >= middle)).to(tl.int32), 0)
            enough = reached > k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        greater = 0
        for start in range(0, listed, MEMBERS // W):
            x, token, here = listed_members(x_ptr, list_ptr, start, listed, size, W, MEMBERS)
            greater += tl.sum((here & (ordered(x) > low)).to(tl.int32), 0)
        tl.debug_barrier()  # the places are written once more
        found = 0
        equal = 0
        for start in range(0, listed, MEMBERS // W):
            x, token, here = listed_members(x_ptr, list_ptr, start, listed, size, W, MEMBERS)
            number = ordered(x).to(tl.int64)
            same = here & (number == low)
            first = equal + tl.cumsum(same.to(tl.int32), 0) <= k + 1 - greater
            keep = here & (number > low) | same & first
            place = found + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(keys_ptr + place, (number << 32) - token, mask=keep)
            equal += tl.sum(same.to(tl.int32), 0)
            found += tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()

    # 5. The k + 1 largest in order: the rank of a candidate is the number of greater ones. The first behind the head gives
    #    the scale of the sums.
    last_key = tl.full((), 2**63 - 1, tl.int64)  # of the head; behind an empty one everything is the rest
    shift = 0.0
    lane = tl.arange(0, PIECE)
    for start in range(0, found, PIECE):
        keys = tl.load(keys_ptr + start + lane, mask=start + lane < found, other=0)
        ranks = tl.zeros((PIECE,), tl.int32)
        for other in range(0, found, PIECE):
            others = tl.load(keys_ptr + other + lane, mask=other + lane < found, other=-(2**63))
            ranks += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), 1)
        ranks = tl.where(start + lane < found, ranks, size)
        number = ((keys + 0xFFFFFFFF) >> 32).to(tl.int32)
        x = from_ordered(number)
        tl.store(values_ptr + ranks, x, mask=ranks < most)
        tl.store(ids_ptr + ranks, (number.to(tl.int64) << 32) - keys, mask=ranks < most)
        last_key = tl.minimum(last_key, tl.min(tl.where(ranks < k, keys, 2**63 - 1), 0))
        shift += tl.sum(tl.where((ranks == k) & (k < size), finite_or_zero(x), 0.0), 0)

    # 6. Sums over the rest: of the other blocks those of the pass, of the listed ones over what is behind the k-th key.
    knots = tl.arange(0, KNOTS)
    total = tl.zeros((KNOTS,), tl.float32)
    is_rest = used & ~is_listed
    factor = tl.exp2((from_ordered(maxima) - shift) * scale)
    raised = factor
    for knot in tl.static_range(len(STEPS)):
        raised = next_power(raised, factor, STEPS, knot)
        sums = tl.load(sums_ptr + knot * BLOCKS + block, mask=is_rest, other=0.0)
        total += tl.where(knots == knot, tl.sum(tl.where(is_rest, sums * raised, 0.0), 0), 0.0)
    for start in range(0, listed, MEMBERS // W):
        x, token, here = listed_members(x_ptr, list_ptr, start, listed, size, W, MEMBERS)
        behind = here & ((ordered(x).to(tl.int64) << 32) - token < last_key)
        root = tl.where(behind, tl.exp2((x - shift) * scale), 0.0)
        power = root
        for knot in tl.static_range(len(STEPS)):
            power = next_power(power, root, STEPS, knot)
            total += tl.where(knots == knot, tl.sum(power, 0), 0.0)
    tl.store(rest_ptr + row * len(STEPS) + knots, total, mask=knots < len(STEPS))


def launch_constants(size: int, k: int, multiples: Sequence[int], tile: int = _TILE) -> dict[str, Any]:
    """What the kernel is compiled for: the sizes of its blocks, which are the same for most k.

    Several blocks for each entry of the head, so that few of their members are candidates; but of 64 tokens, where there
    are enough of them, since each leaves its sums in memory.
    """
    width = 64
    while width > 8 and size < 4 * width * (k + 1):
        width //= 2
    while size > width * _MOST_BLOCKS:
        width *= 2
    power_of_two = triton.next_power_of_2
    return {
        "W": width,
        "TILE": tile,
        "MEMBERS": min(1024, tile),
        "BLOCKS": power_of_two(triton.cdiv(size, tile) * tile // width),
        "PIECE": 32,
        "STEPS": tuple(high - low for low, high in zip((1, *multiples), multiples, strict=False)),
        "KNOTS": power_of_two(len(multiples)),
    }


def fused_head_and_rest(
    logits_NV: Tensor, k: int, base: float, multiples: Sequence[int], *, tile: int = _TILE
) -> tuple[Tensor, Tensor, Tensor]:
    """The min(k + 1, V) largest values [N, K] in descending order, equal ones by id, their ids, and the log of the sums
    over all but the first k [N, J], at the knots that are these multiples of a base.

    Nothing waits for the GPU.
    """
    count, size = logits_NV.shape
    if logits_NV.stride(-1) != 1:
        logits_NV = logits_NV.contiguous()
    constants = launch_constants(size, k, multiples, tile)
    blocks, most, room = constants["BLOCKS"], min(k + 1, size), max(_CANDIDATES * (k + 1), 64)
    values_NK = logits_NV.new_empty(count, most, dtype=torch.float32)
    ids_NK = logits_NV.new_empty(count, most, dtype=torch.int64)
    sums_NJ = values_NK.new_empty(count, len(multiples))
    maxima_NG = ids_NK.new_empty(count, blocks, dtype=torch.int32)
    with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
        head_and_rest_kernel[(count,)](
            logits_NV,
            logits_NV.stride(0),
            size,
            _readable(logits_NV),
            k,
            base / math.log(2.0),
            most,
            room,
            values_NK,
            ids_NK,
            sums_NJ,
            maxima_NG,
            values_NK.new_empty(count, len(multiples), blocks),
            torch.empty_like(maxima_NG),
            ids_NK.new_empty(count, room),
            **constants,
            num_warps=_WARPS,
        )
    # In float64, as everywhere: the last bits of a float32 logarithm differ between kernels.
    return values_NK, ids_NK, sums_NJ.double().log_().float()


def _readable(logits_NV: Tensor) -> int:
    """Places of each row that the memory of its tensor has: V, or the next multiple of 16, as many as are loaded at once
    where the mask of a load says so."""
    count, size = logits_NV.shape
    numbers = logits_NV.untyped_storage().nbytes() // logits_NV.itemsize - logits_NV.storage_offset()
    room = min(logits_NV.stride(0), numbers - (count - 1) * logits_NV.stride(0))
    whole = -(-size // 16) * 16
    return whole if room >= whole else size
