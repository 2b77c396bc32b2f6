"""The recipe reference in stages/README.md, written from the descriptions of the schema's own fields.

    python -m logit_cache.stages.reference        rewrites that part of the README

Each section of the recipe is a table with one key a row. The first sentence of a description is the key's meaning in
the table; choices and further sentences follow below it, one key a point.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..recipe.cluster import ClusterConfig, TrainJobConfig
from ..recipe.schema import (
    CacheConfig,
    CorpusConfig,
    EvaluationConfig,
    Recipe,
    ReportConfig,
    StudyConfig,
    TeacherConfig,
)
from ..recipe.student import Schedule, StudentConfig, TeacherTraining

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- recipe reference: begin -->", "<!-- recipe reference: end -->"
SECTIONS: dict[str, tuple[type[BaseModel], str | None]] = {
    "Top level": (Recipe, None),
    "`[teacher]`": (TeacherConfig, None),
    "`[teacher.training]`": (TeacherTraining, "`[students.NAME]`"),
    "`[corpus]`": (CorpusConfig, None),
    "`[cache]`": (CacheConfig, None),
    "`[students.NAME]`": (StudentConfig, None),
    "A schedule": (Schedule, None),
    "`[evaluation]`": (EvaluationConfig, None),
    "`[study]`": (StudyConfig, None),
    "`[report]`": (ReportConfig, None),
    "`[cluster]`": (ClusterConfig, None),
    "`[cluster.train]`": (TrainJobConfig, "`[cluster]`"),
}
"""Title -> section, and the title of the section whose keys it has too."""


def reference() -> str:
    """The whole reference as Markdown."""
    return "\n".join(_section(title, *parts) for title, parts in SECTIONS.items())


def _section(title: str, section: type[BaseModel], also: str | None) -> str:
    shared = SECTIONS[also][0].model_fields if also is not None else {}
    about = " ".join((section.__doc__ or "").split()) + (f" The keys of {also}, and:" if also is not None else "")
    rows, notes = [], []
    for name, field in section.model_fields.items():
        if name in shared:
            continue
        meaning, _, rest = (field.description or "").partition(". ")
        rows.append(f"| `{name}` | {_type(field)} | {_default(field)} | {meaning} |")
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if any(f"`{choice}`:" not in rest for choice in choices):
            listed = f"One of {', '.join(f'`{choice}`' for choice in choices)}"
            rest = f"{listed}. {rest}" if rest else listed
        if rest:
            notes.append(_wrapped(f"* `{name}`: {rest}.", "  "))
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([f"### {title}\n", _wrapped(about), "", *table, "", *notes, *([""] if notes else [])])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 116, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _type(field: FieldInfo) -> str:
    """The type as a reader of TOML knows it, with its bounds."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [
        f"{sign} {limit:,}" if isinstance(limit, int) else f"{sign} {limit:.3g}"
        for name, sign in signs.items()
        for constraint in field.metadata
        if (limit := getattr(constraint, name, None)) is not None
    ]
    return f"{_name(field.annotation)} {', '.join(bounds)}".strip()


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "choice"
    if origin is Annotated:
        return _name(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_name(part) for part in arguments if part is not NoneType))
    if origin is list:
        return f"list of {_name(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_name(part) for part in arguments)}]"
    if annotation is Schedule:
        return "schedule"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "table"
    return {str: "string", Path: "path"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, (BaseModel, dict)):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"  # as TOML writes it


def written(text: str) -> str:
    """The README's text with the reference of today between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
