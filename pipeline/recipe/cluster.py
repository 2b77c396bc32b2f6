"""cluster."""

from __future__ import annotations

import re

from pydantic import (
    Field,
    field_validator,
)

from .section import Section


class JobConfig(Section):
    """What a Slurm job asks for; what is not given is left to the cluster's own defaults."""

    partition: str | None = Field(None, description="Slurm partition")
    account: str | None = Field(None, description="Slurm account")
    time: str | None = Field(None, description="time limit as Slurm writes it; a job that reaches it is requeued")
    memory: str | None = Field(None, description="memory per node, for example 64G")
    cpus: int | None = Field(None, ge=1, description="cores per node")
    gpus: int | None = Field(None, ge=0, description="GPUs per node")
    processes: int | None = Field(None, ge=1, description="processes per node; by default one per GPU")
    sbatch: list[str] | None = Field(None, description="further sbatch options, for example ['--qos=high']")

    @field_validator("partition", "account", "time", "memory")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and (not value or any(c.isspace() for c in value)):
            raise ValueError("must be one word: it becomes an sbatch option")
        return value

    @field_validator("time")
    @classmethod
    def _slurm_time(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", value):
            raise ValueError("write minutes, HH:MM:SS or D-HH:MM:SS")
        return value

    @field_validator("sbatch")
    @classmethod
    def _options(cls, lines: list[str] | None) -> list[str] | None:
        if any(not line.startswith("-") or "\n" in line for line in lines or []):
            raise ValueError("every entry must be one sbatch option, such as '--qos=high'")
        return lines


class TrainJobConfig(JobConfig):
    nodes: int = Field(1, ge=1, description="nodes of one training job")


class ClusterConfig(JobConfig):
    """How `logit-cache submit` cuts a run into Slurm jobs. Its own keys hold for every job."""

    tasks: int = Field(1, ge=1, description="tasks that share the shards, an array job")
    max_parallel: int | None = Field(None, ge=1, description="tasks that run at the same time at most")
    setup: list[str] = Field(default_factory=list, description="shell lines before each command, such as module loads")
    python: str | None = Field(None, description="interpreter of the jobs; by default the one that submits")
    finalise: JobConfig = Field(JobConfig(), description="replaces keys for the job after the array")
    train: TrainJobConfig = Field(TrainJobConfig(), description="replaces keys for the training jobs")
