"""A run as Slurm jobs: what is submitted, and how far it is.

    prepare ──▶ cache, an array whose tasks share the shards ──▶ finalise ──▶ train, one job per student

Everything lies in <run_dir>/slurm: the recipe as it was when it was submitted, which is what the jobs run; the batch
scripts; the ids of the jobs; their logs. What is done is read from the cache's commit records alone, so a run that is
submitted again asks only for tasks that have something left to write.
"""

from __future__ import annotations

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
from ..base.places import Place
from ..recipe.cluster import JobConfig
from ..recipe.loading import resolved_toml
from ..recipe.schema import Recipe
from ..store.reader import LogitCache
from .slurm import _live_jobs, _submitted, array_limit

Side = tuple[str, Place]


@dataclass(frozen=True)
class Job:
    """One batch script and the jobs that must have succeeded, or for `in_turn` ended, before it starts."""

    name: str
    stage: str
    script: str
    after: tuple[str, ...] = ()
    in_turn: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """What `status` must know of it: the student, or the tasks of an array."""

    @property
    def work(self) -> str:
        """What it works at, which no two jobs may do at the same time: the cache, or one student."""
        return _work(self.stage, self.name)


def plan_jobs(
    recipe: Recipe, templates: Path, *, only: str | None = None, students: list[str] | None = None
) -> list[Job]:
    """The jobs that a run still needs, in the order in which they are submitted.

    `only` is "cache" (up to finalise) or "train". Raises IncompleteError for `only="train"` where the cache is neither
    finished nor being finished by jobs in the queue.
    """
    render = _Renderer(recipe, templates)
    jobs: list[Job] = []
    after: tuple[str, ...] = ("finalise",)
    if only != "train":
        jobs += _cache_jobs(recipe, render)
    elif not any(job["name"] == "finalise" for job in _live_jobs(recipe)):
        after = ()
        for _, path in _sides(recipe):
            LogitCache(path)  # complete, or an error that says what to do
    if only != "cache":
        for name in students or recipe.students:
            if recipe.paths.student(name).finished:
                continue
            train = recipe.cluster.train
            facts: dict[str, Any] = {"student": name, "nodes": train.nodes, "processes": _processes(recipe, train)}
            script = render("train", f"train-{name}", train, **facts)
            jobs.append(Job(f"train-{name}", "train", script, after, facts=facts))
    return jobs


