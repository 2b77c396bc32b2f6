"""The rooms of pipeline/ and their order: a module imports from its own room and from earlier ones."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter

from tests.helpers.imports import PACKAGE, REPOSITORY, imported_names, source_files

# The three last do not import each other.
ORDER = (
    ("base",),
    ("recipe",),
    ("corpus",),
    ("models",),
    ("targets",),
    ("store",),
    ("capture",),
    ("distill",),
    ("assess",),
    ("exchange", "cluster", "lab"),
    ("stages",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# The package's own module names what users import, and __main__ starts the command line: both know every room.
FRONT = {PACKAGE, f"{PACKAGE}.__main__"}

MODULES = source_files()
IMPORTS = {
    module: {name for name in imported_names(module, file) if name in MODULES and name != module}
    for module, file in MODULES.items()
}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_folder_of_the_package_has_a_place_in_the_order() -> None:
    folders = {file.parent.name for file in (REPOSITORY / "pipeline").glob("*/__init__.py")} | {"stages"}
    assert folders == set(LEVEL)


def test_imports_go_only_to_earlier_rooms() -> None:
    backwards = [
        f"{module} imports {imported}"
        for module in MODULES.keys() - FRONT
        for imported in IMPORTS[module]
        if imported not in FRONT and room_of(imported) != room_of(module)
        if LEVEL[room_of(imported)] >= LEVEL[room_of(module)]
    ]
    assert not backwards, "\n".join(sorted(backwards))
    upwards = [module for module in MODULES.keys() - FRONT if IMPORTS[module] & FRONT]
    assert not upwards, f"these import the package from inside: {upwards}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: IMPORTS[module] - FRONT for module in MODULES.keys() - FRONT}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_imports_inside_the_package_are_relative() -> None:
    """A user's folders named pipeline and stages, or another version of the package, never come between."""
    start = re.compile(rf"\s*(from|import) ({PACKAGE}|pipeline|stages)\b")
    absolute = [
        f"{module}: {line.strip()}"
        for module, file in MODULES.items()
        for line in file.read_text(encoding="utf-8").splitlines()
        if start.match(line)
    ]
    assert not absolute, "\n".join(absolute)


def test_the_package_links_to_every_folder_and_to_nothing_else() -> None:
    package = REPOSITORY / ".src" / PACKAGE
    expected = {
        entry.name: entry
        for entry in (REPOSITORY / "pipeline").iterdir()
        if (entry.is_dir() and entry.name != "__pycache__") or entry.suffix == ".py" or entry.name == "py.typed"
    }
    expected["stages"] = REPOSITORY / "stages"
    links = {link.name: link for link in package.iterdir() if link.name != "__pycache__"}
    assert links.keys() == expected.keys()
    for name, link in links.items():
        assert link.is_symlink() and not link.readlink().is_absolute() and link.resolve() == expected[name].resolve()
