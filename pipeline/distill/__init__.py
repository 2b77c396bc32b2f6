"""Stage two: losses, the trainer, and `run`, which trains a recipe's students from the cache.

The way of a batch: `trainer` takes it from the cache, `student_loss` runs the student over it, `fused` computes loss
and gradient from hidden states; `loss` and `divergences` define them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recipe.schema import Recipe


def run(recipe: Recipe, students: Sequence[str] | None = None, partial: bool = False) -> None:
    """Train a recipe's students, by default all, from the run's cache; each continues from its last checkpoint.

    `partial` trains on the committed shards of an incomplete cache. The students' directories (`RunPaths.student`) hold
    what each training leaves. Raises RecipeError for settings that cannot be used and for unknown names,
    IncompleteError for a cache without the shards, MismatchError for a student that was begun with other settings or
    from another cache.
    """
    from .stage_two import train_students  # here, so that the import of this package does not load torch

    train_students(recipe, students, partial)
