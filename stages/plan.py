"""`logit-cache plan`: what stage one will take, and what every support costs and keeps."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from .options import RecipeArgument, SetOption, read_recipe

if TYPE_CHECKING:
    from ..assess.plan import Plan


def plan(
    recipe_path: RecipeArgument,
    probe: Annotated[
        bool, typer.Option(help="run the teacher on a sample; without, go by its configuration alone")
    ] = True,
    sample_rows: Annotated[int, typer.Option(min=2, help="rows of the sample, half of them to learn from")] = 16,
    gradient_rows: Annotated[int, typer.Option(min=1, help="rows of the batch whose gradient is compared")] = 4,
    gpu: Annotated[str | None, typer.Option(help="estimate hours on such GPUs from their public figures")] = None,
    num_gpus: Annotated[int, typer.Option(min=1, help="number of these GPUs")] = 1,
    utilisation: Annotated[float, typer.Option(help="share of their peak that is reached")] = 0.4,
    tokens: Annotated[int | None, typer.Option(min=1, help="size of the corpus, if it is not prepared")] = None,
    bytes_per_position: Annotated[float | None, typer.Option(min=0.1, help="if it is not measured")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    set_: SetOption = None,
) -> None:
    """Before a large job: bytes, files, hours, disk, and a table of what every support keeps of the teacher.

    With a probe it leaves run_dir/plan.json, of which `report` draws a figure. Exit code 2 where the disk will not hold
    the cache.
    """
    recipe = read_recipe(recipe_path, set_)
    from ..assess.plan import plan_capture

    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # log and progress must not mix with the JSON
        result = plan_capture(
            recipe,
            probe=probe,
            sample_rows=sample_rows,
            gradient_rows=gradient_rows,
            gpu=gpu,
            num_gpus=num_gpus,
            utilisation=utilisation,
            tokens=tokens,
            bytes_per_position=bytes_per_position,
        )
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        _show(result, recipe.cache.heldout_k)
    result.check_disk()


def _show(plan: Plan, heldout_k: int) -> None:
    from rich.filesize import decimal

    from ..assess.plan import fidelity_table
    from .console import show, show_table

    if plan.fidelity is not None:
        show_table(fidelity_table(plan.fidelity, plan.tokens))
        show(
            f"measured on {plan.fidelity.positions:,} positions, learned from as many others; gradients of a batch of "
            f"{plan.fidelity.batch_positions:,} tokens against the full distribution; * no other setting has fewer "
            "bytes and a smaller gradient error at that T"
        )
        show(
            f"plan: stage one: {plan.tokens:,} tokens at {plan.fidelity.teacher_tokens_per_second:,.0f} tokens/s here: "
            f"{plan.teacher_hours:,.2f} h"
        )
    if plan.estimate is not None:
        machine = "" if plan.fidelity is None else f"on {plan.estimate.num_gpus} x {plan.estimate.gpu}: "
        for name, value in plan.estimate.facts().items():
            show(f"plan: {machine}{name}: {value}")
    signals = "".join(f" + {size:,} ({name})" for name, size in plan.signals.items())
    free = "" if plan.free_bytes is None else f"; {decimal(plan.free_bytes)} are free"
    show(
        f"plan: disk: {decimal(plan.bytes)} at {plan.bytes_per_position:.1f} bytes a position ({plan.setting}, "
        f"{plan.setting.profile}){signals}, about {decimal(plan.heldout_bytes)} held out (k = {heldout_k}), "
        f"{plan.files:,} files{free}"
    )
