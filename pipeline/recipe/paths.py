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
CODEBOOK, BASIS = "codebook-", "basis-"
"""How names of codebooks and tail bases begin."""


@dataclass(frozen=True)
class CachePaths(Generic[P]):
    """The files of one cache. Names of shards have five digits, more from the hundred-thousandth on.

    manifest.json          format, identity, codec, rows per shard
    codebook-DIGEST.zarr/  the codec's table of token ids, if it has one
    basis-DIGEST.zarr/     the basis of the tails' shapes, if they have one
    corpus/                packed rows
    shards/00000.zarr.zip  the arrays of one shard, a Zarr group in a zip file
    shards/00000.json      its commit record, written last
    complete.json          the note that all of them are written
    """

    folder: P

    @property
    def manifest(self) -> P:
        return self._file("manifest.json")

    @property
    def complete(self) -> P:
        return self._file("complete.json")

    @property
    def corpus(self) -> P:
        return self._file(CORPUS)

    @property
    def shards(self) -> P:
        return self._file("shards")

    def shard(self, shard: int) -> P:
        return self._file("shards", f"{shard_stem(shard)}.zarr.zip")

    def record(self, shard: int) -> P:
        return self._file("shards", record_name(shard))

    def codebook(self, digest: str) -> P:
        return self._file(f"{CODEBOOK}{digest[:12]}.zarr")

    def basis(self, digest: str) -> P:
        return self._file(f"{BASIS}{digest[:12]}.zarr")

    def _file(self, *names: str) -> P:
        return reduce(truediv, names, self.folder)


def shard_stem(shard: int) -> str:
    """The name that all files of a shard begin with."""
    return f"{shard:05}"


def record_name(shard: int) -> str:
    return f"{shard_stem(shard)}.json"


def recorded_shard(name: str) -> int | None:
    """The shard whose record has this name, None for any other file."""
    stem = name.removesuffix(".json")
    return int(stem) if stem.isdecimal() and stem.isascii() and record_name(int(stem)) == name else None


class StudentPaths:
    """The directory of one student."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start = folder / "start"
        """First weights, exported by stage one for a student that is made of the teacher's layers."""
        self.start_record = self.start / "start.json"
        """The layers and teacher weights that `start` was made from."""
        self.record = folder / "run.json"
        """Settings, cache and seed of the training; another run with other ones is refused."""
        self.lock = folder / "train.lock"
        """Locked by the process that trains it, which it names."""
        self.checkpoints = folder / "checkpoints"
        self.metrics = folder / "metrics.jsonl"
        """One JSON line for every logged step."""
        self.evaluations = folder / "evaluations.jsonl"
        """One JSON line for every evaluation during the training."""
        self.tensorboard = folder / "tensorboard"
        self.provenance = folder / "provenance.json"
        self.final = folder / "final"
        """The trained model with its tokenizer, published when it is complete."""

    @property
    def finished(self) -> bool:
        return (self.final / "config.json").exists()


class RunPaths:
    """The directory of a run, and the place of its caches, which may be a URL."""

    def __init__(self, folder: Path, caches: Place) -> None:
        self.folder = folder
        self.cache: Place = caches / "cache"
        self.heldout: Place = caches / "heldout"
        self.sides = {"cache": self.cache, "heldout": self.heldout}
        """Both caches by name, training and held-out."""
        self.recipe = folder / "recipe.toml"
        """The resolved recipe."""
        self.provenance = folder / "provenance.json"
        self.teacher = folder / "teacher"
        """A GGUF teacher, converted to safetensors."""
        self.teach = folder / "teach"
        """The training run of `teach`."""
        self.teacher_facts = folder / "teacher.json"
        """Size and speed of the teacher, measured by stage one."""
        self.prompt_sample = folder / "prompt.json"
        """The teacher's continuation of the report's prompt."""
        self.plan = folder / "plan.json"
        self.evaluation = folder / "evaluation.json"
        self.report = folder / "report"
        self.slurm = folder / "slurm"
        """Batch scripts of `submit`, the recipe that they run, and logs."""
        self.slurm_jobs = self.slurm / "jobs.json"
        """Ids of the submitted jobs."""
        self.slurm_logs = self.slurm / "logs"

    def student(self, name: str) -> StudentPaths:
        return StudentPaths(self.folder / "students" / name)
