"""The paths of a run and of a cache: the only module that names their files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import truediv
from pathlib import Path
from typing import Generic, TypeVar

from ..base.places import Place

P = TypeVar("P", bound=Place)
CORPUS = "corpus"
CODEBOOK = "codebook-"
"""How names of codebooks begin."""


@dataclass(frozen=True)
class CachePaths(Generic[P]):
    """The files of one cache. Names of shards have five digits, more from the hundred-thousandth on.

    manifest.json          format, identity, codec, table of shards
    codebook-DIGEST.zarr/  the codec's table of token ids, if it has one
    corpus/                packed rows
    shards/00000.zarr/     the arrays of one shard, a Zarr group
    shards/00000.json      its commit record, written last
    """

    folder: P

    @property
    def manifest(self) -> P:
        return self._file("manifest.json")

    @property
    def corpus(self) -> P:
        return self._file(CORPUS)

    @property
    def shards(self) -> P:
        return self._file("shards")

    def shard(self, shard: int) -> P:
        return self._file("shards", f"{shard_stem(shard)}.zarr")

    def record(self, shard: int) -> P:
        return self._file("shards", record_name(shard))

    def codebook(self, digest: str) -> P:
        return self._file(f"{CODEBOOK}{digest[:12]}.zarr")

    def _file(self, *names: str) -> P:
        return reduce(truediv, names, self.folder)


def shard_stem(shard: int) -> str:
    """The name that all files of a shard begin with."""
    return f"{shard:05}"


def record_name(shard: int) -> str:
    return f"{shard_stem(shard)}.json"


@dataclass(frozen=True)
class StudentPaths:
    """The directory of one student."""

    folder: Path

    @property
    def start(self) -> Path:
        """First weights, exported by stage one for a student that is made of the teacher's layers."""
        return self.folder / "start"

    @property
    def start_record(self) -> Path:
        """The layers and teacher weights that `start` was made from."""
        return self.start / "start.json"

    @property
    def record(self) -> Path:
        """Settings, cache and seed of the training; another run with other ones is refused."""
        return self.folder / "run.json"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON line for every logged step."""
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def provenance(self) -> Path:
        return self.folder / "provenance.json"

    @property
    def final(self) -> Path:
        """The trained model with its tokenizer, published when it is complete."""
        return self.folder / "final"

    @property
    def finished(self) -> bool:
        return (self.final / "config.json").exists()


@dataclass(frozen=True)
class RunPaths:
    """The directory of a run, and the place of its caches, which may be a URL."""

    folder: Path
    caches: Place

    @property
    def cache(self) -> Place:
        return self.caches / "cache"

    @property
    def heldout(self) -> Place:
        return self.caches / "heldout"

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.folder / "recipe.toml"

    @property
    def provenance(self) -> Path:
        return self.folder / "provenance.json"

    @property
    def teacher(self) -> Path:
        """A GGUF teacher, converted to safetensors."""
        return self.folder / "teacher"

    @property
    def teach(self) -> Path:
        """The training run of `teach`."""
        return self.folder / "teach"

    @property
    def teacher_facts(self) -> Path:
        """Size and speed of the teacher, measured by stage one."""
        return self.folder / "teacher.json"

    @property
    def prompt_sample(self) -> Path:
        """The teacher's continuation of the report's prompt."""
        return self.folder / "prompt.json"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def students(self) -> Path:
        return self.folder / "students"

    def student(self, name: str) -> StudentPaths:
        return StudentPaths(self.students / name)

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def slurm(self) -> Path:
        """Batch scripts of `submit`, the recipe that they run, and logs."""
        return self.folder / "slurm"

    @property
    def slurm_jobs(self) -> Path:
        """Ids of the submitted jobs."""
        return self.slurm / "jobs.json"

    @property
    def slurm_logs(self) -> Path:
        return self.slurm / "logs"
