"""A run as Slurm jobs: their scripts, their order, and their submission.

    pack, an array whose tasks share the text ──▶ prepare ──▶ cache, an array whose tasks share the shards
        ──▶ finalise ──▶ train, one job per student

Everything lies in <run_dir>/slurm: the recipe at the time of submission, which the jobs run; the batch scripts; the ids
of the jobs; their logs. The commit records of the cache alone say which shards exist, so a second submission asks only
for tasks with shards left to write.
"""

from __future__ import annotations

import functools
import hashlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..base.durable import read_json, write_bytes, write_json
from ..base.errors import RecipeError
from ..corpus.corpus_files import META
from ..corpus.portions import portions_of
from ..corpus.sources import find_sources
from ..recipe.cluster import JobConfig
from ..recipe.loading import resolved_toml
from ..recipe.paths import CachePaths
from ..recipe.schema import Recipe
from ..store.reader import LogitCache
from ..store.shard_size import shard_rows_of
from .slurm import array_limit, live_jobs, submitted_jobs


@dataclass(frozen=True)
class Job:
    """One batch script, and the names of the jobs that must succeed (`after`) or end (`in_turn`) before it starts."""

    name: str
    stage: str
    script: str
    after: tuple[str, ...] = ()
    in_turn: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """For `status`: the student, or the tasks of an array."""


def plan_jobs(
    recipe: Recipe, templates: Path, *, only: str | None = None, students: list[str] | None = None
) -> list[Job]:
    """The jobs that a run still needs, in the order of submission; `templates` holds the templates of their scripts.

    `only` is "cache" (up to finalise) or "train". Raises IncompleteError for `only="train"` where the cache is neither
    finished nor being finished by jobs in the queue.
    """
    render = functools.partial(_script, recipe, templates)
    jobs: list[Job] = []
    after: tuple[str, ...] = ("finalise",)
    if only != "train":
        jobs += _cache_jobs(recipe, render)
    elif not any(job["name"] == "finalise" for job in live_jobs(recipe)):
        after = ()
        for path in recipe.paths.sides.values():
            LogitCache(path)  # raises unless it is complete
    if only != "cache":
        for name in students or recipe.students:
            if recipe.paths.student(name).finished:
                continue
            train = recipe.cluster.train
            facts: dict[str, Any] = {"student": name, "nodes": train.nodes, "processes": _processes(recipe, train)}
            script = render("train", f"train-{name}", train, **facts)
            jobs.append(Job(f"train-{name}", "train", script, after, facts=facts))
    return jobs


