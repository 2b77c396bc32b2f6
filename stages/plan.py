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
    full: Annotated[
        bool, typer.Option("--full", help="more ranks, steps and supports: two to three times as long")
    ] = False,
    sample_rows: Annotated[
        int | None,
        typer.Option(
            min=2, help="rows of the sample, a fifth to measure on; by default 8,192 positions and 8 rows to measure on"
        ),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="estimate hours on such GPUs from their public figures")] = None,
    num_gpus: Annotated[int, typer.Option(min=1, help="number of these GPUs")] = 1,
    utilisation: Annotated[float, typer.Option(help="share of their peak that is reached")] = 0.4,
    tokens: Annotated[int | None, typer.Option(min=1, help="size of the corpus, if it is not prepared")] = None,
    bytes_per_position: Annotated[float | None, typer.Option(min=0.1, help="if it is not measured")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="machines that the GPUs are in")] = 1,
    node_cores: Annotated[int | None, typer.Option(min=1, help="cores of each, by default 14 for each GPU")] = None,
    student_rate: Annotated[
        float, typer.Option(min=1, help="positions per second that a node of a training takes")
    ] = 200_000,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    set_: SetOption = None,
) -> None:
    """Before a large job: bytes, files, hours, disk, and a table of what every support keeps of the teacher.

    With a probe it leaves run_dir/plan.json and its figure, run_dir/plan.png. Exit code 2 where the disk will not hold
    the cache.
    """
    recipe = read_recipe(recipe_path, set_)
    from ..assess.plan import plan_capture

    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # log and progress must not mix with the JSON
        result = plan_capture(
            recipe,
            probe=probe,
            full=full,
            sample_rows=sample_rows,
            gpu=gpu,
            num_gpus=num_gpus,
            utilisation=utilisation,
            tokens=tokens,
            bytes_per_position=bytes_per_position,
            nodes=nodes,
            node_cores=node_cores,
            student_rate=student_rate,
        )
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        _show(result, recipe.cache.heldout_k)
    result.check_disk()


def _layers(students: dict[str, int | list[int]]) -> str:
    return " and ".join(str(layers if isinstance(layers, int) else len(layers)) for layers in students.values())


def _show(plan: Plan, heldout_k: int) -> None:
    from rich.filesize import decimal

    from ..assess.plan import fidelity_table
    from .console import show, show_table

    if plan.fidelity is not None:
        show_table(fidelity_table(plan.fidelity))
        fidelity = plan.fidelity
        show(
            f"measured on {fidelity.positions:,} positions, learned from {fidelity.learned_positions:,} others (stage one: "
            f"from {fidelity.stage_one_positions:,}, for smaller errors where these are more); KL(p || p^) in nats, without a shape (of a uniform tail); near, "
            f"far: error in percent of the gradient of the output layer of a student with {_layers(fidelity.students)} of "
            "the teacher's layers; codec: KL of rounding; * no other setting has fewer bytes and a smaller error"
        )
        show(
            f"plan: stage one: {plan.tokens:,} tokens at {plan.fidelity.teacher_tokens_per_second:,.0f} tokens/s here: "
            f"{plan.teacher_hours:,.2f} h"
        )
    if plan.estimate is not None:
        machine = "" if plan.fidelity is None else f"on {plan.estimate.num_gpus} x {plan.estimate.gpu}: "
        for name, value in plan.estimate.facts().items():
            show(f"plan: {machine}{name}: {value}")
    if plan.large_run is not None:
        for name, value in plan.large_run.facts().items():
            show(f"plan: {name}: {value}")
    signals = "".join(f" + {size:,} ({name})" for name, size in plan.signals.items())
    free = "" if plan.free_bytes is None else f"; {decimal(plan.free_bytes)} are free"
    show(
        f"plan: disk: {decimal(plan.bytes)} at {plan.bytes_per_position:.1f} bytes a position ({plan.setting}, "
        f"{plan.setting.profile}){signals}, about {decimal(plan.heldout_bytes)} held out (k = {heldout_k}), "
        f"{plan.files:,} files{free}"
    )
