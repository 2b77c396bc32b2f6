"""The core stands alone: what extras bring is imported where it is used, and asked for by name where it is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.helpers.imports import PACKAGE, REPOSITORY, imported_names, source_files

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = ("matplotlib", "peft", "trl", "tensorboard", "gguf", "wandb", "s3fs", "trackio")
# Importing a blocked module fails as if it were not installed.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])
sys.meta_path.insert(0, Absent())
"""


def run(code: str, absent: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    script = BLOCK.format(absent=absent) + code
    return subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["", "train", "import", "compare", "report"])
def test_help_needs_neither_torch_nor_extras(command: str) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    absent = (
        *EXTRAS,
        "jinja2",
        "torch",
        "transformers",
        "datasets",
        "pyarrow",
        "zarr",
        "numcodecs",
        "accelerate",
        "numpy",
    )
    done = run(f"from logit_cache.stages.app import main\nsys.exit(main({arguments!r}))", absent)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.slow
def test_every_module_but_the_report_needs_the_core_alone() -> None:
    # Those that transformers and torch do not themselves look for.
    absent = ("matplotlib", "gguf", "s3fs")
    names = sorted(
        f"logit_cache.{p.parent.name}.{p.stem}"
        for p in (REPOSITORY / "pipeline").glob("*/*.py")
        if p.stem not in ("__init__", "report", "figures")
    )
    done = run(f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)", absent)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("command", "recipe"), [("report", "demo"), ("study", "study")])
def test_a_missing_extra_is_asked_for_by_name(command: str, recipe: str, tmp_path: Path) -> None:
    code = f"from logit_cache.stages.app import main\nsys.exit(main(['{command}', '{recipe}', '--set', 'run_dir={tmp_path}']))"
    done = run(code, ("matplotlib",))
    assert done.returncode == 2 and "pip install 'logit-cache[plots]'" in done.stderr
    assert not list(tmp_path.iterdir()), "said before anything is done"
    assert "Traceback" not in done.stderr


def declared(requirements: list[str]) -> set[str]:
    """Names of distributions as the package index writes them."""
    return {re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_extras_and_ranges_are_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"s3", "wandb", "gguf", "plots", "dev"} <= set(extras)
    assert not declared(PROJECT["dependencies"]) & set(EXTRAS)
    for requirement in PROJECT["dependencies"]:
        assert ">=" in requirement, f"{requirement} has no lower bound"


def test_every_import_is_declared_and_every_declaration_imported() -> None:
    """Directly: what another dependency brings along today it may leave out tomorrow."""
    used = {name.split(".")[0] for module, file in source_files().items() for name in imported_names(module, file)}
    # Where a notebook or a GPU is, there they are: a kernel brings IPython, and torch's builds for GPUs triton.
    used -= sys.stdlib_module_names | {PACKAGE, "IPython", "triton"}
    distributions = packages_distributions()
    packages = {name: {entry.lower().replace("_", "-") for entry in distributions.get(name, [name])} for name in used}
    extras = PROJECT["optional-dependencies"]
    users = [requirement for name, group in extras.items() if name != "dev" for requirement in group]
    known = declared(PROJECT["dependencies"] + users)
    undeclared = sorted(name for name, owners in packages.items() if not owners & known)
    assert not undeclared, f"imported, but not in pyproject.toml: {undeclared}"
    # Used without an import: codecs of zarr, the format of weights, file systems, loggers of transformers' Trainer, a font.
    indirect = {"numcodecs", "safetensors", "s3fs", "wandb", "trackio", "tensorboard", "koreanize-matplotlib"}
    unused = known - set().union(*packages.values()) - indirect
    assert not unused, f"in pyproject.toml, but not imported: {unused}"
