"""Recipes: one TOML file describes a whole run, from corpus to report.

A recipe is read, checked and resolved here, and nowhere else: unknown keys are errors that name the nearest valid key,
`[train]` is merged into every `[students.NAME]`, and values given on the command line replace those of the file. The
resolved recipe is saved beside the outputs and is itself a valid recipe.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from ..base.places import place
from .cluster import ClusterConfig
from .paths import RunPaths
from .section import Name, Section, Seed, parse_signal
from .student import StudentConfig, TeacherTraining


class TeacherConfig(Section):
    """The model whose distribution is cached."""

    model: Name = Field(description="directory, hub name, GGUF file, or package:NAME/FILE inside an installed package")
    revision: str | None = Field(None, description="hub revision; a commit hash makes the run repeatable")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    parallel: Literal["none", "layers", "tensor"] = Field(
        "none", description="too big for one device: layers over the devices of a process, or tensors over processes"
    )
    batch_rows: int = Field(8, ge=1, description="rows per forward pass")
    training: TeacherTraining | None = Field(None, description="how `teach` makes the teacher, where there is none")


class CorpusConfig(Section):
    """Where the text comes from and how it is cut into rows."""

    source: str | list[str] = Field(description="files, globs or fsspec URLs (or one hub name with format = 'hub')")
    format: Literal["auto", "text", "jsonl", "parquet", "hub"] = "auto"
    text_column: str = "text"
    messages_column: str | None = Field(None, description="conversations instead of text, as lists of {role, content}")
    loss_on: Literal["assistant", "all"] = Field("assistant", description="which words of conversations are learned")
    ids_column: str | None = Field(None, description="ready token ids instead of text")
    mask_column: str | None = Field(None, description="beside ids_column: 1 for tokens to be learned, 0 for others")
    hub_config: str | None = None
    hub_split: str = "train"
    document_separator: str | None = Field(None, description="cut text files into documents at this string")
    objective: Literal["causal", "masked"] = Field("causal", description="predict the next token, or hidden ones")
    mask_fraction: float = Field(0.15, gt=0.0, le=1.0, description="share of the tokens that masked hides")
    mask_draws: int = Field(1, ge=1, description="rows made of the same text, each with its own masks")
    row_length: int = Field(512, ge=2, description="tokens per row")
    max_rows: int | None = Field(None, ge=1, description="stop after this many training rows")
    heldout_fraction: float = Field(0.05, ge=0.0, lt=1.0, description="share of the documents that is held out")
    max_heldout_rows: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_content(self) -> CorpusConfig:
        if self.messages_column is not None and self.ids_column is not None:
            raise ValueError("messages_column and ids_column exclude each other")
        if self.mask_column is not None and self.ids_column is None:
            raise ValueError("mask_column goes with ids_column: text has no tokens yet to be masked")
        if self.format == "text" and self.content_columns() != [self.text_column]:
            raise ValueError("format = 'text' has no columns: use jsonl, parquet or hub")
        if self.objective == "masked" and (self.messages_column is not None or self.mask_column is not None):
            raise ValueError("objective = 'masked' chooses itself what is learned: no messages_column or mask_column")
        if self.objective == "masked" and self.row_length < 8:
            raise ValueError(
                "objective = 'masked' frames every piece of text with two tokens: row_length must be at least 8"
            )
        return self

    def content_columns(self) -> list[str]:
        """The columns that are read of a record."""
        if self.messages_column is not None:
            return [self.messages_column]
        if self.ids_column is not None:
            return [self.ids_column, *([self.mask_column] if self.mask_column is not None else [])]
        return [self.text_column]


class CacheConfig(Section):
    """What is kept of the teacher at every position."""

    support: Literal["topk", "topp", "threshold", "sampled"] = Field(
        "topk",
        description="topk: the k most probable; topp: the fewest that hold mass p, at most k; threshold: all of probability tau "
        "and samples of the others; sampled: random draws",
    )
    k: int = Field(64, ge=1, description="candidates kept per position (topk), or at most (topp)")
    p: float = Field(0.98, gt=0.0, le=1.0, description="mass that topp keeps")
    tau: float = Field(0.05, ge=1 / 4096, le=1.0, description="probability from which threshold keeps a token exactly")
    draws: int = Field(50, ge=1, le=4096, description="random draws per position of sampled")
    profile: Literal["compact", "fast"] = Field(
        "compact", description="compact: fewest bytes; fast: read at memory speed"
    )
    targets_on: Literal["real", "masked"] = Field(
        "real", description="masked rows: targets at every token that is not padding, or at hidden ones only"
    )
    signals: list[str] = Field(
        [], description="kept beside the targets: hidden.N, attention.N, qk.N, with :int8, :float16 or :direction"
    )
    heldout_k: int = Field(512, ge=1, description="candidates kept per held-out position, where students are measured")
    knots: list[float] = Field(
        [0.25, 0.5, 0.75, 0.875],
        validate_default=True,
        description="inverse temperatures at which the tail mass is kept",
    )
    shard_rows: int = Field(128, ge=1, description="rows per shard, the unit that is committed and resumed")
    location: Name | None = Field(
        None, description="directory or fsspec URL in which the caches cache/ and heldout/ lie; by default run_dir"
    )

    @field_validator("signals")
    @classmethod
    def _known(cls, signals: list[str]) -> list[str]:
        names = [":".join(parse_signal(signal)) for signal in signals]
        if len({name.partition(":")[0] for name in names}) < len(names):
            raise ValueError("a signal is named twice")
        return names

    @field_validator("knots")
    @classmethod
    def _positive(cls, knots: list[float]) -> list[float]:
        if any(not 0.0 < knot <= 16.0 for knot in knots):
            raise ValueError("every knot must be an inverse temperature above 0 and at most 16")
        return sorted({*knots, 1.0})


class EvaluationConfig(Section):
    batch_rows: int = Field(8, ge=1)


class StudyConfig(Section):
    """Which targets `logit-cache study` compares; the student is the recipe's [students.student]."""

    caches: dict[str, CacheConfig] = Field(
        default_factory=dict, description="name -> the keys of [cache] in which this one differs"
    )
    temperatures: list[float] = Field([1.0, 2.0], min_length=1, description="of KD")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="runs of every variant")
    gradient_rows: int = Field(4, ge=1, description="rows of the batch whose gradient is compared")

    @field_validator("caches")
    @classmethod
    def _plain(cls, caches: dict[str, CacheConfig]) -> dict[str, CacheConfig]:
        for name in caches:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"cache name {name!r} must be letters, digits, '-' and '_': it names a directory")
        return caches

    @field_serializer("caches")
    def _as_given(self, caches: dict[str, CacheConfig]) -> dict[str, dict[str, Any]]:
        return {name: cache.model_dump(exclude_unset=True) for name, cache in caches.items()}


