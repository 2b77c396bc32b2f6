"""A training in a process of its own that is told to stop: it saves, says so, and goes on as if nothing had been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from logit_cache.distill.metrics import read_metrics
from logit_cache.stages.app import main
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.helpers.tiny import make_recipe

pytestmark = pytest.mark.slow
STEPS = 150
ALONE = ("logit_cache",)
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "logit_cache")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cached, and trained by one process that nothing happens to. No checkpoint is due before the end."""
    folder = tmp_path_factory.mktemp("preemption")
    file = make_recipe(folder, train__steps=STEPS, train__batch_rows=4, train__save_steps=1000)
    for command in ("prepare", "cache", "train"):
        assert main([command, str(file)]) == 0
    return file


@pytest.mark.parametrize(
    ("launcher", "number", "options"),
    [
        (ALONE, signal.SIGTERM, ()),
        # Slurm may signal every process of a job, those that read rows too.
        (ALONE, signal.SIGUSR1, ("train.loader_workers=1",)),
        (TORCHRUN, signal.SIGTERM, ("train.batch_rows=2", "train.accumulate=2")),
    ],
    ids=["alone", "with a worker", "two processes"],
)
def test_a_training_that_is_told_to_stop_saves(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    launcher: tuple[str, ...],
    number: signal.Signals,
    options: tuple[str, ...],
) -> None:
    for part in ("cache", "students/student/start"):
        shutil.copytree(recipe.parent / "run" / part, tmp_path / "run" / part)
    command = [
        "train",
        str(recipe),
        *(part for key in (f"run_dir={tmp_path}/run", *options) for part in ("--set", key)),
    ]
    student = tmp_path / "run/students/student"
    with subprocess.Popen(
        [sys.executable, "-m", *launcher, *command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while len(read_metrics(student / "metrics.jsonl")) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        if launcher == ALONE:
            assert main(command) == 3
            assert f"process {process.pid} on" in capsys.readouterr().err
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, error = process.communicate()
    assert "Traceback" not in error or launcher == TORCHRUN, error  # torchrun's own
    (saved,) = (int(folder.name.removeprefix("checkpoint-")) for folder in (student / "checkpoints").iterdir())
    assert 4 <= saved < STEPS
    assert f"student is saved at step {saved} of {STEPS}; the same command continues" in error
    if launcher == ALONE:
        assert process.returncode == 75
        assert f"stopped by {number.name}" in error
    lines = read_metrics(student / "metrics.jsonl")
    assert lines[-1]["step"] == saved
    assert main(command) == 0
    assert f"continuing from {student}/checkpoints/checkpoint-{saved}" in capsys.readouterr().out
    undisturbed = recipe.parent / "run/students/student"
    assert [line["step"] for line in read_metrics(student / "metrics.jsonl")] == list(range(1, STEPS + 1))
    one, other = (load_file(folder / "final/model.safetensors") for folder in (student, undisturbed))
    tolerance = 0.0 if launcher == ALONE else 1e-4
    assert max(float((one[name] - other[name]).abs().max()) for name in other) <= tolerance
