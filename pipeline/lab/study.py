"""Does a cache distil as well as the teacher itself? The same student from every kind of target, over several seeds.

A study is a recipe with a [study] table. Every variant starts from the same weights and, for a seed, sees the same rows
in the same order; only the targets differ, so that differences between variants are paired. A study that runs again
does the missing runs only.

    gap closed = (KL of ce - KL of variant) / (KL of ce - KL of online)    KL to the teacher on held-out rows, same seed
"""

from __future__ import annotations

import functools
import math
import shutil
import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..assess.evaluation import COLUMNS, Column, evaluate_student
from ..assess.gradient_probe import GradientProbe, compare_gradients
from ..base.durable import read_json, write_json
from ..base.errors import IncompleteError, RecipeError
from ..base.places import place
from ..capture.handover import export_for_students
from ..capture.stage_one import fill_caches
from ..corpus.prepare import prepare_corpus
from ..distill.stage_two import train_student
from ..distill.student import build_student
from ..models.loading import load_model, max_positions
from ..models.placement import choose_placement
from ..models.teacher import Teacher, teacher_of
from ..models.teacher_source import teacher_config, teacher_tokenizer
from ..recipe.choices import Tail
from ..recipe.loading import save_resolved
from ..recipe.paths import StudentPaths
from ..recipe.schema import CacheConfig, Recipe
from ..store.reader import LogitCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RESULT = "result.json"
STUDENT = "student"
"""Name of the student in the recipe that all variants train."""
_WORST_SHOWN = -1.0
"""Left edge of the figure: a larger loss of the gap is marked there."""
_COLOURS = {"shape": "#3a7d44", "bucket": "#2a6f97"}
_STUDENT_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t by number of values, one more than the degrees of freedom."""


@dataclass(frozen=True)
class Variant:
    """One way to train the student; `cache` names a cache of the study, None for online and labels alone."""

    name: str
    cache: str | None = None
    mode: str = "cached"
    tail: Tail = "bucket"
    temperature: float = 1.0


def variants(recipe: Recipe) -> Iterator[Variant]:
    """Labels alone ("ce"), online distillation, and every cache with every tail treatment that fits its support."""
    yield Variant("ce", mode="ce")
    for temperature in recipe.study.temperatures:
        at = f" T={temperature:g}"
        yield Variant("online" + at, mode="online", temperature=temperature)
        for name in recipe.study.caches:
            tails = _tails(cache_recipe(recipe, name).cache)
            for tail in tails:
                title = name if len(tails) == 1 else f"{name} {tail}"
                yield Variant(title + at, name, "cached", tail, temperature)


def _tails(cache: CacheConfig) -> tuple[Tail, ...]:
    """The treatments of the tail that are compared: a cache with a shape or with samples has its own only."""
    if cache.rank:
        return ("shape",)
    return ("bucket", "renormalize", "drop", "label") if cache.support in ("topk", "topp") else ("bucket",)


@dataclass(frozen=True)
class Line:
    """A variant over all seeds: mean and half-width of the 95 % interval, per measure."""

    variant: Variant
    seeds: int
    values: dict[str, tuple[float, float | None]]
    bytes_per_position: float | None
    angle: float | None
    """Degrees of a batch gradient of the student's start from that of the full distribution."""


