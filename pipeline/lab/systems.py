"""Four known distillations as their sources publish them, and their sizes from configurations alone.

`sizes` builds teacher and student on the meta device, by the function that makes students from real teachers, and
counts their weights. Further content of the published files is counted too; the comment of each entry names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..assess.evaluation import read_results
from ..base.errors import RecipeError
from ..models.loading import quiet_transformers
from ..models.student_layers import student_from_layers
from ..recipe.schema import Recipe
from ..store.reader import LogitCache

_BERT = {"model_type": "bert", "vocab_size": 30522}
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

    Sizes read teacher -> student. Retention is the student's held-out accuracy (share of labels that are its first
    choice) over the teacher's; the control has the same first weights, rows and steps, and no teacher. Bytes are of the
    whole cache over all its tokens.

    Raises RecipeError for an unknown name, IncompleteError for a run that is not evaluated.
    """
    unknown = [name for name in recipes if name not in SYSTEMS]
    if unknown:
        raise RecipeError(f"{unknown[0]!r} is not a known system: {', '.join(SYSTEMS)}")
    rows = []
    for name, recipe in recipes.items():
        system, counted, results = SYSTEMS[name], sizes(SYSTEMS[name]), read_results(recipe)
        teacher, student, control = (results[which] for which in ("teacher", "student", "control"))
        cache = LogitCache(recipe.paths.cache)
        before, after = system.published_megabytes
        row = {
            "system": name,
            "published MB": f"{before:g} -> {after:g}",
            "counted MB": f"{counted.teacher_megabytes:.0f} -> {counted.student_megabytes:.0f}",
            "published M": f"{system.published_parameters:g}",
            "counted M": f"{counted.parameters / 1e6:.1f}",
            "ours MB": f"{teacher['bytes'] / 1e6:.0f} -> {student['bytes'] / 1e6:.0f}",
            "ours M": f"{teacher['parameters'] / 1e6:.1f} -> {student['parameters'] / 1e6:.1f}",
            "bytes/token": f"{cache.bytes / (len(cache) * cache.row_length):,.0f}",
            "accuracy": f"{teacher['accuracy']:.1%}",
            "retention": _share(student["accuracy"], teacher["accuracy"]),
            "control": _share(control["accuracy"], teacher["accuracy"]),
            "perplexity": " / ".join(f"{model['perplexity']:.0f}" for model in (teacher, student, control)),
        }
        rows.append(row)
    return rows


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "-"
