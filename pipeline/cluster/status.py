"""Progress of a run: its shards from the commit records, its jobs from Slurm."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from ..base.places import Place, modified_in
from ..recipe.paths import CachePaths, record_name
from ..recipe.schema import Recipe
from ..store.reader import LogitCache
from .jobs import task_of
from .slurm import TaskState, submitted_jobs, task_states

_RATE_SECONDS = 3600.0
"""Window of commits over which speed is measured."""


def status(recipe: Recipe) -> dict[str, Any]:
    """Shards by state, speed and time left of each cache ("cache", "heldout"; None before it exists), and the jobs."""
    jobs, states = submitted_jobs(recipe), task_states(recipe)
    sides = {name: _side_status(path, jobs, states) for name, path in recipe.paths.sides.items()}
    described = []
    for job in jobs:
        tasks = sorted((s for s in states if s.job == job["id"]), key=lambda s: -1 if s.task is None else s.task)
        counts = Counter(state.state for state in tasks)
        failed = [
            {"task": None if s.task is None else s.task + job.get("offset", 0), "state": s.state, "reason": s.reason}
            for s in tasks
            if not s.live and s.state != "COMPLETED"
        ]
        described.append({"name": job["name"], "id": job["id"], "states": counts, "failed": failed})
    return {**sides, "jobs": described}


def _side_status(path: Place, jobs: list[dict[str, Any]], states: list[TaskState]) -> dict[str, Any] | None:
    if not CachePaths(path).manifest.exists():
        return None
    cache = LogitCache(path, partial=True)
    arrays = [job for job in jobs if job["stage"] == "cache"]
    live = {(state.job, state.task): state.state for state in states if state.live}
    counts = {"done": len(cache.records), "running": 0, "waiting": 0, "failed": 0, "unsubmitted": 0}
    busy_workers: set[int] = set()
    for shard in range(cache.manifest.num_shards):
        if shard in cache.records:
            continue
        kind = "unsubmitted"
        for job in arrays:
            task = task_of(shard, job["num_tasks"], job["workers"]) - job["offset"]
            if task in job["tasks"]:
                state = live.get((job["id"], task))
                kind = "failed" if state is None else "waiting" if state == "PENDING" else "running"
        if kind == "running":
            # A worker writes one shard at a time, its first missing one.
            worker = shard % (arrays[0]["num_tasks"] * arrays[0]["workers"])
            kind = "waiting" if worker in busy_workers else "running"
            busy_workers.add(worker)
        counts[kind] += 1
    rate = _rate(path, cache)
    positions_left = (cache.manifest.rows - len(cache)) * cache.positions / max(len(cache), 1)
    return {
        "shards": cache.manifest.num_shards,
        **counts,
        "positions": cache.positions,
        "positions_per_second": rate,
        "seconds_left": positions_left / rate if rate else None,
    }


def _rate(path: Place, cache: LogitCache) -> float | None:
    """Positions per second over the commits of the last hour; None with fewer than two."""
    times = modified_in(CachePaths(path).shards)
    committed = {shard: times[record_name(shard)] for shard in cache.records if record_name(shard) in times}
    newest = max(committed.values(), default=0.0)
    recent = {shard: at for shard, at in committed.items() if at > newest - _RATE_SECONDS}
    if time.time() - newest > _RATE_SECONDS or len(recent) < 2:
        return None
    first = min(recent, key=lambda shard: recent[shard])
    positions = sum(int(cache.records[shard]["positions"]) for shard in recent if shard != first)
    seconds = newest - recent[first]
    return positions / seconds if seconds > 0 else None
