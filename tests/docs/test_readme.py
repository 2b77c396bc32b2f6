"""Every command and every code block of the README is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from logit_cache.recipe.schema import Recipe
from logit_cache.recipe.student import StudentConfig
from logit_cache.stages.app import main
from logit_cache.stages.options import read_recipe

from tests.conftest import PLAYS, REPOSITORY, TEXT

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# `make demo` in full takes a quarter of an hour; here it runs through on fewer rows and steps.
SMALL_DEMO = " ".join(
    f"--set {override}"
    for override in (
        "corpus.max_rows=8",
        "corpus.max_heldout_rows=2",
        "cache.shard_rows=4",
        "cache.heldout_k=64",
        "train.steps=2",
        "train.layers=2",
    )
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def shell(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_all_commands_are_known() -> None:
    """A command that is added to the README must be one that the tests below run."""
    assert len(commands()) >= 12
    for command in commands():
        assert command in ("make demo", "make test") or command.startswith("logit-cache "), command


def test_make_demo(tmp_path: Path) -> None:
    """`make demo`, twice: the second time everything is found done."""
    # A checkout of its own, so that runs/ of this one is left alone.
    for name in ("Makefile", "pyproject.toml", ".src", "pipeline", "stages", "README.md"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "runs/text").mkdir(parents=True)
    (tmp_path / "runs/text" / TEXT.name).symlink_to(TEXT)
    # -o: this environment is as installed, however the checkout's files are dated.
    make = ["make", "demo", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed", f"SET={SMALL_DEMO}"]
    first = shell(make, tmp_path)
    assert (tmp_path / "runs/demo/report/index.html").exists()
    lines = [line.split()[0] for line in first.splitlines() if line.strip()]
    for name in ("teacher", "student", "control"):
        assert lines.count(name) == 2, f"the table has no line for {name}"
    again = shell(make, tmp_path)
    assert "2 of 2 shards found, 0 to do" in again
    assert again.count("done") >= 4


def test_make_help() -> None:
    shown = shell(["make", "--no-print-directory", "help"], REPOSITORY)
    targets = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert targets is not None
    for target in targets[1].split():
        assert f"make {target} " in shown, f"{target} has no line in make help"


def test_own_teacher_and_text(tmp_path: Path, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe, the commands and the Python of the README, in the order in which they stand there.

    The commands run in this process, each of which would else import for ten seconds; in one of its own each runs in `make demo`.
    """
    import fsspec

    (tmp_path / "my.toml").write_text(blocks("toml")[0])
    (tmp_path / "my-teacher").symlink_to(teacher_dir)
    (tmp_path / "texts").mkdir()
    for play in ("tempest", "hamlet"):
        with fsspec.open(PLAYS.format(play), "r", encoding="utf-8") as file:
            (tmp_path / "texts" / f"{play}.txt").write_text(file.read()[4000:7000])
    monkeypatch.chdir(tmp_path)
    for command in commands():
        if command.startswith("logit-cache "):
            assert main(command.split()[1:]) == 0, command
    # As the README says: each block goes on where the one before it ended.
    shell([sys.executable, "-c", "\n".join(blocks("python"))], tmp_path)


def test_recipe_reference_is_complete() -> None:
    """Every key is in the table, and the defaults given there are the real ones."""
    table = README[README.index("## Recipe reference") : README.index("## On disk")]
    named = set(re.findall(r"`([a-zA-Z_.]+)`", table.replace("students.NAME.", "")))
    for section, field in Recipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key in inner or {}:
            assert key in named or f"{section}.{key}" in named, f"{section}.{key} is not in the README"
    for key in StudentConfig.model_fields:
        assert key in named, f"students.NAME.{key} is not in the README"
    defaults = StudentConfig(layers=1)
    assert (defaults.steps, defaults.batch_rows, defaults.accumulate) == (200, 8, 1)
    assert (defaults.kd_weight, defaults.ce_weight, defaults.temperature) == (1.0, 0.1, 1.0)
    assert (defaults.learning_rate, defaults.warmup_steps, defaults.weight_decay) == (5e-4, 20, 0.01)


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (REPOSITORY / "stages/recipes").glob("*.toml")))
def test_shipped_recipes_load(recipe: str) -> None:
    assert read_recipe(recipe, None).students
