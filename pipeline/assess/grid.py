"""The settings that `plan` compares: supports, with the shape of their tails, knots and profile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..recipe.choices import DEFAULT_KNOTS, Profile
from ..recipe.schema import CacheConfig
from ..store.codec import TargetCodec
from ..store.coordinates import CoordinateCodec
from ..targets.supports import Support


@dataclass(frozen=True)
class Setting:
    """One way to keep a teacher."""

    support: Support
    knots: tuple[float, ...] = (*DEFAULT_KNOTS, 1.0)
    profile: Profile = "compact"
    rank: int = 0
    """Coordinates of a tail's shape; 0: a bucket."""
    step: float = 0.0
    """That to which coordinates are rounded."""

    @classmethod
    def from_recipe(cls, cache: CacheConfig, largest_rank: int) -> Setting:
        """The setting of a recipe's [cache] section; `largest_rank` is that of the teacher's bases."""
        rank = min(cache.rank, largest_rank)
        step = cache.tail_step if rank else 0.0
        return cls(Support.from_recipe(cache), tuple(cache.knots), cache.profile, rank, step)

    def codec(self, like: TargetCodec) -> TargetCodec:
        """The codec of this setting, before anything is learned; `like` has everything that settings share."""
        shape = CoordinateCodec(self.rank, self.step, predicted=self.profile == "compact") if self.rank else None
        return replace(like, support=self.support, knots=self.knots, profile=self.profile, coordinates=shape)

    def to_json(self) -> dict[str, Any]:
        support = self.support.to_json()
        return {"setting": str(self), "support": support, "rank": self.rank, "step": self.step, "profile": self.profile}

    def __str__(self) -> str:
        numbers = {key: value for key, value in self.support.to_json().items() if key != "name"}
        shape = [f"r={self.rank}", f"step={self.step:g}"] if self.rank else []
        only = ["T=1"] if self.knots == (1.0,) else []
        fast = ["fast"] if self.profile == "fast" else []
        return " ".join(
            [self.support.name, *(f"{key}={value:g}" for key, value in numbers.items()), *shape, *only, *fast]
        )


def grid(own: Setting, step: float, largest_rank: int, vocab_size: int, full: bool = False) -> tuple[Setting, ...]:
    """The settings of the table, the recipe's own first; samples also for T = 1 alone, where they need a third less.

    Shapes have the given step, that of the recipe, and 0.1: on SmolLM2 (rank 32) the top 8 in steps of 0.1 take 1.5
    bytes less than the top 12 in steps of 0.2 and have a lower KL(p || p^), 0.215 instead of 0.222 at T = 1. The full grid has more ranks, steps and supports.
    """
    knots = own.knots
    ranks = (16, 32, 64, 128) if full else (16, 32, 64)
    steps = sorted({step, 0.1, 0.15, 0.2} if full else {step, 0.1})
    shapes = (
        Setting(Support("topk", k=k), knots, rank=rank, step=step)
        for rank in ranks
        for k in (8, 12, 16, 24, 32, 64)
        for step in steps
        if rank <= largest_rank
    )
    prefixes = (
        *(Support("topk", k=k) for k in (8, 16, 32, 64, 128)),
        *(Support("topp", k=128, p=p) for p in (0.9, 0.98)),
    )
    thresholds, draws = ((0.1, 0.05, 0.02), (20, 50)) if full else ((0.05,), (50,))
    samples = (
        *(Support("threshold", tau=tau) for tau in thresholds),
        *(Support("sampled", draws=draws) for draws in draws),
    )
    others = (
        *(Setting(support, knots) for support in prefixes),
        Setting(Support("topk", k=64), knots, "fast"),
        *(Setting(support, some) for support in samples for some in dict.fromkeys((knots, (1.0,)))),
    )
    possible = (setting for setting in (*shapes, *others) if (setting.support.k or 1) <= vocab_size)
    return tuple(dict.fromkeys((own, *possible)))