def run_study(recipe: Recipe) -> list[Line]:
    """Do all missing runs and return the table; the teacher is loaded only where a run needs it.

    Raises RecipeError for a recipe without caches to study or without the student.
    """
    if not recipe.study.caches:
        raise RecipeError("the recipe has no [study.caches]: see the shipped recipe study.toml")
    if STUDENT not in recipe.students:
        raise RecipeError(f"a study needs a student named {STUDENT!r}: add [students.{STUDENT}]")
    save_resolved(recipe, recipe.paths.recipe)
    teacher = functools.cache(lambda: teacher_of(recipe))
    caches = {name: _cache(recipe, name, teacher) for name in recipe.study.caches}
    any_cache = next(iter(caches.values()))
    heldout = LogitCache(cache_recipe(recipe, next(iter(caches))).paths.heldout)
    for seed in recipe.study.seeds:
        for variant in variants(recipe):
            folder = _folder(recipe, variant, seed)
            if (folder / RESULT).exists():
                continue
            config = recipe.student(STUDENT).model_copy(
                update={"mode": variant.mode, "temperature": variant.temperature, "tail": variant.tail}
            )
            cache = any_cache if variant.cache is None else caches[variant.cache]
            online = teacher() if variant.mode == "online" else None
            paths = _link_start(recipe, folder)
            train_student(config, f"{variant.name} seed {seed}", cache, folder, seed=seed, teacher=online)
            placement = choose_placement(config.device, config.dtype)
            trust = config.trust_remote_code
            model = load_model(paths.final, placement, objective=heldout.objective, trust_remote_code=trust)
            result = evaluate_student(
                model, heldout, batch_rows=recipe.evaluation.batch_rows, size=0, title=variant.name
            )
            write_json(folder / RESULT, asdict(result))
            for part in (paths.final, paths.checkpoints):
                shutil.rmtree(part)
    angles = _angles(recipe, caches, teacher)
    return summarise(recipe, caches, angles)


