"""The wheel, installed without the checkout, in a directory that has folders named pipeline and stages of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.imports import REPOSITORY
from tests.helpers.tiny import make_recipe

pytestmark = pytest.mark.slow
SOURCES = ("pyproject.toml", "README.md", ".src", "pipeline", "stages")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves files in its source folder, and takes in what an earlier one has left."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.egg-info", "__pycache__")
            shutil.copytree(source, folder / "source" / name, symlinks=True, ignore=ignore)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(source, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    kinds = (".py", ".toml", ".j2", ".html", ".css", ".js", ".typed")
    expected = {
        f"logit_cache/{prefix}{file.relative_to(REPOSITORY / folder).as_posix()}"
        for folder, prefix in (("pipeline", ""), ("stages", "stages/"))
        for file in (REPOSITORY / folder).rglob("*")
        if file.suffix in kinds
    }
    assert names == expected
    assert {"logit_cache/py.typed", "logit_cache/assess/report.html.j2", "logit_cache/stages/recipes/demo.toml"} < names
    assert {"logit_cache/stages/slurm/cache.sbatch.j2", "logit_cache/assess/explorer.js"} < names


@dataclass(frozen=True)
class Elsewhere:
    """An environment with the wheel, and a user's project in which commands run."""

    bin: Path
    project: Path

    def run(self, *command: str, **variables: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            command,
            cwd=self.project,
            env={**kept, "PATH": path, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    # What the package depends on is that of this environment. A .pth file adds a folder, not the .pth files in it: the
    # editable install of this checkout stays out.
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    project = folder / "project"
    for name in ("pipeline", "stages"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("raise ImportError('a folder of the user, not of logit-cache')\n")
    # As the README calls its own: runs/mine, a student "small".
    make_recipe(project, run_dir="runs/mine", students={"small": {"mode": "cached"}})
    place = Elsewhere(folder / "venv/bin", project)
    imported = place.run("python", "-c", "import logit_cache; print(logit_cache.__file__)")
    assert Path(imported.strip()).is_relative_to(folder / "venv")
    return place


def test_it_runs_beside_folders_of_the_same_names(elsewhere: Elsewhere) -> None:
    """The command, a batch script's body, `python -m`, torchrun and the README's trainer."""
    project = elsewhere.project
    elsewhere.run("logit-cache", "prepare", "recipe.toml")

    shown = elsewhere.run("logit-cache", "submit", "recipe.toml", "--only", "cache", "--dry-run")
    script = "#!/bin/bash" + shown.split("#!/bin/bash")[1]  # the first job: stage one
    (project / "job.sh").write_text(script)
    # What `submit` keeps of the recipe, and `--dry-run` does not.
    kept = re.search(r"as it was at submit time: (.*)", script)
    assert kept is not None
    Path(kept[1]).parent.mkdir(parents=True)
    shutil.copy(project / "recipe.toml", kept[1])
    elsewhere.run("bash", "job.sh", SLURM_JOB_ID="1", SLURM_ARRAY_JOB_ID="1", SLURM_ARRAY_TASK_ID="0")
    assert "complete" in elsewhere.run("python", "-m", "logit_cache", "inspect", "runs/mine/cache")

    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    elsewhere.run(*torchrun, "-m", "logit_cache", "train", "recipe.toml")

    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    trainer = next(block for block in blocks if "distillation_loss(" in block)
    elsewhere.run("python", "-c", trainer)
