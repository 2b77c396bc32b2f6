"""Slurm's own view: its limits, and the state of the jobs that a run has submitted."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..base.durable import read_json
from ..recipe.schema import Recipe

DEFAULT_ARRAY_LIMIT = 1001  # Slurm's own default of MaxArraySize

_LIVE = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "REQUEUE",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)
"""Beginnings of the states of a task that runs or waits to run."""


def array_limit() -> int:
    """Largest number of tasks of one array: MaxArraySize of the cluster, Slurm's default without a cluster."""
    if shutil.which("scontrol") is None:
        return DEFAULT_ARRAY_LIMIT
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize" and value.strip().isdigit():
            return max(1, int(value))
    return DEFAULT_ARRAY_LIMIT


@dataclass(frozen=True)
class TaskState:
    """One task of an array, or a job without tasks, as Slurm sees it."""

    job: int
    task: int | None
    state: str
    reason: str

    @property
    def live(self) -> bool:
        """Whether it runs or waits to run."""
        return self.state.startswith(_LIVE)


def submitted_jobs(recipe: Recipe) -> list[dict[str, Any]]:
    """Records of the submitted jobs: name, stage, id and `Job.facts`."""
    jobs: list[dict[str, Any]] | None = read_json(recipe.paths.slurm_jobs, "delete it")
    return jobs or []


def live_jobs(recipe: Recipe) -> list[dict[str, Any]]:
    """The submitted jobs that run or wait to run."""
    live = {state.job for state in task_states(recipe) if state.live}
    return [job for job in submitted_jobs(recipe) if job["id"] in live]


def task_states(recipe: Recipe) -> list[TaskState]:
    """States of the jobs of a run: those in the queue and, with Slurm's accounting, those that have ended."""
    jobs = {int(job["id"]) for job in submitted_jobs(recipe)}
    if not jobs or shutil.which("squeue") is None:
        return []
    states: dict[tuple[int, int | None], TaskState] = {}
    past = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(map(str, sorted(jobs)))}"]
    for identity, state, code in _table([*past, "--format=JobID,State,ExitCode"]):
        job, _, task = identity.partition("_")
        if job.isdigit() and (task.isdigit() or not task):
            key = (int(job), int(task) if task else None)
            states[key] = TaskState(*key, state.split()[0], f"exit code {code.partition(':')[0]}")
    now = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--states=all", "--format=%F|%K|%T|%r"]
    for job, task, state, reason in _table(now):
        if job.isdigit() and int(job) in jobs:
            key = (int(job), int(task) if task.isdigit() else None)
            states[key] = TaskState(*key, state, "" if reason == "None" else reason)
    return list(states.values())


def _table(command: list[str]) -> Iterator[list[str]]:
    """Lines of a Slurm command split at "|"; none where the command fails, as sacct does without accounting."""
    if shutil.which(command[0]) is not None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            yield from (line.split("|") for line in done.stdout.splitlines())
