"""Supports: the rules that choose which tokens of a full distribution a target keeps, and which it samples.

    topk        the k most probable tokens
    topp        the fewest most probable tokens of total mass p, at most k
    threshold   every token with p_v >= tau; of the others n = ceil(their mass / tau) draws by systematic resampling, each
                of weight mass / n. The optimal-threshold scheme of Fearnhead & Clifford (2003, section 3): unbiased,
                total weight exactly 1
    sampled     n independent draws with replacement, each of weight 1/n (Random Sampling KD, arXiv 2503.16870,
                section 3.3)

Draws are a function of the distribution and of one seed per position; other rows of a batch do not change them.

Shapes: N positions, V vocabulary, K kept entries, S samples (draws); G blocks of W neighbouring tokens.
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
_BLOCK = 256  # tokens per block of the inverted distribution


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

    def draw(self, tail_NV: Tensor, tail_mass_N: Tensor, seeds_N: Tensor) -> Tensor:
        """Samples of the tail: ids [N, S] int64, -1 in unused places.

        `tail_NV` holds logits, -inf on the head, and is overwritten; `tail_mass_N` is the tail's probability at T = 1.
        """
        if self.draws is not None:
            points_NS = uniforms(seeds_N, self.draws)
            count_N = torch.full_like(seeds_N, self.draws)
        else:
            assert self.tau is not None
            limit = self.entry_limit
            count_N = torch.ceil(tail_mass_N.double() / self.tau).long().clamp(max=limit)
            steps = torch.arange(limit, device=tail_NV.device, dtype=torch.float64)
            points_NS = (steps + uniforms(seeds_N, 1)) / count_N.clamp(min=1).unsqueeze(-1)
        wanted_NS = torch.arange(points_NS.shape[1], device=tail_NV.device) < count_N.unsqueeze(-1)
        ids_NS = _invert(tail_NV, torch.where(wanted_NS, points_NS, 0.0))
        return torch.where(wanted_NS, ids_NS, -1)


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


def _invert(x_NV: Tensor, points_NS: Tensor) -> Tensor:
    """Token ids [N, S] at which the cumulative distribution of softmax(x) passes the points [N, S] in [0, 1).

    Two levels: the cumulative sums of blocks of tokens, then those inside the block of each point. Running sums are
    float64: 49,152 float32 roundings would favour some tokens. No token of probability 0 is returned. Where x has NaN
    any tokens are: an index outside would cost a GPU its context.
    """
    count, vocab_size = x_NV.shape
    max_N1 = x_NV.amax(-1, keepdim=True)
    # An empty tail has no draws, but NaN would index outside.
    e_NV = x_NV.sub_(torch.where(torch.isneginf(max_N1), 0.0, max_N1)).exp_()
    if vocab_size % _BLOCK:
        e_NV = torch.nn.functional.pad(e_NV, (0, -vocab_size % _BLOCK))
    e_NGW = e_NV.view(count, -1, _BLOCK)
    cdf_NG = e_NGW.sum(-1).double().cumsum(-1)
    targets_NS = points_NS * cdf_NG[:, -1:]
    blocks_NS = _first_above(cdf_NG, targets_NS)
    before_NS = torch.where(blocks_NS > 0, cdf_NG.gather(-1, (blocks_NS - 1).clamp(min=0)), 0.0)
    rows_N1 = torch.arange(count, device=x_NV.device).unsqueeze(-1)
    inner_NSW = e_NGW[rows_N1, blocks_NS].double().cumsum(-1)
    inside_NS = _first_above(inner_NSW.flatten(0, 1), (targets_NS - before_NS).reshape(-1, 1)).view_as(blocks_NS)
    return (blocks_NS * _BLOCK + inside_NS).clamp_(max=vocab_size - 1)


def _first_above(cdf: Tensor, points: Tensor) -> Tensor:
    """[N, S] the first place of a cumulative sum [N, M] above each point, or the last rise if none is above."""
    found = torch.searchsorted(cdf, points, right=True)
    last = torch.searchsorted(cdf, cdf[..., -1:].contiguous())
    return torch.minimum(found, last).clamp_(max=cdf.shape[-1] - 1)  # NaN is above none
