"""How many rows a shard has: large files for large corpora, and enough shards for many tasks of small ones."""

from __future__ import annotations

from ..base.durable import read_json
from ..base.errors import recipe_error
from ..base.places import Place
from ..models.teacher_source import teacher_config
from ..recipe.choices import Profile
from ..recipe.paths import CachePaths
from ..recipe.schema import Recipe
from ..targets.supports import Support
from .signals import signals_of

SHARD_BYTES = 256 * 10**6
"""Of a shard of a large corpus: 10^12 tokens at 77 bytes are 300,000."""
_SHARDS = 256
"""Of a corpus that is smaller: tasks share shards, and a killed one loses one of them."""
_FEWEST_POSITIONS = 2**17
"""Of a shard, as long as the corpus has them: 10 MB at k = 64."""
_BYTES_PER_ENTRY: dict[Profile, float] = {"compact": 1.2, "fast": 3.0}
"""Of a kept entry; `compact` as in a cache of SmolLM2 (49,152 tokens)."""
_MASS_BYTES = 4.0
"""Of a position: the masses of head and tail."""
_BYTES_PER_COORDINATE: dict[Profile, float] = {"compact": 0.13, "fast": 2.0}
"""Of a coordinate of the tail's shape; `compact` as in a cache of SmolLM2 of rank 32 and step 0.15."""
TEXT_BYTES: dict[Profile, float] = {"compact": 1.1, "fast": 4.0}
"""Of a position: its token and its document."""


def estimated_bytes(support: Support, profile: Profile, rank: int = 0) -> float:
    """Bytes of the targets of a position, before anything is measured; `rank` is that of the tail's shape."""
    return _BYTES_PER_ENTRY[profile] * support.entry_limit + _BYTES_PER_COORDINATE[profile] * rank + _MASS_BYTES


def automatic_rows(rows: int, row_length: int, bytes_per_position: float) -> int:
    """Rows per shard for a corpus of `rows`, all that is stored of a position in `bytes_per_position`: of about
    `SHARD_BYTES`; fewer where that gives less than 256 shards, but of 2^17 positions or more.
    """
    most = int(SHARD_BYTES / (bytes_per_position * row_length))
    fewest = -(-_FEWEST_POSITIONS // row_length)
    return max(min(most, max(-(-rows // _SHARDS), fewest)), 1)


def shard_rows_of(recipe: Recipe, cache: Place, rows: int) -> int:
    """Rows per shard of a cache of the recipe, training or held-out, with a corpus of `rows`.

    Where the recipe says `auto`, what a cache that is begun says, else `automatic_rows`. Raises RecipeError for signals
    that the teacher does not have.
    """
    keep = recipe.cache
    if keep.shard_rows != "auto":
        return keep.shard_rows
    begun = read_json(CachePaths(cache).manifest, "restore it or delete the cache")
    found = begun.get("layout", {}).get("shard_rows") if isinstance(begun, dict) else None
    if type(found) is int and found > 0:
        return found
    if cache == recipe.paths.heldout:
        size = estimated_bytes(Support("topk", k=keep.heldout_k), "compact", keep.rank) + TEXT_BYTES["compact"]
    else:
        size = estimated_bytes(Support.from_recipe(keep), keep.profile, keep.rank) + TEXT_BYTES[keep.profile]
        if keep.signals:
            config = teacher_config(recipe)
            with recipe_error("cache"):
                signals = signals_of(keep.signals, config, recipe.corpus.row_length)
            size += sum(signal.bytes_per_position for signal in signals)
    return automatic_rows(rows, recipe.corpus.row_length, size)
