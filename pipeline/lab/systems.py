"""Four known distillations as their sources publish them, and their sizes from configurations alone.

`sizes` builds teacher and student on the meta device, by the function that makes students from real teachers, and
counts their weights. Further content of the published files is counted too; the comment of each entry names it.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch

from ..assess.evaluation import read_results
from ..assess.intervals import interval
from ..base.errors import RecipeError
from ..models.loading import quiet_transformers
from ..models.student_layers import student_from_layers
from ..recipe.schema import Recipe
from ..store.reader import LogitCache

_BERT = {"model_type": "bert", "vocab_size": 30522}
_COMPARED = ("student", "control")
"""What recipes of systems call the student and the one without a teacher."""
_GPT2_MASK = 1024 * 1024  # the causal mask that old GPT-2 files hold for every layer


@dataclass(frozen=True)
class System:
    """One published distillation."""

    teacher: dict[str, Any]
    """transformers configuration."""
    teacher_class: str
    published_parameters: float
    """Of the student, millions."""
    published_megabytes: tuple[float, float]
    """Files of teacher and student."""
    published_share: float | None = None
    """What the student keeps of the teacher's quality in its source's own measure."""
    layers: list[int] | None = None
    """Teacher layers of the student."""
    token_types: str = "keep"
    student: dict[str, Any] = field(default_factory=dict)
    """Configuration of a student with random first weights."""
    student_class: str = ""
    body_only: bool = False
    """Whether the published count leaves the output layer's transform out."""
    teacher_extra: int = 0
    student_extra: int = 0
    """Further float32 values in the published files."""
    megabyte: float = 1e6


SYSTEMS = {
    # The files hold a causal mask of 4.2 MB for every layer.
    "distilgpt2": System(
        teacher={"model_type": "gpt2"},
        teacher_class="GPT2LMHeadModel",
        layers=[0, 2, 4, 7, 9, 11],
        published_parameters=82,
        published_megabytes=(548, 353),
        teacher_extra=12 * _GPT2_MASK,
        student_extra=6 * _GPT2_MASK,
    ),
    # 66 M counts the body, the file has the vocabulary transform too.
    "distilbert": System(
        teacher=_BERT,
        teacher_class="BertForPreTraining",
        layers=[0, 2, 4, 7, 9, 11],
        token_types="drop",
        published_parameters=66,
        published_megabytes=(440, 268),
        published_share=77.0 / 79.5,  # GLUE
        body_only=True,
    ),
    # Published in MiB; 28 M counts the body, the file has the vocabulary transform too.
    "distilkobert": System(
        teacher={**_BERT, "vocab_size": 8002},
        teacher_class="BertModel",
        layers=[0, 4, 8],
        token_types="drop",
        published_parameters=28,
        published_megabytes=(351, 108),
        published_share=88.41 / 89.63,  # accuracy on NSMC
        body_only=True,
        megabyte=2**20,
    ),
    # The file holds five 312 -> 768 projections; 62.7 MB cut to 62.
    "tinybert4": System(
        teacher=_BERT,
        teacher_class="BertForPreTraining",
        student={
            **_BERT,
            "num_hidden_layers": 4,
            "hidden_size": 312,
            "num_attention_heads": 12,
            "intermediate_size": 1200,
        },
        student_class="BertForPreTraining",
        published_parameters=14.5,
        published_megabytes=(440, 62),
        published_share=0.968,  # GLUE
        student_extra=5 * (312 * 768 + 768),
    ),
}


@dataclass(frozen=True)
class Sizes:
    """Counts from configurations."""

    parameters: int
    """Of the student, as the published figure counts them."""
    teacher_megabytes: float
    student_megabytes: float
    """Of float32 files, in the unit of the published figure."""


def sizes(system: System) -> Sizes:
    """Parameters and file sizes of a published teacher and its student, without allocating a weight."""
    import transformers

    with torch.device("meta"), quiet_transformers():
        config = transformers.AutoConfig.for_model(**system.teacher)
        teacher = getattr(transformers, system.teacher_class)(config)
        if system.layers is None:
            student = getattr(transformers, system.student_class)(transformers.AutoConfig.for_model(**system.student))
        elif system.token_types == "drop":
            student = student_from_layers(transformers.BertForMaskedLM(config), system.layers, "drop")
        else:
            student = student_from_layers(teacher, system.layers)
    counted = student.base_model if system.body_only else student
    return Sizes(
        parameters=parameter_count(counted),
        teacher_megabytes=4 * (parameter_count(teacher) + system.teacher_extra) / system.megabyte,
        student_megabytes=4 * (parameter_count(student) + system.student_extra) / system.megabyte,
    )


def parameter_count(model: Any) -> int:
    """Number of weights of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def comparison(recipes: dict[str, Recipe]) -> list[dict[str, str]]:
    """One row of a table per evaluated run: published figures, those of the configuration, and those of the run.

    Sizes read teacher -> student. What is kept is the student's held-out accuracy (share of labels that are its first
    choice) over the teacher's; the control has the same first weights, rows and steps, and no teacher. Both are means
    over the recipe's seeds, ± half of the 95 % interval; the lead is their difference seed by seed. Bytes are of the
    whole cache over all its tokens.

    Raises RecipeError for an unknown name, IncompleteError for a run that is not evaluated.
    """
    unknown = [name for name in recipes if name not in SYSTEMS]
    if unknown:
        raise RecipeError(f"{unknown[0]!r} is not a known system: {', '.join(SYSTEMS)}")
    return [_row(name, recipe) for name, recipe in recipes.items()]


def _row(name: str, recipe: Recipe) -> dict[str, str]:
    system, counted, results = SYSTEMS[name], sizes(SYSTEMS[name]), read_results(recipe)
    teacher = results["teacher"]
    students, controls = (
        {seed: results[student] for seed, student in recipe.students_of(which).items()} for which in _COMPARED
    )
    for which, found in zip(_COMPARED, (students, controls), strict=True):
        if not found:
            raise RecipeError(f"the recipe of {name!r} has no student {which!r}: add [students.{which}]")
    one, cache = next(iter(students.values())), LogitCache(recipe.paths.cache)
    kept, without = (
        {seed: _share(result["accuracy"], teacher["accuracy"]) for seed, result in found.items()}
        for found in (students, controls)
    )
    perplexity = [[result["perplexity"] for result in found.values()] for found in ({0: teacher}, students, controls)]
    before, after = system.published_megabytes
    share = system.published_share
    return {
        "system": name,
        "published MB": f"{before:g} -> {after:g}",
        "counted MB": f"{counted.teacher_megabytes:.0f} -> {counted.student_megabytes:.0f}",
        "published M": f"{system.published_parameters:g}",
        "counted M": f"{counted.parameters / 1e6:.1f}",
        "ours M": f"{teacher['parameters'] / 1e6:.2f} -> {one['parameters'] / 1e6:.2f}",
        "bytes/token": f"{cache.bytes / (len(cache) * cache.row_length):,.0f}",
        "accuracy": f"{teacher['accuracy']:.1%}",
        "published share": "-" if share is None else f"{share:.1%}",
        "kept": _with_interval(list(kept.values())),
        "control": _with_interval(list(without.values())),
        "lead": _with_interval([kept[seed] - without[seed] for seed in kept if seed in without]),
        "seeds": str(len(students)),
        "perplexity": " / ".join(f"{statistics.fmean(values):.1f}" for values in perplexity),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _with_interval(shares: list[float]) -> str:
    mean, half = interval(shares)
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.1%}" if half is None else f"{mean:.1%} ± {half:.1%}"
