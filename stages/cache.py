"""`logit-cache cache`: stage one, the teacher over the rows."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ..base.errors import RecipeError
from .options import AcceptOption, RecipeArgument, SetOption, read_recipe


def cache(
    recipe_path: RecipeArgument,
    task: Annotated[int | None, typer.Option(min=0, help="number of this task, from 0")] = None,
    num_tasks: Annotated[int | None, typer.Option(min=1, help="number of tasks that share the shards")] = None,
    accept: AcceptOption = None,
    set_: SetOption = None,
) -> None:
    """Run the teacher over the rows and write the cache; continues where it stopped.

    Under torchrun or `accelerate launch` the processes share the work. One of several tasks writes its shards only;
    `logit-cache finalise` completes the cache after the last task.
    """
    recipe = read_recipe(recipe_path, set_)
    if (task is None) != (num_tasks is None):
        raise RecipeError("--task and --num-tasks go together: give both or neither")
    share, shares = task or 0, num_tasks or 1
    if share >= shares:
        raise RecipeError(f"--task {share} is outside 0..{shares - 1} (--num-tasks {shares})")
    from ..capture import run
    from .console import show

    run(recipe, task=share, num_tasks=shares, accept=accept or ())
    if shares > 1:
        show(
            f"cache: task {share} of {shares} is done; after the last one: logit-cache finalise {shlex.quote(recipe_path)}"
        )
