"""A recipe file becomes a Recipe: read, overridden, merged, checked; and back to TOML with every default filled in."""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from ..base.durable import write_bytes
from ..base.errors import RecipeError
from .schema import Recipe
from .student import StudentConfig, seeded_name


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check the recipe in a TOML file.

    `overrides` are `section.key=value` strings; a value is TOML, or a plain string where it is no valid TOML.

    Raises RecipeError, in one line that names the key and the remedy.
    """
    file = Path(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe file {str(path)!r}") from error
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
    if students:
        table["students"] = _one_seed_each(students, file)
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError(f"{file}: {_first_problem(error)}") from error


def _one_seed_each(students: dict[str, Any], file: Path) -> dict[str, Any]:
    """The students, those of several seeds as one of each seed."""
    found = {}
    for name, student in students.items():
        seeds = student.get("seeds")
        if not isinstance(seeds, list) or len(seeds) < 2:  # a wrong type is refused with the other keys
            found[name] = student
            continue
        for seed in seeds:
            own = {**student, "seeds": [seed]}
            if isinstance(own.get("model"), str):
                own["model"] = own["model"].replace("{seed}", str(seed))
            if (own_name := seeded_name(name, seed)) in {**students, **found}:
                raise RecipeError(f"{file}: students.{name}.seeds: there are two students {own_name!r}")
            found[own_name] = own
    return found


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


_TYPE_NAMES = ("int", "float", "str", "list[int]", "list[str]", "Schedule")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    # Where a key takes several types, pydantic appends the type to the location.
    location = tuple(part for part in problem["loc"] if part not in _TYPE_NAMES)
    name = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(location, _section_at(location[:-1]))
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] in ("model_type", "dict_type"):
        return f"{name} is a table, [{name}], not {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool, list)) else ""
    return f"{name or 'recipe'}: {message}{shown}"


def _section_at(location: tuple[str | int, ...]) -> type[BaseModel]:
    """The section at a location; names of students and caches, which are free, are skipped."""
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
    name, key = ".".join(str(part) for part in location), str(location[-1])
    elsewhere = [f"{section}.{key}" for section, keys in _sections().items() if key in keys]
    nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if elsewhere:
        hint = f"did you mean {' or '.join(map(repr, elsewhere))}?"
    else:
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys are {', '.join(valid)}"
    return f"unknown key {name!r}: {hint}"


def _sections() -> dict[str, list[str]]:
    """The keys of every section, by its name in a recipe."""
    found = {name: _section_in(field.annotation) for name, field in Recipe.model_fields.items() if name != "students"}
    found["train"] = StudentConfig
    return {name: list(section.model_fields) for name, section in found.items() if section is not None}
