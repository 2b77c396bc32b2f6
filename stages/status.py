"""`logit-cache status`: progress of a submitted run."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .options import RecipeArgument, SetOption, read_recipe


def status(
    recipe_path: RecipeArgument,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    set_: SetOption = None,
) -> None:
    """Show shards done, running and failed, speed and time left, and the jobs of `submit`."""
    recipe = read_recipe(recipe_path, set_)
    from ..cluster.status import status as run_status
    from .console import show

    facts = run_status(recipe)
    if as_json:
        print(json.dumps(facts))
        return
    for side in ("cache", "heldout"):
        show(f"{side}: {_shards(facts[side])}")
    for job in facts["jobs"]:
        states = ", ".join(f"{count} {state.lower()}" for state, count in job["states"].items())
        show(f"{job['name']}: job {job['id']}: {states or 'no longer known to Slurm'}")
        for failed in job["failed"]:
            where = "" if failed["task"] is None else f"task {failed['task']}: "
            show(f"  {where}{failed['state'].lower()} ({failed['reason']}): see {recipe.paths.slurm_logs}")
    if any(facts[side] and facts[side]["failed"] for side in ("cache", "heldout")):
        show(f"`logit-cache submit {recipe_path}` submits the missing shards again")


def _shards(side: dict[str, Any] | None) -> str:
    from ..base.progress import duration

    if side is None:
        return "not begun"
    parts = [f"{side['done']} of {side['shards']} shards done"]
    parts += [f"{side[kind]} {kind}" for kind in ("running", "waiting", "failed", "unsubmitted") if side[kind]]
    line = ", ".join(parts) + f"; {side['positions']:,} positions"
    if side["positions_per_second"] is not None and side["done"] < side["shards"]:
        line += f", {side['positions_per_second']:,.0f} positions/s, {duration(side['seconds_left'])} left"
    return line
