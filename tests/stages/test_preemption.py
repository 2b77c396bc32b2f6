"""A training in a process of its own that is told to stop: it saves, says so, and goes on as if nothing had been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from logit_cache.distill.metrics import read_metrics
from logit_cache.distill.stopping import noted_signals
from logit_cache.stages.app import main
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.helpers.fault_client import Server
from tests.helpers.tiny import make_recipe

pytestmark = pytest.mark.slow
STEPS = 150
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "logit_cache")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cached, and trained by one process that nothing happens to. No checkpoint is due before the end."""
    folder = tmp_path_factory.mktemp("preemption")
    file = make_recipe(folder, train__steps=STEPS, train__batch_rows=4, train__save_steps=1000)
    for command in ("prepare", "cache", "train"):
        assert main([command, str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def server(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "one", recipe.parent / "teacher")
    yield running
    running.close()


def copied(recipe: Path, folder: Path, *changes: str) -> list[str]:
    """The command that trains from a copy of the cache."""
    for part in ("cache", "students/student/start"):
        shutil.copytree(recipe.parent / "run" / part, folder / part)
    options = (part for change in (f"run_dir={folder}", *changes) for part in ("--set", change))
    return ["train", str(recipe), *options]


def wait_for_steps(student: Path, running: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(student / "metrics.jsonl")) < 4:
        assert running() and time.monotonic() < deadline
        time.sleep(0.005)


def continues(recipe: Path, command: list[str], output: str, capsys: pytest.CaptureFixture[str]) -> float:
    """The one checkpoint is of the last step that was logged, and was told of; from it the same command ends. Returns the
    largest difference to the weights of the run that nothing happened to."""
    student = Path(command[3].removeprefix("run_dir=")) / "students/student"
    (saved,) = (int(folder.name.removeprefix("checkpoint-")) for folder in (student / "checkpoints").iterdir())
    assert 4 <= saved < STEPS
    assert f"student is saved at step {saved} of {STEPS}; the same command continues" in output
    assert read_metrics(student / "metrics.jsonl")[-1]["step"] == saved
    assert main(command) == 0
    assert f"continuing from {student}/checkpoints/checkpoint-{saved}" in capsys.readouterr().out
    undisturbed = recipe.parent / "run/students/student"
    assert [line["step"] for line in read_metrics(student / "metrics.jsonl")] == list(range(1, STEPS + 1))
    one, other = (load_file(folder / "final/model.safetensors") for folder in (student, undisturbed))
    return max(float((one[name] - other[name]).abs().max()) for name in other)


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGTERM, ()),
        # Slurm may signal every process of a job, those that read rows too.
        (signal.SIGUSR1, ("train.loader_workers=1",)),
    ],
    ids=["alone", "with a worker"],
)
def test_a_training_that_is_told_to_stop_saves(
    recipe: Path,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    options: tuple[str, ...],
) -> None:
    command = copied(recipe, tmp_path / "run", *options)
    process = server.start(*command)
    wait_for_steps(tmp_path / "run/students/student")
    assert main(command) == 3
    assert f"process {process} on" in capsys.readouterr().err
    os.killpg(process, number)
    ended = server.wait()
    assert ended.code == 75, ended.output
    assert f"stopped by {number.name}" in ended.output and "Traceback" not in ended.output
    assert continues(recipe, command, ended.output, capsys) == 0.0


def test_a_training_of_two_processes_saves(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their launcher is told, and tells them."""
    command = copied(recipe, tmp_path / "run", "train.batch_rows=2", "train.accumulate=2")
    with subprocess.Popen(
        [sys.executable, "-m", *TORCHRUN, *command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_steps(tmp_path / "run/students/student", lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
    assert continues(recipe, command, error, capsys) <= 1e-4


def test_a_reader_that_has_just_begun_outlives_a_signal() -> None:
    """Every epoch forks new ones, and Slurm's signal may find one before it has set its own handlers."""
    with noted_signals() as told:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0 and not told()
