"""The models that an explorer shows beside the teacher: runs, students and other models, by their places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.errors import IncompleteError
from ..models.any_model import check_same_tokens, open_model
from ..models.placement import Placement
from ..recipe.paths import StudentPaths
from ..store.reader import LogitCache


def named_models(sources: Sequence[str]) -> dict[str, str]:
    """Name -> directory or hub name of the models that `sources` mean: all trained students of a run's directory, one
    student (RUN/students/NAME), a model's directory, a GGUF file, or a name of the hub.

    Raises IncompleteError for a run without a trained student.
    """
    places: list[tuple[str, str]] = []
    for source in sources:
        folder = Path(source)
        if (folder / "students").is_dir():
            trained = [path for path in sorted((folder / "students").iterdir()) if StudentPaths(path).finished]
            if not trained:
                raise IncompleteError(f"{folder}: no student is trained: run `logit-cache train` first")
            places += [(path.name, str(StudentPaths(path).final)) for path in trained]
        elif StudentPaths(folder).finished:
            places.append((folder.resolve().name, str(StudentPaths(folder).final)))
        else:
            places.append((folder.name or source, source))
    named: dict[str, str] = {}
    for name, place in places:
        number = 1
        while (unique := name if number == 1 else f"{name} ({number})") in named:
            number += 1
        named[unique] = place
    return named


def load_beside(cache: LogitCache, places: dict[str, str], placement: Placement) -> dict[str, Any]:
    """Load models by name, to predict the rows of a cache.

    Raises MismatchError for a model with another tokenizer, RecipeError for one that cannot be loaded.
    """
    for place in places.values():
        check_same_tokens(place, cache.tokenizer_dir)
    return {name: open_model(place, placement, cache.objective) for name, place in places.items()}
