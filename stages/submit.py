"""`logit-cache submit`: a run as Slurm jobs."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..recipe.loading import load_recipe
from .options import RecipeArgument, SetOption, StudentOption, chosen_students

TEMPLATES = Path(__file__).parent / "slurm"


class Part(StrEnum):
    cache = "cache"
    train = "train"


def submit(
    recipe: RecipeArgument,
    only: Annotated[Part | None, typer.Option(help="only the jobs of this stage")] = None,
    student: StudentOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the batch scripts and do nothing")] = False,
    set_: SetOption = None,
) -> None:
    """Submit what a run still needs to Slurm: an array for stage one, a job that checks it, one per student."""
    plan = load_recipe(recipe, set_)
    students = chosen_students(plan, student)
    from ..cluster.jobs import plan_jobs, submit_jobs
    from .console import show

    jobs = plan_jobs(plan, TEMPLATES, only=None if only is None else only.value, students=students)
    if not jobs:
        show("submit: every student is trained, nothing to do")
        return
    if dry_run:
        for job in jobs:
            after = f", after {', '.join([*job.after, *job.in_turn])}" if job.after or job.in_turn else ""
            show(f"# {plan.paths.slurm / job.name}.sbatch{after}\n{job.script}")
        return
    submit_jobs(
        plan, jobs, lambda job, number: show(f"submit: {job.name}: job {number}, {plan.paths.slurm / job.name}.sbatch")
    )
    show(f"submit: logs are in {plan.paths.slurm_logs}; how far they are: logit-cache status {shlex.quote(recipe)}")
