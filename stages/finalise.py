"""`logit-cache finalise`: check the cache that several tasks wrote, and hand over what students need of the teacher."""

from __future__ import annotations

from .options import AcceptOption, RecipeArgument, SetOption, read_recipe


def finalise(recipe_path: RecipeArgument, accept: AcceptOption = None, set_: SetOption = None) -> None:
    """Check every byte of a cache that several tasks wrote, and export what students need of the teacher."""
    recipe = read_recipe(recipe_path, set_)
    from ..capture import finalise as finalise_caches

    finalise_caches(recipe, accept or ())
