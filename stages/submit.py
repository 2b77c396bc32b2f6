"""`logit-cache submit`: a run as Slurm jobs."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import RecipeArgument, SetOption, StudentOption, read_recipe

TEMPLATES = Path(__file__).parent / "slurm"


class Part(StrEnum):
    cache = "cache"
    train = "train"


def submit(
    recipe_path: RecipeArgument,
    only: Annotated[Part | None, typer.Option(help="only the jobs of this stage")] = None,
    student: StudentOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the batch scripts and do nothing")] = False,
    set_: SetOption = None,
) -> None:
    """Submit what a run still needs to Slurm: an array for stage one, a job that checks it, one per student."""
    recipe = read_recipe(recipe_path, set_)
    students = recipe.chosen_students(student)
    from ..cluster.jobs import plan_jobs, submit_jobs
    from .console import show

    jobs = plan_jobs(recipe, TEMPLATES, only=None if only is None else only.value, students=students)
    if not jobs:
        show("submit: every student is trained, nothing to do")
        return
    if dry_run:
        for job in jobs:
            after = f", after {', '.join([*job.after, *job.in_turn])}" if job.after or job.in_turn else ""
            show(f"# {recipe.paths.slurm / job.name}.sbatch{after}\n{job.script}")
        return
    submit_jobs(
        recipe,
        jobs,
        lambda job, number: show(f"submit: {job.name}: job {number}, {recipe.paths.slurm / job.name}.sbatch"),
    )
    show(f"submit: logs are in {recipe.paths.slurm_logs}; progress: logit-cache status {shlex.quote(recipe_path)}")
