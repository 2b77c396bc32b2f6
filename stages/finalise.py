"""`logit-cache finalise`: after the tasks, is the cache whole; and what students need of the teacher."""

from __future__ import annotations

from ..recipe.loading import load_recipe
from .options import AcceptOption, RecipeArgument, SetOption


def finalise(recipe: RecipeArgument, accept: AcceptOption = None, set_: SetOption = None) -> None:
    """Check every byte of a cache that several tasks wrote, and export what students need of the teacher."""
    plan = load_recipe(recipe, set_)
    from ..base import processes
    from ..capture.handover import export_for_students
    from ..capture.stage_one import check_caches, open_writers
    from ..capture.summary import summarise
    from ..models.teacher import load_teacher
    from ..models.teacher_source import resolve_teacher

    if processes.rank() == 0:
        check_caches(plan)
    processes.wait_for_all()
    source = resolve_teacher(plan)
    teacher = load_teacher(source, plan.teacher, plan.corpus.objective)
    # Of this teacher, these rows and these settings, or an error that names what differs.
    open_writers(plan, teacher, accept or ())
    export_for_students(plan, teacher, source)
    if processes.rank() == 0:
        summarise(plan)
