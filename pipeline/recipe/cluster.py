"""Recipe keys of the Slurm jobs."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from .section import Section


class JobConfig(Section):
    """What a Slurm job asks for; a key that is not given is left to the cluster's defaults."""

    partition: str | None = Field(None, description="Slurm partition")
    account: str | None = Field(None, description="Slurm account")
    time: str | None = Field(
        None, description="time limit: minutes, HH:MM:SS or D-HH:MM:SS. A job that reaches it is requeued"
    )
    memory: str | None = Field(None, description="memory per node, such as `64G`")
    cpus: int | None = Field(None, ge=1, description="cores per node")
    gpus: int | None = Field(None, ge=0, description="GPUs per node")
    processes: int | None = Field(None, ge=1, description="processes per node. By default one per GPU")
    sbatch: list[str] | None = Field(None, description="further sbatch options, such as `['--qos=high']`")

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
    """What a training job asks for."""

    nodes: int = Field(1, ge=1, description="nodes per training job")


class ClusterConfig(JobConfig):
    """How `logit-cache submit` cuts a run into Slurm jobs, and what every job asks for.

    A key that is not given is left to the cluster's defaults. `finalise` and `train` are tables of keys that replace
    these.
    """

    tasks: int = Field(
        1, ge=1, description="tasks of the array jobs of `prepare` and stage one, which share text and shards"
    )
    max_parallel: int | None = Field(None, ge=1, description="most tasks that run at the same time")
    setup: list[str] = Field(
        default_factory=list, description="shell lines before each command, such as `module load cuda`"
    )
    python: str | None = Field(None, description="interpreter of the jobs. By default that of `submit`")
    finalise: JobConfig = Field(JobConfig(), description="keys that differ for the job that checks the cache")
    train: TrainJobConfig = Field(TrainJobConfig(), description="keys that differ for training jobs")
