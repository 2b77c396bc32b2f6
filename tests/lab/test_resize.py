"""A recipe is made as small as the minutes ask, and no smaller."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_cache.base.errors import RecipeError
from logit_cache.lab.resize import LEAST_STEPS, Speeds, measure_speeds, resized, run_seconds
from logit_cache.recipe.loading import load_recipe
from logit_cache.recipe.schema import Recipe
from logit_cache.stages.app import main
from logit_cache.stages.options import find_recipe

from tests.helpers.tiny import make_recipe

DEMO = load_recipe(find_recipe("demo"))
ABOUT = Speeds(start=10.0, teacher=4e-4, student=8e-4, update=0.1)
"""Those of two cores of 2024, in bfloat16."""


def sizes(recipe: Recipe) -> tuple[int, int, int, int]:
    step = recipe.students["student"]
    return recipe.corpus.max_rows or 0, recipe.corpus.max_heldout_rows or 0, step.steps, step.warmup_steps


@given(st.floats(0.01, 100.0), st.floats(60.0, 3600.0))
def test_what_fits_is_used_and_no_more(slowness: float, seconds: float) -> None:
    speeds = Speeds(*(slowness * value for value in (ABOUT.start, ABOUT.teacher, ABOUT.student, ABOUT.update)))
    small = resized(DEMO, speeds, seconds)
    assert all(part <= whole for part, whole in zip(sizes(small), sizes(DEMO), strict=True))
    smallest = resized(DEMO, speeds, 0.0)
    assert sizes(smallest)[2] == LEAST_STEPS
    if run_seconds(smallest, speeds) > seconds:
        assert sizes(small) == sizes(smallest)
    else:
        assert run_seconds(small, speeds) <= seconds
        rows, _, steps, _ = sizes(small)
        assert sizes(small) == sizes(DEMO) or (
            # One step more, with its rows, or the rounding of one, would not fit.
            run_seconds(with_sizes(small, rows + 5, steps + 2), speeds) > seconds - 3 * speeds.update
        )
        # Students see each row as often.
        assert abs(rows / steps - 4) <= 4 / LEAST_STEPS


def with_sizes(recipe: Recipe, rows: int, steps: int) -> Recipe:
    students = {name: student.model_copy(update={"steps": steps}) for name, student in recipe.students.items()}
    corpus = recipe.corpus.model_copy(update={"max_rows": rows, "max_heldout_rows": recipe.corpus.max_heldout_rows + 1})
    return recipe.model_copy(update={"corpus": corpus, "students": students})


def test_speeds_are_measured_and_the_recipe_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tiny teacher: the written recipe runs, and a second call keeps it."""
    recipe, small = make_recipe(tmp_path, corpus__max_rows=48, corpus__max_heldout_rows=16), tmp_path / "small.toml"
    arguments = ["resize", str(recipe), "--minutes", "60", "--output", str(small)]
    assert main(arguments) == 0
    assert load_recipe(small) == load_recipe(recipe)
    assert "48 of 48 rows" in capsys.readouterr().out
    before = small.read_bytes()
    assert main([*arguments, "--set", "corpus.max_rows=4"]) == 0
    assert small.read_bytes() == before


def test_what_cannot_be_resized(tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe(tmp_path))
    with pytest.raises(RecipeError, match="max_rows"):
        measure_speeds(recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"max_rows": None})}), 0.0)
    with pytest.raises(RecipeError, match="student"):
        measure_speeds(recipe.model_copy(update={"students": {}}), 0.0)
