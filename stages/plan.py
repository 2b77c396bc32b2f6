"""`logit-cache plan`: what a job will take, and what each way of keeping the teacher costs and is worth."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import IncompleteError, RecipeError
from ..recipe.schema import Recipe
from .options import RecipeArgument, SetOption, read_recipe

if TYPE_CHECKING:
    from ..assess.fidelity import Fidelity, Setting
    from ..base.places import Place

# An entry takes about this much in a cache of SmolLM2 (`compact`, 49,152 tokens); used where nothing is measured.
_BYTES_PER_ENTRY = 1.2


def plan(
    recipe_path: RecipeArgument,
    probe: Annotated[
        bool, typer.Option(help="run the teacher on a sample; without, go by its configuration alone")
    ] = True,
    sample_rows: Annotated[int, typer.Option(min=2, help="rows of the sample, half of them to learn from")] = 16,
    gradient_rows: Annotated[int, typer.Option(min=1, help="rows of the batch whose gradient is compared")] = 4,
    gpu: Annotated[str | None, typer.Option(help="estimate hours on such GPUs from their public figures")] = None,
    num_gpus: Annotated[int, typer.Option(min=1, help="how many of them")] = 1,
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
    settings = read_recipe(recipe_path, set_)
    from ..assess.fidelity import Setting
    from ..base.durable import write_json
    from ..base.places import files_in
    from ..targets.supports import Support
    from .console import show, show_table

    keep = settings.cache
    own = Setting(Support.from_recipe(keep), tuple(keep.knots), keep.profile)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # the JSON stands alone
        rows = _prepared_rows(settings, needed=probe or tokens is None)
        tokens = rows[0] * settings.corpus.row_length if tokens is None else tokens
        result: dict[str, Any] = {"tokens": tokens}
        if probe:
            found = _probe(settings, own, sample_rows, gradient_rows)
            result["fidelity"] = found.to_json()
            bytes_per_position = found.lines[0].bytes_per_position
            result["teacher_hours"] = tokens / found.teacher_tokens_per_second / 3600
            write_json(settings.paths.plan, result)
        elif bytes_per_position is None:
            bytes_per_position = _BYTES_PER_ENTRY * own.support.entry_limit
        heldout = rows[1] * settings.corpus.row_length * _BYTES_PER_ENTRY * keep.heldout_k
        signals = _signals(settings)
        result["signals"] = signals
        per_position = bytes_per_position + sum(signals.values())
        result["bytes"], result["heldout_bytes"] = round(tokens * per_position), round(heldout)
        where = settings.paths.cache.parent
        free = result["free_bytes"] = _free_bytes(where)
        estimate = _estimate(settings, own, tokens, per_position, gpu or "h100", num_gpus, utilisation)
        if gpu is not None or not probe:
            result["estimate"] = estimate.to_json()
    if as_json:
        print(json.dumps(result))
    else:
        if probe:
            show_table(_table(found, tokens))
            show(
                f"measured on {found.positions:,} positions (as many others to learn from); gradients of a batch of "
                f"{found.batch_positions:,} tokens against the full distribution; * nothing else has fewer bytes and a smaller "
                "gradient error at that T"
            )
            show(
                f"plan: stage one: {tokens:,} tokens at {found.teacher_tokens_per_second:,.0f} tokens/s here: "
                f"{result['teacher_hours']:,.2f} h"
            )
        else:
            for name, value in estimate.lines():
                show(f"plan: {name}: {value}")
        if probe and gpu is not None:
            for name, value in estimate.lines():
                show(f"plan: on {num_gpus} x {gpu}: {name}: {value}")
        show(
            f"plan: disk: {_size(result['bytes'])} at {bytes_per_position:.1f} bytes a position ({own}, {own.profile})"
            f"{''.join(f' + {size:,} ({name})' for name, size in signals.items())}, about "
            f"{_size(heldout)} held out (k = {keep.heldout_k}), {estimate.files:,} files"
            f"{'' if free is None else f'; {_size(free)} are free'}"
        )
    if free is None:
        return
    there = sum(sum(files_in(side / "shards").values()) for side in (settings.paths.cache, settings.paths.heldout))
    missing = result["bytes"] + heldout - there
    if missing > free:
        raise RecipeError(
            f"{where}: the cache needs {_size(missing)} more and the disk has {_size(free)}: choose "
            "another run_dir or cache.location, or a setting with fewer bytes from `logit-cache plan`"
        )


def _prepared_rows(settings: Recipe, needed: bool) -> tuple[int, int]:
    """Rows of the cache and of the held-out one; (0, 0) where they are neither prepared nor needed."""
    from ..corpus.rows import PackedRows

    try:
        return PackedRows(settings.paths.cache / "corpus").rows, PackedRows(settings.paths.heldout / "corpus").rows
    except IncompleteError as error:
        if needed:
            raise IncompleteError(f"{error} (or give --no-probe and --tokens)") from error
        return 0, 0


def _probe(settings: Recipe, own: Setting, sample_rows: int, gradient_rows: int) -> Fidelity:
    from ..assess.fidelity import grid, measure_fidelity
    from ..base.progress import Meter
    from ..corpus.rows import PackedRows
    from ..models.placement import has_local_weights
    from ..models.student_layers import student_from_layers
    from ..models.teacher import load_teacher
    from ..models.teacher_source import resolve_teacher
    from .console import show

    teacher = load_teacher(resolve_teacher(settings), settings.teacher, settings.corpus.objective)
    show(f"teacher: {settings.teacher.model}, {teacher.placement}")
    if not has_local_weights(teacher.model):
        raise RecipeError("the table needs a teacher that fits one device: use --no-probe")
    _check(own, teacher.vocab_size)
    others = [
        setting for setting in grid(own.knots) if setting != own and (setting.support.k or 1) <= teacher.vocab_size
    ]
    settings_of_table = [own, *others]
    layers = next((student.layers for student in settings.students.values() if student.layers is not None), None)
    half = max(int(teacher.model.config.get_text_config().num_hidden_layers) // 2, 1)
    with Meter("plan", len(settings_of_table), "settings") as meter:
        return measure_fidelity(
            teacher,
            student_from_layers(teacher.model, layers or half).float(),
            PackedRows(settings.paths.cache / "corpus"),
            settings_of_table,
            shard_rows=settings.cache.shard_rows,
            seed=settings.seed,
            sample_rows=sample_rows,
            gradient_rows=gradient_rows,
            batch_rows=settings.teacher.batch_rows,
            targets_on=settings.cache.targets_on,
            progress=lambda setting: meter.advance(1, setting),
        )


def _check(own: Setting, vocab_size: int) -> None:
    try:
        own.support.check(vocab_size)
    except ValueError as error:
        raise RecipeError(f"cache: {error}") from error


def _signals(settings: Recipe) -> dict[str, int]:
    """Bytes per position of what is kept beside the targets."""
    from ..assess.cost import signal_bytes
    from ..models.loading import load_config
    from ..models.teacher_source import resolve_teacher

    if not settings.cache.signals:
        return {}
    config = load_config(resolve_teacher(settings), settings.teacher.revision)
    return signal_bytes(settings.cache.signals, config, settings.corpus.row_length)


def _estimate(
    settings: Recipe,
    own: Setting,
    tokens: int,
    bytes_per_position: float,
    gpu: str,
    num_gpus: int,
    utilisation: float,
) -> Any:
    from ..assess.cost import estimate, model_shape
    from ..models.loading import load_config
    from ..models.teacher_source import resolve_teacher
    from ..store.codec import TargetCodec

    shape = model_shape(load_config(resolve_teacher(settings), settings.teacher.revision), settings.corpus.objective)
    _check(own, shape.vocab_size)
    student = next(iter(settings.students.values()), None)
    epochs = None if student is None else student.epochs
    if student is not None and epochs is None:
        epochs = student.steps * student.batch_rows * student.accumulate * settings.corpus.row_length / tokens
    return estimate(
        shape,
        tokens=tokens,
        row_length=min(settings.corpus.row_length, tokens),
        bytes_per_position=bytes_per_position,
        gpu=gpu,
        num_gpus=num_gpus,
        utilisation=utilisation,
        batch_rows=settings.teacher.batch_rows,
        shard_rows=settings.cache.shard_rows,
        arrays=len(TargetCodec(own.support, own.knots, shape.vocab_size, own.profile).layout()),
        epochs=1.0 if epochs is None else epochs,
    )


def _table(found: Fidelity, tokens: int) -> list[list[str]]:
    """Header and one line a setting, the recipe's own first."""
    from ..assess.fidelity import GRADIENT_TEMPERATURES, TEMPERATURES

    header = ["support", "profile", "bytes", "corpus", "mass", *(f"KL T={t:g}" for t in TEMPERATURES)]
    lines = [[*header, *(f"gradient T={t:g} " for t in GRADIENT_TEMPERATURES)]]
    for line in found.lines:
        gradients = [
            f"{line.angle[t]:.1f}° x {line.norm_ratio[t]:.2f}{'*' if t in line.front else ' '}"
            if t in line.angle
            else "- "
            for t in GRADIENT_TEMPERATURES
        ]
        lines.append(
            [
                str(line.setting),
                line.setting.profile,
                f"{line.bytes_per_position:.1f}",
                _size(line.bytes_per_position * tokens),
                f"{line.mass:.3f}",
                *(f"{line.kl[t]:.1e}" if t in line.kl else "-" for t in TEMPERATURES),
                *gradients,
            ]
        )
    return lines


def _free_bytes(folder: Place) -> int | None:
    """Of the disk that a directory is on, or will be; a store does not tell."""
    if not isinstance(folder, Path):
        return None
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError
