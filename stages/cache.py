"""`logit-cache cache`: stage one, the teacher over the rows."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ..base.errors import RecipeError
from ..recipe.loading import load_recipe, save_resolved
from .options import AcceptOption, RecipeArgument, SetOption


def cache(
    recipe: RecipeArgument,
    task: Annotated[int | None, typer.Option(min=0, help="which share of the shards to write")] = None,
    num_tasks: Annotated[int | None, typer.Option(min=1, help="how many tasks share the shards")] = None,
    accept: AcceptOption = None,
    set_: SetOption = None,
) -> None:
    """Run the teacher over the rows and write the cache; continues where it stopped.

    Under torchrun or `accelerate launch` the processes share the work. Told to be one of several tasks, it leaves the end
    to `logit-cache finalise`.
    """
    plan = load_recipe(recipe, set_)
    if (task is None) != (num_tasks is None):
        raise RecipeError("--task and --num-tasks go together: which share of the shards, and of how many")
    share, shares = task or 0, num_tasks or 1
    if share >= shares:
        raise RecipeError(f"--task {share} is outside 0..{shares - 1} (--num-tasks {shares})")
    from ..base import processes
    from ..base.durable import write_json
    from ..base.provenance import provenance
    from ..capture.handover import export_for_students
    from ..capture.shard_pass import fill_shards
    from ..capture.stage_one import open_writers, shard_count
    from ..capture.summary import summarise
    from ..models.teacher import load_teacher
    from ..models.teacher_source import resolve_teacher
    from .console import show

    if processes.world_size() > 1:
        if processes.rank() == 0:
            resolve_teacher(plan)  # may convert a file, which several must not do at once
        processes.wait_for_all()
    # The processes are so many tasks, unless they share one teacher.
    shared = plan.teacher.parallel == "tensor"
    workers = 1 if shared else processes.world_size()
    share, shares = share * workers + processes.rank() % workers, shares * workers
    shards = shard_count(plan)
    if share > 0 and share >= shards:
        show(f"cache: nothing to do for task {share} of {shares}: there are {shards} shards")
    else:
        source = resolve_teacher(plan)
        teacher = load_teacher(source, plan.teacher, plan.corpus.objective)
        show(f"teacher: {plan.teacher.model}, {teacher.placement}")
        if shared and processes.rank() > 0:
            teacher.serve_passes()
        else:
            caches = open_writers(plan, teacher, accept or ())
            if share == 0:
                write_json(
                    plan.paths.provenance,
                    {**provenance(), "placement": str(teacher.placement), "teacher": teacher.identity},
                )
            for writer, corpus in caches:
                fill_shards(teacher, corpus, writer, batch_rows=plan.teacher.batch_rows, task=share, num_tasks=shares)
            teacher.stop_followers()
    processes.wait_for_all()
    if num_tasks is not None and num_tasks > 1:
        show(
            f"cache: task {task} of {num_tasks} is done; after the last one: logit-cache finalise {shlex.quote(recipe)}"
        )
        return
    if shared or processes.rank() == 0:
        export_for_students(plan, teacher, source)
    if processes.rank() == 0:
        save_resolved(plan, plan.paths.recipe)
        summarise(plan)