class ReportConfig(Section):
    title: str = "Distillation from cached teacher logits"
    row: int | None = Field(
        None, ge=0, description="held-out row whose candidates are drawn; by default one in the middle"
    )
    position: int | None = Field(None, ge=0, description="position in that row; by default one of middling entropy")
    prompt: str | None = Field(None, min_length=1, description="a text that stage one has the teacher continue")


class Recipe(Section):
    """A whole run."""

    run_dir: Path
    seed: Seed = 0
    teacher: TeacherConfig
    corpus: CorpusConfig
    cache: CacheConfig = CacheConfig()
    students: dict[str, StudentConfig] = Field(default_factory=dict)
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    study: StudyConfig = StudyConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("students")
    @classmethod
    def _plain_names(cls, students: dict[str, StudentConfig]) -> dict[str, StudentConfig]:
        for name in students:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"student name {name!r} must be letters, digits, '-' and '_': it names a directory")
        return students

    @field_validator("run_dir")
    @classmethod
    def _is_local(cls, run_dir: Path) -> Path:
        if re.match(r"[a-z0-9+]+:/", str(run_dir)):
            raise ValueError(
                "must be a local directory (checkpoints and reports are files): set cache.location to a URL"
            )
        return run_dir.expanduser()

    @property
    def paths(self) -> RunPaths:
        """Where the files of the run lie."""
        return RunPaths(self.run_dir, place(self.cache.location or self.run_dir))


TeacherConfig.model_rebuild()


Recipe.model_rebuild()
