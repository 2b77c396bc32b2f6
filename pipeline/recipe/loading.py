"""loading."""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import (
    BaseModel,
    ValidationError,
)

from ..base.durable import write_bytes
from ..base.errors import RecipeError
from .schema import Recipe
from .student import StudentConfig


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    `path` is a TOML file, or the bare name of a recipe that ships with the project (`demo`). `overrides` are
    `section.key=value` strings; values are TOML, and what is not valid TOML is taken as a string.

    Raises RecipeError with one line that names the key and the way out.
    """
    file = find_recipe(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: not valid TOML: {error}") from error
    for override in overrides or []:
        _apply_override(table, override)
    defaults = table.pop("train", {})
    students = table.get("students", {})
    if not isinstance(defaults, dict) or not isinstance(students, dict):
        raise RecipeError(f"{file}: [train] and [students.NAME] must be tables")
    unknown = [key for key in defaults if key not in StudentConfig.model_fields]
    if unknown:
        raise RecipeError(f"{file}: {_unknown_key(('train', unknown[0]), StudentConfig)}")
    for name, student in students.items():
        if not isinstance(student, dict):
            raise RecipeError(f"{file}: students.{name} must be a table, [students.{name}]")
        starts = ("layers", "model", "architecture")
        # A student that names its own start replaces the common one instead of adding a second.
        own_start = any(key in student for key in starts)
        common = {key: value for key, value in defaults.items() if not (own_start and key in starts)}
        students[name] = {**common, **student}
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError(f"{file}: {_first_problem(error)}") from error


def find_recipe(path: str | Path) -> Path:
    """Return the file of a recipe given by path or, for those that ship with the project, by bare name."""
    file = Path(path)
    if file.is_file():
        return file
    shipped_dir = Path(__file__).parent.parent / "stages" / "recipes"
    shipped = shipped_dir / f"{path}.toml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(p.stem for p in shipped_dir.glob("*.toml")))
    raise RecipeError(f"no recipe file {str(path)!r}, and no shipped recipe of that name (there are: {names})")


def save_resolved(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default and override filled in, as TOML."""
    write_bytes(path, resolved_toml(recipe).encode())


def resolved_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML text, itself a valid recipe."""
    return tomli_w.dumps(json.loads(recipe.model_dump_json(exclude_none=True)))


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r}: write section.key=value, for example --set students.student.steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    node = table
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override!r}: {parent} is a value, not a table")
    node[last] = value


_KINDS = ("int", "float", "str", "list[int]", "list[str]", "Schedule")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    # Of a value that may be of several kinds, the location ends in the kind.
    location = tuple(part for part in problem["loc"] if part not in _KINDS)
    name = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(location, _section_at(location[:-1]))
    if problem["type"] == "missing":
        return f"{name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool, list)) else ""
    return f"{name or 'recipe'}: {message}{shown}"


def _section_at(location: tuple[str | int, ...]) -> type[BaseModel]:
    """The section that a location leads to; names of students and caches are passed over."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        section = (None if field is None else _section_in(field.annotation)) or section
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part)) is not None), None)


def _unknown_key(location: tuple[str | int, ...], section: type[BaseModel]) -> str:
    valid = [*section.model_fields, *(["train"] if section is Recipe else [])]
    name = ".".join(str(part) for part in location)
    nearest = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys are {', '.join(valid)}"
    return f"unknown key {name!r}: {hint}"
