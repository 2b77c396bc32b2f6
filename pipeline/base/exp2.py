"""Parts of compiled loops over rows of float32 numbers: the exponential, and the largest of a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

Array = np.ndarray[Any, np.dtype[Any]]
_LOWEST = np.float32(-127)
_ROUNDS = np.float32(1.5 * 2**23)
"""x + this - this is x rounded to an integer for |x| < 2^22; the low bits of x + this are that integer."""
# 2^x on [-1/2, 1/2]: interpolation at Chebyshev points, to 8e-8 of its value.
_EXP2 = tuple(
    np.float32(c)
    for c in np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 5, [-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)


@register_jitable(fastmath={"contract"})
def exp2(y: Any) -> Any:
    """2^y for float32 y <= 0; 0 below -126.5. Without `reassoc`, which would undo the rounding."""
    c0, c1, c2, c3, c4, c5 = _EXP2
    y = _LOWEST if y < _LOWEST else y  # NaN compares false and stays NaN
    rounded = np.float32(y + _ROUNDS)
    two = np.int32((rounded.view(np.int32) << np.int32(23)) + np.int32(127 << 23)).view(np.float32)
    f = y - (rounded - _ROUNDS)
    return (c0 + f * (c1 + f * (c2 + f * (c3 + f * (c4 + f * c5))))) * two


@register_jitable
def largest(x_V: Array) -> Any:
    """The largest of a row of float32 numbers."""
    bits_V = x_V.view(np.int32)
    most = np.int32(-(2**31))
    for v in range(len(bits_V)):
        # The bits of negative numbers but the sign are inverted: integers of the same order.
        ordered = np.int32(bits_V[v] ^ ((bits_V[v] >> 31) & 0x7FFFFFFF))
        most = max(most, ordered)
    return np.int32(most ^ ((most >> 31) & 0x7FFFFFFF)).view(np.float32)