def summarise(recipe: Recipe, caches: dict[str, LogitCache], angles: dict[str, float]) -> list[Line]:
    """One line per variant from the results of its runs. Raises IncompleteError where a run is missing."""
    results = {}
    for variant in variants(recipe):
        by_seed = [read_json(_folder(recipe, variant, seed) / RESULT, "delete it") for seed in recipe.study.seeds]
        if None in by_seed:
            missing = _folder(recipe, variant, recipe.study.seeds[by_seed.index(None)])
            raise IncompleteError(f"{missing}: not evaluated: run `logit-cache study`")
        results[variant.name] = by_seed
    first_online = next(name for name in results if name != "ce")
    lines = []
    for variant in variants(recipe):
        by_seed = results[variant.name]
        online = results[first_online if variant.mode == "ce" else f"online T={variant.temperature:g}"]
        closed = [
            (ce["kl_to_teacher"] - one["kl_to_teacher"]) / (ce["kl_to_teacher"] - full["kl_to_teacher"])
            for ce, one, full in zip(results["ce"], by_seed, online, strict=True)
        ]
        values = {
            key: interval([one[key] for one in by_seed])
            for key in ("kl_to_teacher", "perplexity", "calibration_error", "agreement", "acceptance")
        }
        values["gap_closed"] = interval(closed)
        cache = None if variant.cache is None else caches[variant.cache]
        size = None if cache is None else cache.bytes / max(cache.positions, 1)
        lines.append(Line(variant, len(by_seed), values, size, angles.get(variant.name)))
    return lines


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % interval (Student's t); None with one value, or of a student that diverged."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return statistics.fmean(values), None
    quantile = _STUDENT_T_95.get(len(values), 1.96)
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def cache_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one cache of the study, a run of its own inside that of the study."""
    settings = recipe.cache.model_dump()
    if recipe.cache.location is not None:
        settings["location"] = str(place(recipe.cache.location) / name)
    cache = type(recipe.cache).model_validate({**settings, **recipe.study.caches[name].model_dump(exclude_unset=True)})
    return recipe.model_copy(update={"run_dir": recipe.run_dir / "caches" / name, "cache": cache})


def _cache(recipe: Recipe, name: str, teacher: Callable[[], Teacher]) -> LogitCache:
    own = cache_recipe(recipe, name)
    with suppress(IncompleteError):
        return LogitCache(own.paths.cache)
    prepare_corpus(own, teacher_tokenizer(recipe), max_positions(teacher_config(recipe)))
    fill_caches(own, teacher())
    export_for_students(own, teacher())
    return LogitCache(own.paths.cache)


def _link_start(recipe: Recipe, folder: Path) -> StudentPaths:
    """Let a run start from the weights that the capture of the first cache exported, as every run does."""
    paths = StudentPaths(folder)
    origin = cache_recipe(recipe, next(iter(recipe.study.caches))).paths.student(STUDENT)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.students[STUDENT].layers is not None and origin.start_record.exists() and not paths.start.exists():
        paths.start.symlink_to(origin.start.resolve(), target_is_directory=True)
    return paths


def _folder(recipe: Recipe, variant: Variant, seed: int) -> Path:
    return recipe.run_dir / "runs" / f"{variant.name.replace(' ', '-').replace('=', '')}-seed{seed}"


def _angles(recipe: Recipe, caches: dict[str, LogitCache], teacher: Callable[[], Teacher]) -> dict[str, float]:
    """Variant -> degrees between its batch gradient and that of the full distribution, at the common first weights."""
    file = recipe.run_dir / "angles.json"
    known: dict[str, float] | None = read_json(file, "delete it")
    wanted = [variant for variant in variants(recipe) if variant.cache is not None]
    if known is not None and all(variant.name in known for variant in wanted):
        return known
    first = next(iter(caches))
    paths = _link_start(recipe, recipe.run_dir / "runs" / "start")
    student = build_student(recipe.student(STUDENT), paths, recipe.seed, recipe.corpus.objective)
    rows = np.arange(min(recipe.study.gradient_rows, len(caches[first])))
    batch = caches[first].batch(rows)
    hidden = teacher().hidden(batch["input_ids"], batch["segment_ids"]).cpu()
    probe = GradientProbe(student, {**batch, "mask": batch["targets"].mask}, hidden)
    full = {t: probe.gradient(None, teacher(), t) for t in recipe.study.temperatures}
    angles = {}
    for variant in wanted:
        targets = caches[str(variant.cache)].batch(rows)["targets"]
        gradient = probe.gradient(targets, teacher(), variant.temperature, variant.tail)
        angles[variant.name] = compare_gradients(gradient, full[variant.temperature])[0]
    write_json(file, angles)
    return angles


MEASURES: dict[str, Column] = {
    "gap_closed": ("gap closed", "{:.0%}".format),
    "kl_to_teacher": COLUMNS["kl_to_teacher"],
    "perplexity": ("perplexity", "{:.1f}".format),
    **{key: COLUMNS[key] for key in ("calibration_error", "acceptance")},
}


def table(lines: list[Line]) -> list[dict[str, str]]:
    """One row per variant, ready to print: mean ± half of the 95 % interval."""
    rows = []
    for line in lines:
        row = {"variant": line.variant.name}
        for key, (title, show) in MEASURES.items():
            mean, half = line.values[key]
            row[title] = show(mean) + ("" if half is None else f" ± {show(half)}")
        row["gradient angle"] = "-" if line.angle is None else f"{line.angle:.1f}°"
        row["bytes"] = "-" if line.bytes_per_position is None else f"{line.bytes_per_position:.0f}"
        rows.append(row)
    return rows


def draw(lines: list[Line]) -> Figure:
    """Share of the gap closed per variant, with intervals; one panel per temperature.

    A variant more than one gap worse than the labels alone is marked at the edge, with its value.
    """
    from ..assess.figures import panels

    temperatures = sorted({line.variant.temperature for line in lines if line.variant.mode != "ce"})
    shown = {t: [n for n in lines if n.variant.mode != "ce" and n.variant.temperature == t] for t in temperatures}
    figure, axes = panels(5.6 * len(temperatures), 4.6, len(temperatures))
    for axis, (temperature, some) in zip(axes, shown.items(), strict=True):
        for height, line in enumerate(some):
            mean, half = line.values["gap_closed"]
            colour = "#9aa5ad" if line.variant.cache is None else _COLOURS.get(line.variant.tail, "#c1533b")
            if mean < _WORST_SHOWN:
                axis.plot(_WORST_SHOWN, height, "<", color=colour)
                axis.annotate(
                    f"{mean:.0%}", (_WORST_SHOWN, height), (8, 0), textcoords="offset points", va="center", color=colour
                )
            else:
                axis.errorbar(mean, height, xerr=half, fmt="o", color=colour, capsize=3)
        axis.axvline(0, color="#9aa5ad", linewidth=1)
        axis.axvline(1, color="#9aa5ad", linewidth=1, linestyle="--")
        axis.set_yticks(range(len(some)), [line.variant.name.replace(f" T={temperature:g}", "") for line in some])
        axis.invert_yaxis()
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.set_xlim(_WORST_SHOWN - 0.08, 1.12)
        axis.set(title=f"T = {temperature:g}", xlabel="gap closed between labels alone and online")
    return figure
