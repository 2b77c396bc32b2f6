"""Recipes by path and by name, as the commands take them."""

from pathlib import Path

import pytest
from logit_cache.base.errors import RecipeError
from logit_cache.stages.options import find_recipe, read_recipe

RECIPE = """
run_dir = "runs/x"

[teacher]
model = "some/teacher"

[corpus]
source = "text.txt"
"""


def test_a_shipped_recipe_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo").name == "demo.toml"
    assert read_recipe("demo", None).students
    # A file of that name in the working directory comes first; a directory of that name is in nobody's way.
    (tmp_path / "demo").mkdir()
    assert find_recipe("demo").parent.name == "recipes"
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text(RECIPE, encoding="utf-8")
    assert read_recipe("demo", None).teacher.model == "some/teacher"


def test_an_unknown_recipe_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no-such.*no shipped recipe.*demo") as caught:
        read_recipe("no-such", None)
    assert len(str(caught.value).splitlines()) == 1


def test_a_recipe_of_a_similar_name_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RECIPE, encoding="utf-8")
    for path, said in {
        "dmeo": "did you mean 'demo'?",
        str(tmp_path / "mien.toml"): f"did you mean '{tmp_path / 'mine.toml'}'?",
        str(tmp_path): "is a directory, not a recipe file",
    }.items():
        with pytest.raises(RecipeError) as caught:
            read_recipe(path, None)
        assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1
