"""Files that only a host or a tool reads: they parse, and they say the same as pyproject.toml."""

from __future__ import annotations

import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.imports import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constraints() -> dict[str, str]:
    """Distribution -> exact version."""
    lines = (REPOSITORY / ".github/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_constraints_fit_the_ranges() -> None:
    """Every direct dependency is pinned inside its range; no version names a local build."""
    pins = constraints()
    extras = PROJECT["optional-dependencies"]
    groups = [
        PROJECT["dependencies"],
        *(extras[name] for name in ("gguf", "plots", "lora", "tensorboard", "s3", "dev")),
    ]
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name != PROJECT["name"]:
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}, but constraints.txt has {version}"
    assert not [name for name, version in pins.items() if "+" in version or "/" in version]


def test_workflows_parse_and_cover_the_supported_pythons() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert {"lint", "fast", "wheel", "all"} <= set(workflow["jobs"])
    matrix = workflow["jobs"]["fast"]["strategy"]["matrix"]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert {"highest", "lowest-direct"} == {
        *matrix["resolution"],
        *(entry["resolution"] for entry in matrix["include"]),
    }
    for name, job in workflow["jobs"].items():
        assert all({"uses", "run"} & set(step) for step in job["steps"]), name


def test_pre_commit_runs_the_pinned_ruff() -> None:
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = {hook["id"]: repository for repository in config["repos"] for hook in repository["hooks"]}
    assert {"ruff-check", "ruff-format", "mypy"} == set(hooks)
    assert hooks["ruff-check"]["rev"] == f"v{constraints()['ruff']}"


def test_no_document_line_is_over_120_characters() -> None:
    for file in (REPOSITORY / ".github").glob("*.md"):
        long = [n for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
        assert not long, f"{file.name}: lines {long}"
