"""The package's modules and what each imports, read from the source without running it."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
PACKAGE = "logit_cache"


def source_files() -> dict[str, Path]:
    """Dotted module name -> file, for all of pipeline/ and stages/."""
    found = {}
    for folder, package in (("pipeline", PACKAGE), ("stages", f"{PACKAGE}.stages")):
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = file.relative_to(REPOSITORY / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = file
    return found


def imported_names(module: str, file: Path) -> set[str]:
    """Absolute dotted names of all imports in a file: inside functions too, and those for the type checker alone.

    `from x import y` gives both x and x.y, as y may be a module.
    """
    package = module.split(".") if file.stem == "__init__" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names
