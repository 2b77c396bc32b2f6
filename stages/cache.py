"""`logit-cache cache`: stage one, the teacher over the rows."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.config import load_recipe, save_resolved
from pipeline.errors import RecipeError
from stages.options import RecipeArgument, SetOption


def cache(
    recipe: RecipeArgument,
    task: Annotated[int, typer.Option(min=0, help="which share of the shards to write")] = 0,
    num_tasks: Annotated[int, typer.Option(min=1, help="how many tasks share the shards")] = 1,
    set_: SetOption = None,
) -> None:
    """Run the teacher over the rows and write the cache; continues where it stopped."""
    plan = load_recipe(recipe, set_)
    if task >= num_tasks:
        raise RecipeError(f"--task {task} is outside 0..{num_tasks - 1} (--num-tasks {num_tasks})")
    from pipeline.cache import CacheWriter, LogitCache, Manifest
    from pipeline.capture import capture, export_for_students, unigram_loss
    from pipeline.codec import TargetCodec
    from pipeline.corpus import PackedRows
    from pipeline.progress import say
    from pipeline.supports import Support
    from pipeline.teacher import load_teacher, local_teacher

    keep = plan.cache
    # Students are measured against many candidates, whatever they learn from.
    sides = [
        (plan.cache_dir, Support.of(keep.support, k=keep.k, p=keep.p, tau=keep.tau, draws=keep.draws), keep.profile),
        (plan.heldout_dir, Support.of("topk", k=keep.heldout_k), "compact"),
    ]
    corpora = {path: PackedRows(path / "corpus") for path, *_ in sides}
    source = local_teacher(plan)
    teacher = load_teacher(source, plan.teacher)
    say(f"teacher: {plan.teacher.model}, {teacher.placement}")
    for path, support, profile in sides:
        try:
            support.check(teacher.vocab_size)
        except ValueError as error:
            raise RecipeError(f"cache: {error}") from error
        corpus = corpora[path]
        codec = TargetCodec(support, tuple(keep.knots), teacher.vocab_size, profile)
        manifest = Manifest.create(teacher.identity, corpus, codec, keep.shard_rows, plan.seed)
        writer = CacheWriter(path, manifest)
        capture(teacher, corpus, writer, batch_rows=plan.teacher.batch_rows, task=task, num_tasks=num_tasks)
    if task == 0:
        export_for_students(plan, teacher, source, corpora[plan.cache_dir])
    save_resolved(plan, plan.run_dir / "recipe.toml")

    done = LogitCache(plan.cache_dir, partial=True)
    if done.complete and done.positions:
        say(
            f"cache: {done.path}: {done.positions:,} positions, {done.bytes / done.positions:.1f} bytes each, "
            f"teacher loss {done.teacher_loss:.3f} nats"
        )
        unigram = unigram_loss(done.corpus, done.vocab_size)
        if done.teacher_loss >= unigram:
            say(
                f"warning: the teacher's loss ({done.teacher_loss:.3f} nats) is no better than the rows' own token "
                f"frequencies ({unigram:.3f}): is it the right model, tokenizer and text?"
            )
