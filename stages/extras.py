"""Packages of the optional extras: a missing one is an error that says how to install it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..base.errors import RecipeError

PLOTS = ("matplotlib", "jinja2")


@contextmanager
def plots_extra() -> Iterator[None]:
    """For imports that need the plots extra: raises RecipeError where one of its packages is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PLOTS:
            raise
        raise RecipeError(f"figures need {error.name}: pip install 'logit-cache[plots]'") from error
