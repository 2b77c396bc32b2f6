"""`logit-cache cache`: stage one, the teacher over the rows."""

from __future__ import annotations

import shlex

from .options import AcceptOption, NumTasksOption, RecipeArgument, SetOption, TaskOption, read_recipe, task_of


def cache(
    recipe_path: RecipeArgument,
    task: TaskOption = None,
    num_tasks: NumTasksOption = None,
    accept: AcceptOption = None,
    set_: SetOption = None,
) -> None:
    """Run the teacher over the rows and write the cache; continues where it stopped.

    Under torchrun or `accelerate launch` the processes share the work. One of several tasks writes its shards only;
    `logit-cache finalise` completes the cache after the last task.
    """
    recipe = read_recipe(recipe_path, set_)
    share, shares = task_of(task, num_tasks)
    from ..capture import run
    from .console import show

    run(recipe, task=share, num_tasks=shares, accept=accept or ())
    if shares > 1:
        show(
            f"cache: task {share} of {shares} is done; after the last one: logit-cache finalise {shlex.quote(recipe_path)}"
        )