def _cache_jobs(recipe: Recipe, render: _Renderer) -> list[Job]:
    cluster, jobs = recipe.cluster, []
    parallel = recipe.teacher.parallel
    processes = 1 if parallel == "layers" else _processes(recipe, JobConfig())
    workers = 1 if parallel == "tensor" else processes
    left = _left(recipe)
    if left is None:
        jobs.append(Job("prepare", "prepare", render("prepare", "prepare", JobConfig(gpus=0))))
        num_tasks = cluster.tasks
        pending = list(range(num_tasks))
    else:
        shards = max(total for total, _ in left)
        num_tasks = max(1, min(cluster.tasks, -(-shards // workers)))
        pending = sorted({task_of(shard, num_tasks, workers) for _, missing in left for shard in missing})
    prepare = tuple(job.name for job in jobs)
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
        # Arrays that are cut apart run in turn, so that max_parallel holds over all of them.
        in_turn = tuple(arrays[-1:]) if at_once else ()
        jobs.append(Job(name, "cache", script, prepare, in_turn, facts))
        arrays.append(name)
    # One process exports; a teacher that is cut over processes needs them all.
    script = render("finalise", "finalise", cluster.finalise, processes=processes if parallel == "tensor" else 1)
    jobs.append(Job("finalise", "finalise", script, tuple(arrays) or prepare))
    return jobs


class _Renderer:
    """Batch scripts from the templates."""

    def __init__(self, recipe: Recipe, templates: Path) -> None:
        self._recipe = recipe
        self._environment = Environment(
            loader=FileSystemLoader(templates),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self._environment.filters["quote"] = shlex.quote

    def __call__(self, template: str, name: str, job: JobConfig, array: str | None = None, **facts: Any) -> str:
        recipe, cluster = self._recipe, self._recipe.cluster
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
            # %x job name, %A and %a array job and task, %j job: a path of the user's must not read as one of them.
            "log": str(logs).replace("%", "%%") + ("/%x-%A_%a.log" if array else "/%x-%j.log"),
            "options": options,
            "setup": cluster.setup,
            "python": shlex.quote(cluster.python or sys.executable),
            # torchrun knows TERM, and passes it on to its processes.
            "stop_signal": "TERM" if template == "train" or facts.get("processes", 1) > 1 else "USR1",
            "processes": 1,
            **facts,
        }
        return self._environment.get_template(f"{template}.sbatch.j2").render(context)


def _resources(recipe: Recipe, job: JobConfig) -> JobConfig:
    """What a job asks for: its own keys, else those of [cluster]."""
    own = {name: getattr(job, name) for name in JobConfig.model_fields}
    common = {name: getattr(recipe.cluster, name) for name in JobConfig.model_fields}
    return JobConfig(**{name: common[name] if value is None else value for name, value in own.items()})


def resolved_file(recipe: Recipe) -> Path:
    """The recipe that the jobs run, named by its content: one submitted later leaves those in the queue alone."""
    digest = hashlib.sha256(resolved_toml(recipe).encode()).hexdigest()
    return recipe.paths.slurm / f"recipe-{digest[:12]}.toml"


def _processes(recipe: Recipe, job: JobConfig) -> int:
    resources = _resources(recipe, job)
    return resources.processes or resources.gpus or 1


def task_of(shard: int, num_tasks: int, workers: int) -> int:
    """The array task that writes a shard, where every task has so many workers and shards are dealt out in turn."""
    return shard % (num_tasks * workers) // workers


def _sides(recipe: Recipe) -> list[Side]:
    return [("cache", recipe.paths.cache), ("heldout", recipe.paths.heldout)]


def _left(recipe: Recipe) -> list[tuple[int, list[int]]] | None:
    """Per cache of the run: number of shards, and those not committed. None if the rows are not prepared yet."""
    found = []
    for _, path in _sides(recipe):
        prepared = read_json(path / "corpus" / "prepared.json", "run `logit-cache prepare` again")
        if prepared is None:
            return None
        if (path / "manifest.json").exists():
            cache = LogitCache(path, partial=True)
            total = cache.manifest.num_shards
            missing = [shard for shard in range(total) if shard not in cache.records]
        else:
            total = -(-int(prepared["rows"]) // recipe.cache.shard_rows)
            missing = list(range(total))
        found.append((total, missing))
    return found


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5", as sbatch --array takes it."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)


def write_scripts(recipe: Recipe, jobs: list[Job]) -> dict[str, Path]:
    """Leave recipe and batch scripts in <run_dir>/slurm, where they can be read before and after they run."""
    folder = recipe.paths.slurm
    recipe.paths.slurm_logs.mkdir(parents=True, exist_ok=True)
    write_bytes(resolved_file(recipe), resolved_toml(recipe).encode())
    scripts = {job.name: folder / f"{job.name}.sbatch" for job in jobs}
    for job in jobs:
        write_bytes(scripts[job.name], job.script.encode())
    return scripts


def submit_jobs(recipe: Recipe, jobs: list[Job], told: Callable[[Job, int], None]) -> None:
    """Hand the jobs to Slurm; `told` hears of every id.

    Raises RecipeError if jobs that do the same are still queued or running, or if Slurm refuses one: then none is left.
    """
    if shutil.which("sbatch") is None:
        raise RecipeError("sbatch is not here: submit on a machine of the cluster, or look at the jobs with --dry-run")
    live, works = _live_jobs(recipe), {job.work for job in jobs}
    twice = [str(job["id"]) for job in live if _work(job["stage"], job["name"]) in works]
    if twice:
        raise RecipeError(f"jobs that do this are still queued or running: wait, or `scancel {' '.join(twice)}`")
    scripts = write_scripts(recipe, jobs)
    others = [job for job in _submitted(recipe) if _work(job["stage"], job["name"]) not in works]
    ids = {str(job["name"]): int(job["id"]) for job in live}
    mine: list[int] = []
    for job in jobs:
        conditions = [
            f"{kind}:{ids[name]}"
            for kind, names in (("afterok", job.after), ("afterany", job.in_turn))
            for name in names
        ]
        command = ["sbatch", "--parsable"]
        if conditions:
            # A job whose condition can no longer hold would stay in the queue for ever.
            command += [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"]
        done = subprocess.run([*command, str(scripts[job.name])], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            if mine:
                subprocess.run(["scancel", *map(str, mine)], check=False)
            raise RecipeError(f"{scripts[job.name]}: sbatch refuses it: {done.stderr.strip()}")
        ids[job.name] = int(done.stdout.split(";")[0])
        mine.append(ids[job.name])
        others.append({"name": job.name, "stage": job.stage, "id": ids[job.name], **job.facts})
        write_json(recipe.paths.slurm_jobs, others)
        told(job, ids[job.name])


def _work(stage: str, name: str) -> str:
    return name if stage == "train" else "cache"
