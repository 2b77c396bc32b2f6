"""`logit-cache prepare`: corpus text -> packed Arrow rows."""

from __future__ import annotations

import shlex

from ..recipe.loading import save_resolved
from .options import NumTasksOption, RecipeArgument, SetOption, TaskOption, read_recipe, task_of


def prepare(
    recipe_path: RecipeArgument,
    task: TaskOption = None,
    num_tasks: NumTasksOption = None,
    set_: SetOption = None,
) -> None:
    """Turn text into packed rows, training and held-out; continues where it stopped.

    One of several tasks packs its portions of the text only; `logit-cache prepare` without `--task` makes the corpus of
    them after the last task.
    """
    recipe = read_recipe(recipe_path, set_)
    share, shares = task_of(task, num_tasks)
    from ..base import processes
    from .console import show

    if processes.rank() == 0:
        from ..corpus.prepare import prepare_corpus
        from ..models.loading import max_positions
        from ..models.teacher_source import teacher_config, teacher_tokenizer

        config = teacher_config(recipe)
        vocab_size = getattr(config.get_text_config(), "vocab_size", None)
        tokenizer, positions = teacher_tokenizer(recipe), max_positions(config)
        prepare_corpus(recipe, tokenizer, positions, vocab_size, task=share, num_tasks=shares)
        if shares == 1:
            save_resolved(recipe, recipe.paths.recipe)
        else:
            last = f"logit-cache prepare {shlex.quote(recipe_path)}"
            show(f"prepare: task {share} of {shares} is done; after the last one: {last}")
    processes.wait_for_all()
