"""One tail basis for targets of several: the rows of a batch may come from teachers, or caches, with bases of their
own.

With offsets a_s and directions U_s of basis s, and m the mean of the offsets,

    offset      m
    directions  [a_1 - m, U_1, a_2 - m, U_2, ...]                   r = sum over s of (1 + r_s)
    z           [0, 0, ..., 1, z_s, ..., 0]                         of a position with coordinates z_s in basis s

so that every position has the logits of its own basis.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from .basis import TailBasis, same_basis

_ABSENT = -1e4
"""Logit of a token that a basis does not have: far below those of all others, so that its probability is 0."""
_known: WeakValueDictionary[tuple[TailBasis, ...], TailBasis] = WeakValueDictionary()
"""Joint bases in use by what they join: each is made once in a process."""


def distinct(bases: Sequence[TailBasis]) -> list[TailBasis]:
    """The bases that differ, in order."""
    found: list[TailBasis] = []
    for basis in bases:
        if not any(same_basis(basis, other) for other in found):
            found.append(basis)
    return found


def can_join(bases: Sequence[TailBasis]) -> bool:
    """Whether `join_bases` serves these bases: one soft-capping, which also bounds logits of tokens that a basis
    lacks."""
    one = len({basis.softcap for basis in bases}) == 1
    return one and (bases[0].softcap is None or len({basis.vocab_size for basis in bases}) == 1)


def join_bases(*bases: TailBasis) -> TailBasis:
    """The joint basis of distinct bases; one basis is its own. Raises ValueError unless they `can_join`."""
    if len(bases) == 1:
        return bases[0]
    if not can_join(bases):
        raise ValueError(
            "bases of different soft-capping cannot be joined, nor soft-capped ones of different vocabularies"
        )
    joint = _known.get(bases)
    if joint is None:
        vocab_size = max(basis.vocab_size for basis in bases)
        offsets = torch.stack([pad(b.offset, (0, vocab_size - b.vocab_size), value=math.nan) for b in bases])
        mean = offsets.nanmean(0)
        columns = []
        for offset, basis in zip(offsets, bases, strict=True):
            columns += [(offset - mean).nan_to_num(_ABSENT).unsqueeze(-1)]
            columns += [pad(basis.directions, (0, 0, 0, vocab_size - basis.vocab_size))]
        digests = "+".join(basis.digest for basis in bases)
        joint = TailBasis(
            mean,
            torch.cat(columns, -1).T.contiguous().T,
            bases[0].softcap,
            hashlib.sha256(digests.encode()).hexdigest() if all(basis.digest for basis in bases) else "",
            (join_bases, bases),
        )
        _known[bases] = joint
    return joint


def joint_coordinates(coordinates: Tensor, basis: TailBasis, bases: Sequence[TailBasis]) -> Tensor:
    """Coordinates [..., r_s] in one of the joined bases -> [..., r] in their joint basis."""
    if len(bases) == 1:
        return coordinates
    number = next(number for number, other in enumerate(bases) if same_basis(basis, other))
    before = sum(1 + other.rank for other in bases[:number])
    after = sum(1 + other.rank for other in bases[number + 1 :])
    return pad(pad(coordinates, (1, 0), value=1.0), (before, after))
