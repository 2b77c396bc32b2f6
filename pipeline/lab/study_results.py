"""Results of a study: a small file for each run, and what they say together.

A file names the settings that it depends on by their digest, so that results can be kept with the code and continued
on another machine, and those of other settings are never mixed in.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..assess.intervals import Interval, interval
from ..base.durable import read_json, write_json
from ..base.errors import IncompleteError
from ..recipe.schema import Recipe
from .study_arms import Arm, arms, cache_recipe

TEACHER = "teacher"


@dataclass(frozen=True)
class Result:
    """One student: of one arm and seed."""

    identity: str
    """Digest of the settings (`Arm.identity`)."""
    teacher: str
    """Digest of the weights of the teacher that it was compared with."""
    measures: dict[str, float]
    """Of `assess.evaluation`, on held-out rows."""
    bytes_per_position: float | None
    """Of the shards of its cache."""
    kept_mass: float | None
    """Mean mass of the head at the arm's temperature, of its cache."""
    tokens: int
    """That it was trained on, repeated ones included."""
    seconds_per_step: float | None
    """Of the processor, evaluations in training included; None of a training that was stopped and continued."""
    curve: list[tuple[int, float]]
    """Tokens so far, and cross-entropy on some held-out rows in nats."""


@dataclass(frozen=True)
class Line:
    """An arm over all seeds that are there: mean and interval of each measure."""

    arm: Arm
    shaped: bool
    """Whether its cache has the shape of the tails."""
    seeds: int
    values: dict[str, Interval]
    bytes_per_position: float | None
    kept_mass: float | None
    curve: list[tuple[int, float]]
    """Mean over the seeds."""


@dataclass(frozen=True)
class Study:
    """What the results of a study say."""

    teacher: dict[str, float]
    """The teacher's own measures; empty where they are not there."""
    lines: list[Line]
    missing: int
    """Runs without a result."""
    teachers: int
    """Teachers of the results: one for each machine that they were made on."""


def results_folder(recipe: Recipe) -> Path:
    return recipe.run_dir / "results" if recipe.study.results is None else Path(recipe.study.results)


def read_result(recipe: Recipe, arm: Arm, seed: int) -> Result | None:
    """The result of a run; None where there is none, or one of other settings."""
    found = read_json(_file(recipe, arm, seed), "delete it")
    if found is None or found["identity"] != arm.identity(recipe, seed):
        return None
    return Result(**{**found, "curve": [tuple(point) for point in found["curve"]]})


def write_result(recipe: Recipe, arm: Arm, seed: int, result: Result) -> None:
    write_json(_file(recipe, arm, seed), asdict(result))


def read_teacher(recipe: Recipe) -> dict[str, float]:
    """The teacher's own measures; empty where there are none, or of other settings."""
    found = read_json(results_folder(recipe) / f"{TEACHER}.json", "delete it") or {}
    return found["measures"] if found.get("identity") == _teacher_identity(recipe) else {}


def write_teacher(recipe: Recipe, measures: dict[str, float]) -> None:
    found = {"identity": _teacher_identity(recipe), "measures": measures}
    write_json(results_folder(recipe) / f"{TEACHER}.json", found)


def _teacher_identity(recipe: Recipe) -> str:
    """Of the first arm, whose student comes from the same teacher and rows."""
    return next(iter(arms(recipe))).identity(recipe, 0)


def _file(recipe: Recipe, arm: Arm, seed: int) -> Path:
    return results_folder(recipe) / f"{arm.file_stem}-seed{seed}.json"


def summarise(recipe: Recipe) -> Study:
    """One line per arm, of the seeds that have a result. Raises IncompleteError where there is none at all.

    gap closed = (KL of labels - KL of arm) / (KL of labels - KL of online)    KL to the teacher, same seed
    """
    by_arm = {
        arm.name: {seed: result for seed in recipe.study.seeds if (result := read_result(recipe, arm, seed))}
        for arm in arms(recipe)
    }
    found = [result for results in by_arm.values() for result in results.values()]
    if not found:
        raise IncompleteError(f"{results_folder(recipe)}: no results of these settings: run `logit-cache study`")
    lines = []
    for arm in arms(recipe):
        results = by_arm[arm.name]
        if not results:
            continue
        some = list(results.values())
        values = {key: interval([result.measures[key] for result in some]) for key in some[0].measures}
        labels, online = by_arm[arm.labels_reference], by_arm[arm.online_reference(recipe)]
        paired = [seed for seed in results if seed in labels and seed in online]
        if paired:
            kls = [[part[seed].measures["kl_to_teacher"] for seed in paired] for part in (labels, results, online)]
            values["gap_closed"] = interval([(a - b) / (a - c) for a, b, c in zip(*kls, strict=True)])
        seconds = [result.seconds_per_step for result in some if result.seconds_per_step is not None]
        if seconds:
            values["seconds_per_step"] = interval(seconds)
        points = zip(*(result.curve for result in some), strict=False)
        curve = [(column[0][0], statistics.fmean(loss for _, loss in column)) for column in points]
        shaped = arm.cache is not None and cache_recipe(recipe, arm.cache).cache.rank > 0
        lines.append(Line(arm, shaped, len(some), values, some[0].bytes_per_position, some[0].kept_mass, curve))
    missing = len(by_arm) * len(recipe.study.seeds) - len(found)
    return Study(read_teacher(recipe), lines, missing, len({result.teacher for result in found}))


MEASURES: dict[str, tuple[str, Any]] = {
    "gap_closed": ("gap closed", "{:.1%}".format),
    "perplexity": ("perplexity", "{:.2f}".format),
    "kl_to_teacher": ("KL to teacher", "{:.4f}".format),
    "calibration_error": ("calibration error", "{:.2%}".format),
    "acceptance": ("acceptance", "{:.1%}".format),
    "seconds_per_step": ("s/step", "{:.3f}".format),
}


def table(study: Study) -> list[dict[str, str]]:
    """One row per arm, ready to print: mean ± half of the 95 % interval."""

    def cells(values: dict[str, Interval]) -> dict[str, str]:
        found = {}
        for key, (title, show) in MEASURES.items():
            mean, half = values.get(key, (None, None))
            found[title] = "-" if mean is None else show(mean) + ("" if half is None else f" ± {show(half)}")
        return found

    own: dict[str, Interval] = {key: (value, None) for key, value in study.teacher.items()}
    rows = [{"arm": TEACHER, "seeds": "-", "bytes": "-", "kept": "-", **cells(own)}] if own else []
    for line in study.lines:
        size, kept = line.bytes_per_position, line.kept_mass
        about = {"bytes": "-" if size is None else f"{size:.0f}", "kept": "-" if kept is None else f"{kept:.2f}"}
        rows.append({"arm": line.arm.name, "seeds": str(line.seeds), **about, **cells(line.values)})
    return rows
