"""`logit-cache finalise`: after the tasks, is the cache whole; and what students need of the teacher."""

from __future__ import annotations

from pipeline.config import load_recipe
from stages.options import AcceptOption, RecipeArgument, SetOption


def finalise(recipe: RecipeArgument, accept: AcceptOption = None, set_: SetOption = None) -> None:
    """Check every byte of a cache that several tasks wrote, and export what students need of the teacher."""
    plan = load_recipe(recipe, set_)
    from pipeline import processes
    from pipeline.capture import check_caches, export_for_students, open_caches, summarise
    from pipeline.teacher import load_teacher, local_teacher

    if processes.rank() == 0:
        check_caches(plan)
    processes.wait_for_all()
    source = local_teacher(plan)
    teacher = load_teacher(source, plan.teacher, plan.corpus.objective)
    # Of this teacher, these rows and these settings, or an error that names what differs.
    open_caches(plan, teacher, accept or ())
    export_for_students(plan, teacher, source)
    if processes.rank() == 0:
        summarise(plan)
