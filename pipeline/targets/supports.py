"""Supports: the rules that choose which tokens of a full distribution a target keeps, and which it samples.

    topk        the k most probable tokens
    topp        the fewest most probable tokens of total mass p, at most k
    threshold   every token with p_v >= tau; of the others n = ceil(their mass / tau) draws by systematic resampling, each
                of weight mass / n. The optimal-threshold scheme of Fearnhead & Clifford (2003, section 3): unbiased,
                total weight exactly 1
    sampled     n independent draws with replacement, each of weight 1/n (Random Sampling KD, arXiv 2503.16870,
                section 3.3)

Draws are a function of the distribution and of one seed per position; other rows of a batch do not change them.

Shapes: N positions, V vocabulary, K kept entries, S samples (draws).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from ..recipe.choices import MAX_DRAWS, SupportName

if TYPE_CHECKING:
    from ..recipe.schema import CacheConfig

_PARAMETERS = {"topk": ("k",), "topp": ("k", "p"), "threshold": ("tau",), "sampled": ("draws",)}


@dataclass(frozen=True)
class Support:
    """A rule that chooses entries, with exactly the parameters that it needs."""

    name: SupportName
    k: int | None = None
    p: float | None = None
    tau: float | None = None
    draws: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown name, and for parameters that are missing or out of range."""
        if self.name not in get_args(SupportName):
            raise ValueError(f"unknown support {self.name!r}: choose one of {', '.join(get_args(SupportName))}")
        for key in _PARAMETERS[self.name]:
            if getattr(self, key) is None:
                raise ValueError(f"support {self.name!r} needs {key}")
        if self.p is not None and not 0 < self.p <= 1:
            raise ValueError(f"p = {self.p} is outside (0, 1]")
        if self.tau is not None and not 1 / MAX_DRAWS <= self.tau <= 1:
            raise ValueError(f"tau = {self.tau} is outside [1/{MAX_DRAWS}, 1]")
        if self.draws is not None and not 1 <= self.draws <= MAX_DRAWS:
            raise ValueError(f"draws = {self.draws} is outside 1..{MAX_DRAWS}")

    @classmethod
    def of(cls, name: SupportName, **parameters: Any) -> Support:
        """The support `name`; parameters that it does not need are ignored. Raises ValueError as `__init__`."""
        return cls(name, **{key: parameters.get(key) for key in _PARAMETERS.get(name, ())})

    @classmethod
    def from_recipe(cls, cache: CacheConfig) -> Support:
        """The support of a recipe's [cache] section."""
        return cls.of(cache.support, k=cache.head_tokens, p=cache.p, tau=cache.tau, draws=cache.draws)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def has_head(self) -> bool:
        return self.name != "sampled"

    @property
    def has_samples(self) -> bool:
        return self.name in ("threshold", "sampled")

    @property
    def varies(self) -> bool:
        """Whether the number of entries differs between positions."""
        return self.name != "topk"

    @property
    def head_limit(self) -> int:
        """The largest number of head entries of a position."""
        if self.tau is not None:
            return math.floor(1 / self.tau * (1 + 1e-9))
        return 0 if self.k is None else self.k

    @property
    def entry_limit(self) -> int:
        """The largest number of entries of a position: head and samples."""
        if self.tau is not None:
            # Head tokens have probability tau or more, and the draws are ceil(rest / tau).
            return self.head_limit + 1
        return self.head_limit if self.draws is None else self.draws

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for a k outside the vocabulary."""
        if self.k is not None and not 1 <= self.k <= vocab_size:
            raise ValueError(f"k = {self.k} is outside 1..{vocab_size}, the size of the vocabulary")

    def head_mask(self, log_p_NK: Tensor) -> Tensor:
        """[N, K] bool, a prefix of each row: which of the `head_limit` most probable tokens are in the head."""
        if self.p is not None:
            p_NK = log_p_NK.exp()
            # A token is needed while the mass before it is below p.
            return p_NK.cumsum(-1) - p_NK < self.p
        if self.tau is not None:
            return log_p_NK >= math.log(self.tau)
        return torch.ones_like(log_p_NK, dtype=torch.bool)

    def points(self, tail_mass_N: Tensor, seeds_N: Tensor) -> tuple[Tensor, Tensor]:
        """Where the cumulative distribution of the tail is read, one draw each: points [N, S] float64 in [0, 1), and
        whether a draw is wanted there [N, S] bool. `tail_mass_N` is the tail's probability at T = 1.
        """
        if self.draws is not None:
            points_NS = uniforms(seeds_N, self.draws)
            return points_NS, torch.ones_like(points_NS, dtype=torch.bool)
        assert self.tau is not None
        count_N1 = torch.ceil(tail_mass_N.double() / self.tau).long().clamp(max=self.entry_limit).unsqueeze(-1)
        steps_S = torch.arange(self.entry_limit, device=seeds_N.device)
        wanted_NS = steps_S < count_N1
        points_NS = (steps_S.double() + uniforms(seeds_N, 1)) / count_N1.clamp(min=1)
        return torch.where(wanted_NS, points_NS, 0.0), wanted_NS


def position_seeds(seed: int, rows: Tensor, positions: Tensor) -> Tensor:
    """One int64 per (seed, row, position); rows and positions are int64 tensors of one shape, which the result has."""
    start = torch.full_like(rows, seed)
    return _mix(_mix(_mix(start) + rows) + positions)


def row_seeds(seed: int, rows_B: np.ndarray[Any, np.dtype[np.int64]], length: int) -> Tensor:
    """Row numbers in the corpus [B] -> the seeds of all their positions [B, length] int64."""
    rows_BL = torch.from_numpy(rows_B)[:, None].expand(-1, length)
    return position_seeds(seed, rows_BL, torch.arange(length).expand_as(rows_BL))


def uniforms(seeds_N: Tensor, count: int) -> Tensor:
    """[N, count] float64 in [0, 1), each a function of its seed and column alone."""
    columns = torch.arange(1, count + 1, device=seeds_N.device, dtype=torch.int64)
    bits = _mix(seeds_N.unsqueeze(-1) + columns * _GOLDEN)
    return _shift(bits, 11).double() * 2.0**-53


_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Right shift of an int64 as if it were unsigned."""
    return (x >> by) & ((1 << (64 - by)) - 1)