def _cache_jobs(recipe: Recipe, render: Callable[..., str]) -> list[Job]:
    cluster, jobs = recipe.cluster, []
    parallel = recipe.teacher.parallel
    processes = 1 if parallel == "layers" else _processes(recipe, JobConfig())
    workers = 1 if parallel == "tensor" else processes
    left = _left(recipe)
    if left is None:
        jobs += _prepare_jobs(recipe, render)
        num_tasks = cluster.tasks
        pending = list(range(num_tasks))
    else:
        shards = max(total for total, _ in left)
        num_tasks = max(1, min(cluster.tasks, -(-shards // workers)))
        pending = sorted({task_of(shard, num_tasks, workers) for _, missing in left for shard in missing})
    prepare = tuple(job.name for job in jobs[-1:])
    limit = array_limit()
    arrays: list[str] = []
    for offset in range(0, num_tasks, limit):
        tasks = [task - offset for task in pending if offset <= task < offset + limit]
        if not tasks:
            continue
        name = "cache" if num_tasks <= limit else f"cache-{offset}"
        at_once = f"%{cluster.max_parallel}" if cluster.max_parallel else ""
        facts = {"num_tasks": num_tasks, "processes": processes, "workers": workers, "offset": offset, "tasks": tasks}
        script = render("cache", name, JobConfig(), array=f"{_ranges(tasks)}{at_once}", **facts)
        # Parts of a split array run in turn, so that max_parallel holds over all of them.
        in_turn = tuple(arrays[-1:]) if at_once else ()
        jobs.append(Job(name, "cache", script, prepare, in_turn, facts))
        arrays.append(name)
    # One process exports, unless the teacher is split over all of them.
    script = render("finalise", "finalise", cluster.finalise, processes=processes if parallel == "tensor" else 1)
    jobs.append(Job("finalise", "finalise", script, tuple(arrays) or prepare))
    return jobs


def _prepare_jobs(recipe: Recipe, render: Callable[..., str]) -> list[Job]:
    """An array whose tasks share the portions of the text, where there are several, and the job that makes rows of them."""
    config, cluster, without_gpus = recipe.corpus, recipe.cluster, JobConfig(gpus=0)
    # A data set of the hub may be out of reach here.
    count = cluster.tasks if config.format == "hub" else len(portions_of(find_sources(config), config))
    num_tasks, jobs = min(cluster.tasks, count, array_limit()), list[Job]()
    if num_tasks > 1:
        at_once = f"%{cluster.max_parallel}" if cluster.max_parallel else ""
        script = render("prepare", "pack", without_gpus, array=f"0-{num_tasks - 1}{at_once}", num_tasks=num_tasks)
        jobs.append(Job("pack", "prepare", script, facts={"num_tasks": num_tasks}))
    script = render("prepare", "prepare", without_gpus, num_tasks=1)
    return [*jobs, Job("prepare", "prepare", script, tuple(job.name for job in jobs))]


def _script(
    recipe: Recipe, templates: Path, template: str, name: str, job: JobConfig, array: str | None = None, **facts: Any
) -> str:
    """The batch script of a job, from a template."""
    environment = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    resources = _resources(recipe, job)
    options = [f"--array={array}"] if array else []
    options.append(f"--nodes={facts.get('nodes', 1)}")
    given = {
        "partition": resources.partition,
        "account": resources.account,
        "time": resources.time,
        "mem": resources.memory,
        "cpus-per-task": resources.cpus,
        "gres": f"gpu:{resources.gpus}" if resources.gpus else None,
    }
    options += [f"--{option}={value}" for option, value in given.items() if value is not None]
    options += resources.sbatch or []
    logs = recipe.paths.slurm_logs.absolute()
    context = {
        "name": f"{recipe.run_dir.name}-{name}",
        "folder": str(Path.cwd()),
        "recipe": str(resolved_file(recipe).absolute()),
        # %x job name, %A and %a array job and task, %j job: a percent sign in the path itself is doubled.
        "log": str(logs).replace("%", "%%") + ("/%x-%A_%a.log" if array else "/%x-%j.log"),
        "options": options,
        "setup": recipe.cluster.setup,
        "python": shlex.quote(recipe.cluster.python or sys.executable),
        # torchrun handles TERM and passes it on to its processes.
        "stop_signal": "TERM" if template == "train" or facts.get("processes", 1) > 1 else "USR1",
        "processes": 1,
        **facts,
    }
    return environment.get_template(f"{template}.sbatch.j2").render(context)


def _resources(recipe: Recipe, job: JobConfig) -> JobConfig:
    """The resources of a job: its own keys, else those of [cluster]."""
    own = {name: getattr(job, name) for name in JobConfig.model_fields}
    common = {name: getattr(recipe.cluster, name) for name in JobConfig.model_fields}
    return JobConfig(**{name: common[name] if value is None else value for name, value in own.items()})


def resolved_file(recipe: Recipe) -> Path:
    """File of the jobs' recipe, named by its content: a later submission does not change jobs in the queue."""
    digest = hashlib.sha256(resolved_toml(recipe).encode()).hexdigest()
    return recipe.paths.slurm / f"recipe-{digest[:12]}.toml"


def _processes(recipe: Recipe, job: JobConfig) -> int:
    resources = _resources(recipe, job)
    return resources.processes or resources.gpus or 1


def task_of(shard: int, num_tasks: int, workers: int) -> int:
    """The array task that writes a shard; shards go round the workers of all tasks."""
    return shard % (num_tasks * workers) // workers


def _left(recipe: Recipe) -> list[tuple[int, list[int]]] | None:
    """For each cache of the run the number of shards and the missing ones; None where the rows are not prepared."""
    left = []
    for path in recipe.paths.sides.values():
        prepared = read_json(CachePaths(path).corpus / META, "run `logit-cache prepare` again")
        if prepared is None:
            return None
        if CachePaths(path).manifest.exists():
            cache = LogitCache(path, partial=True)
            total = cache.manifest.num_shards
            missing = [shard for shard in range(total) if shard not in cache.records]
        else:
            rows = int(prepared["rows"])
            total = -(-rows // shard_rows_of(recipe, path, rows))
            missing = list(range(total))
        left.append((total, missing))
    return left


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5", as sbatch --array takes it."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)


def submit_jobs(recipe: Recipe, jobs: list[Job], report: Callable[[Job, int], None]) -> None:
    """Submit jobs to Slurm; `report(job, id)` is called for each.

    Raises RecipeError without sbatch, if jobs of the same work are still queued or running, and if Slurm refuses a job,
    in which case those already submitted are cancelled.
    """
    if shutil.which("sbatch") is None:
        raise RecipeError("sbatch not found: use --dry-run to see the jobs, or submit on a machine of the cluster")
    live, works = live_jobs(recipe), {_work_of(job.stage, job.name) for job in jobs}
    duplicates = [str(job["id"]) for job in live if _work_of(job["stage"], job["name"]) in works]
    if duplicates:
        raise RecipeError(
            f"jobs of the same work are still queued or running: wait, or run `scancel {' '.join(duplicates)}`"
        )
    recipe.paths.slurm_logs.mkdir(parents=True, exist_ok=True)
    write_bytes(resolved_file(recipe), resolved_toml(recipe).encode())
    scripts = {job.name: recipe.paths.slurm / f"{job.name}.sbatch" for job in jobs}
    for job in jobs:
        write_bytes(scripts[job.name], job.script.encode())
    records = [job for job in submitted_jobs(recipe) if _work_of(job["stage"], job["name"]) not in works]
    ids = {str(job["name"]): int(job["id"]) for job in live}
    new_ids: list[int] = []
    for job in jobs:
        conditions = [
            f"{kind}:{ids[name]}"
            for kind, names in (("afterok", job.after), ("afterany", job.in_turn))
            for name in names
        ]
        command = ["sbatch", "--parsable"]
        if conditions:
            # Without kill-on-invalid-dep a job whose condition can no longer hold stays in the queue for ever.
            command += [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"]
        done = subprocess.run([*command, str(scripts[job.name])], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            if new_ids:
                subprocess.run(["scancel", *map(str, new_ids)], check=False)
            raise RecipeError(f"{scripts[job.name]}: sbatch refuses it: {done.stderr.strip()}")
        ids[job.name] = int(done.stdout.split(";")[0])
        new_ids.append(ids[job.name])
        records.append({"name": job.name, "stage": job.stage, "id": ids[job.name], **job.facts})
        write_json(recipe.paths.slurm_jobs, records)
        report(job, ids[job.name])


def _work_of(stage: str, name: str) -> str:
    """The cache, or the name of a student's job: no two jobs may do the same work at the same time."""
    return name if stage == "train" else "cache"
