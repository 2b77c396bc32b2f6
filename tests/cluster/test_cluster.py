"""Slurm jobs: what is rendered, and on a real Slurm, that nothing is lost or done twice."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from logit_cache.base.errors import IncompleteError, RecipeError
from logit_cache.cluster.jobs import Job, plan_jobs, submit_jobs, task_of
from logit_cache.cluster.status import status
from logit_cache.corpus.sources import find_sources
from logit_cache.recipe.loading import load_recipe
from logit_cache.recipe.schema import Recipe
from logit_cache.stages.app import main
from logit_cache.stages.submit import TEMPLATES
from safetensors.torch import load_file

from tests.conftest import files_of
from tests.helpers import slurm as slurm_machine
from tests.helpers.slurm import ARRAY_LIMIT, Slurm, wait_until
from tests.helpers.tiny import WORDS, make_recipe


@dataclass(frozen=True)
class Tiny:
    """A run of the random teacher, by its recipe file and overrides."""

    file: Path
    overrides: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.file, list(self.overrides))

    @property
    def dir(self) -> Path:
        return self.recipe.run_dir

    def __call__(self, command: str, *extra: str) -> int:
        options = [part for override in self.overrides for part in ("--set", override)]
        return main([command, str(self.file), *extra, *options])

    def with_(self, *overrides: str) -> Tiny:
        return Tiny(self.file, (*self.overrides, *overrides))

    def prepared_copy(self, folder: Path) -> Tiny:
        """The same rows in another run_dir, nothing cached."""
        for side in ("cache", "heldout"):
            shutil.copytree(self.dir / side / "corpus", folder / side / "corpus")
        return self.with_(f"run_dir={folder}")

    def jobs(self, **options: Any) -> list[Job]:
        return plan_jobs(self.recipe, TEMPLATES, **options)

    def status(self) -> dict[str, Any]:
        return status(self.recipe)

    def records(self) -> dict[str, int]:
        """When every committed shard was committed."""
        return {p.name: p.stat().st_mtime_ns for p in (self.dir / "cache/shards").glob("*.json")}


def same_caches(one: Tiny, other: Tiny) -> bool:
    return all(files_of(one.dir / side) == files_of(other.dir / side) for side in ("cache", "heldout"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Ten shards and two held-out ones, cached by one process."""
    folder = tmp_path_factory.mktemp("tiny run")  # with a space, as users' directories have
    run = Tiny(make_recipe(folder))
    assert run("prepare") == 0
    assert run("cache") == 0
    return run


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Eight shards of 500 rows, one row a pass: seconds each, so that a signal finds one half written and others to do."""
    folder = tmp_path_factory.mktemp("slow")
    draw = random.Random(1)
    make_recipe(folder)
    words = (f"w{draw.randrange(1, WORDS)}" for _ in range(70_000))
    (folder / "text.txt").write_text("\n\n".join(" ".join(next(words) for _ in range(69)) for _ in range(1000)))
    changes = ("corpus.max_rows=4000", "corpus.max_heldout_rows=4", "corpus.heldout_fraction=0.05")
    run = Tiny(folder / "recipe.toml", (*changes, "cache.shard_rows=500", "teacher.batch_rows=1"))
    assert run("prepare") == 0
    assert run("cache") == 0
    return run


# --- what is rendered ---------------------------------------------------------------------------------------------------


def test_the_batch_scripts_are_valid_shell(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny.with_(f"run_dir={tmp_path}/it is new", 'cluster.setup=["module load cuda"]', "cluster.gpus=4")
    run = run.with_("cluster.train.nodes=2", "cluster.cpus=8", 'cluster.time="2-00:00:00"', "cluster.partition=gpu")
    jobs = run.jobs()
    assert [job.name for job in jobs] == ["prepare", "cache", "finalise", "train-student"]
    for job in jobs:
        assert subprocess.run(["bash", "-n"], input=job.script, text=True, check=False).returncode == 0
        head = job.script.split("\nmodule load cuda\n")[0].splitlines()
        assert head[0] == "#!/bin/bash"
        assert all(line.startswith("#") for line in head), "an sbatch line after a command is not read"
        for option in ("--requeue", "--signal=B:USR1@120", "--partition=gpu", "--time=2-00:00:00", "--cpus-per-task=8"):
            assert f"#SBATCH {option}" in head
        assert ("#SBATCH --gres=gpu:4" in head) == (job.name != "prepare")
    train = jobs[-1].script
    assert "#SBATCH --nodes=2" in train
    assert "srun" in train
    assert "--nnodes=2 --nproc-per-node=4" in train


def test_tasks_share_a_large_text(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are portions of it, and one job that makes rows of what they packed."""
    run = tiny.with_(f"run_dir={tmp_path}/run", "cluster.tasks=4")
    size = sum(Path(part.name).stat().st_size for part in find_sources(load_recipe(tiny.file).corpus).parts)
    monkeypatch.setattr("logit_cache.corpus.portions.PORTION_BYTES", size // 3)
    jobs = run.jobs(only="cache")
    assert [(job.name, job.after) for job in jobs[:3]] == [
        ("pack", ()),
        ("prepare", ("pack",)),
        ("cache", ("prepare",)),
    ]
    assert "#SBATCH --array=0-" in jobs[0].script and "--gres" not in jobs[0].script
    assert "--task $SLURM_ARRAY_TASK_ID --num-tasks" in jobs[0].script and "--task" not in jobs[1].script
    assert subprocess.run(["bash", "-n"], input=jobs[0].script, text=True, check=False).returncode == 0


def test_sbatch_lines_may_be_replaced_by_job(tiny: Tiny) -> None:
    run = tiny.with_(
        "cluster.gpus=1", "cluster.train.gpus=8", 'cluster.finalise.time="30"', 'cluster.sbatch=["--qos=a"]'
    )
    by_name = {job.name: job.script for job in run.with_("run_dir=elsewhere").jobs()}
    assert "--gres=gpu:1" in by_name["cache"] and "--gres=gpu:8" in by_name["train-student"]
    assert "--time" not in by_name["cache"] and "--time=30" in by_name["finalise"]
    assert all("#SBATCH --qos=a" in script for script in by_name.values())


def test_the_gpus_of_a_task_are_processes(tiny: Tiny, tmp_path: Path) -> None:
    """Each with a teacher and shards of its own; or all with one teacher, cut over them; or one process with all."""
    run = tiny.prepared_copy(tmp_path / "run").with_("cluster.tasks=4", "cluster.gpus=4")
    array, finalise = (job.script for job in run.jobs(only="cache"))
    assert "--array=0-2\n" in array, "ten shards keep three tasks of four processes busy"
    assert "--nproc-per-node=4 -m logit_cache cache" in array and "kill -TERM" in array
    assert "nproc-per-node" not in finalise
    array, finalise = (job.script for job in run.with_("teacher.parallel=tensor").jobs(only="cache"))
    assert "--array=0-3\n" in array
    assert (
        "--nproc-per-node=4 -m logit_cache cache" in array and "--nproc-per-node=4 -m logit_cache finalise" in finalise
    )
    for job in run.with_("teacher.parallel=layers").jobs(only="cache"):
        assert "nproc-per-node" not in job.script and "kill -USR1" in job.script


@pytest.mark.parametrize(("tasks", "expected"), [(4, "0-3"), (64, "0-9"), (1, "0")])
def test_no_task_without_a_shard(tiny: Tiny, tmp_path: Path, tasks: int, expected: str) -> None:
    """Ten shards: where the rows are prepared, an array is no longer than they can feed."""
    run = tiny.prepared_copy(tmp_path / "run").with_(f"cluster.tasks={tasks}", "cluster.max_parallel=2")
    jobs = run.jobs()
    assert [job.name for job in jobs] == ["cache", "finalise", "train-student"]
    assert f"#SBATCH --array={expected}%2\n" in jobs[0].script


def test_only_what_is_missing_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny.dir, folder)
    run = tiny.with_(f"run_dir={folder}", "cluster.tasks=4")
    assert [job.name for job in run.jobs()] == ["finalise", "train-student"]
    for shard in (2, 6, 9):  # of tasks 2, 2 and 1
        (folder / f"cache/shards/{shard:05}.json").unlink()
    cache = run.jobs()[0]
    assert "#SBATCH --array=1-2\n" in cache.script
    (folder / "students/student/final").mkdir(parents=True)
    (folder / "students/student/final/config.json").write_text("{}")
    assert [job.name for job in run.jobs()] == ["cache", "finalise"]
    with pytest.raises(IncompleteError):
        run.jobs(only="train")


def test_arrays_are_cut_at_the_clusters_limit(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logit_cache.cluster.jobs.array_limit", lambda: 4)
    run = tiny.prepared_copy(tmp_path / "run").with_("cluster.tasks=10", "cluster.max_parallel=3")
    arrays = [job for job in run.jobs() if job.stage == "cache"]
    assert [job.name for job in arrays] == ["cache-0", "cache-4", "cache-8"]
    assert [job.in_turn for job in arrays] == [(), ("cache-0",), ("cache-4",)]
    assert "--array=0-1%3" in arrays[2].script
    assert "--task $((8 + SLURM_ARRAY_TASK_ID)) --num-tasks 10" in arrays[2].script
    assert run.jobs()[3].after == ("cache-0", "cache-4", "cache-8")


def test_every_shard_has_the_task_that_writes_it() -> None:
    """As `cache` deals them out: process r of task t of n, w processes each, writes shards t w + r, + n w, ..."""
    for num_tasks, processes in ((1, 1), (4, 1), (3, 2)):
        for task in range(num_tasks):
            for rank in range(processes):
                for shard in range(task * processes + rank, 40, num_tasks * processes):
                    assert task_of(shard, num_tasks, processes) == task


def test_a_dry_run_prints_and_leaves_nothing(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.with_(f"run_dir={tmp_path / 'run'}")
    assert run("submit", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.count("#!/bin/bash") == 4
    assert not (tmp_path / "run").exists()


def test_without_slurm_submit_says_so(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tiny("submit") == 2
    assert "--dry-run" in capsys.readouterr().err
    assert tiny("status") == 0
    assert "10 of 10 shards done" in capsys.readouterr().out


def test_status_before_anything(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.with_(f"run_dir={tmp_path / 'run'}")("status") == 0
    assert "cache: not begun" in capsys.readouterr().out


# --- on a real Slurm ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    reason = slurm_machine.missing()
    if reason is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch, Slurm() as running:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield running


def logs(run: Tiny) -> str:
    return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted((run.dir / "slurm/logs").glob("*.log")))


def job_id(run: Tiny, name: str) -> int:
    jobs = json.loads((run.dir / "slurm/jobs.json").read_text())
    return next(int(job["id"]) for job in jobs if job["name"] == name)


@pytest.mark.slow
def test_an_array_of_four_tasks_builds_one_cache(slurm: Slurm, tiny: Tiny, tmp_path: Path) -> None:
    """From text to student: rows, ten shards by four tasks, the check, a student by two processes."""
    source = tmp_path / "recipe.toml"
    shutil.copy(tiny.file, source)
    run = Tiny(source, (f"run_dir={tmp_path / 'a run'}", "cluster.tasks=4", "cluster.train.processes=2"))
    assert run("submit") == 0
    source.write_text("not the recipe that was submitted")
    run = Tiny(tiny.file, run.overrides)
    assert len(run.status()["jobs"]) == 4
    assert run("submit") == 2, "what is still queued must not be submitted a second time"
    assert run("submit", "--only", "train") == 2
    slurm.wait_for_all()
    assert same_caches(run, tiny), logs(run)
    assert (run.dir / "students/student/final/model.safetensors").exists(), logs(run)
    status = run.status()
    assert (status["cache"]["done"], status["cache"]["shards"], status["heldout"]["done"]) == (10, 10, 2)
    assert [job["states"] for job in status["jobs"]] == [{"COMPLETED": n} for n in (1, 4, 1, 1)]
    assert [job.name for job in run.jobs()] == ["finalise"]


@pytest.mark.slow
def test_more_tasks_than_shards_and_than_an_array_may_have(slurm: Slurm, tiny: Tiny, tmp_path: Path) -> None:
    """Not prepared, so nobody knows at submit time that there are but three shards for seven tasks."""
    run = tiny.with_(f"run_dir={tmp_path / 'run'}", "cluster.tasks=7", "corpus.max_rows=12", "train.steps=2")
    one = tiny.with_(f"run_dir={tmp_path / 'one'}", "corpus.max_rows=12")
    assert run("submit", "--only", "cache") == 0
    # Stage two may be submitted while stage one is in the queue, and changes nothing for it.
    assert run.with_("train.steps=3")("submit", "--only", "train") == 0
    names = ["prepare", "cache-0", f"cache-{ARRAY_LIMIT}", "finalise", "train-student"]
    assert [job["name"] for job in run.status()["jobs"]] == names
    assert len(list((run.dir / "slurm").glob("recipe-*.toml"))) == 2
    assert one("prepare") == 0
    assert one("cache") == 0
    slurm.wait_for_all()
    assert same_caches(run, one), logs(run)
    assert "nothing to do for task 6 of 7: there are 3 shards" in logs(run)
    assert "3 shards committed, all whole" in logs(run)
    assert json.loads((run.dir / "students/student/run.json").read_text())["config"]["steps"] == 3


@pytest.mark.slow
def test_killed_mid_shard_and_requeued(slurm: Slurm, slow: Tiny, tmp_path: Path) -> None:
    """Task 0 is requeued by the administrator, task 1 told of its time limit and requeues itself."""
    run = slow.prepared_copy(tmp_path / "run").with_("cluster.tasks=2")
    assert run("submit", "--only", "cache") == 0
    array = job_id(run, "cache")
    signals = {
        0: ["scontrol", "requeue", f"{array}_0"],
        1: ["scancel", "--batch", "--signal=USR1", f"{array}_1"],
    }
    before: dict[str, int] = {}

    def all_signalled() -> bool:
        """Each task right after its own first shard: the two need not keep step with each other."""
        written = run.records()
        for task in [task for task in signals if f"{task:05d}.json" in written]:
            before[f"{task:05d}.json"] = written[f"{task:05d}.json"]
            subprocess.run(signals.pop(task), check=True)
        return not signals

    wait_until(all_signalled, "two shards")
    slurm.wait_for_all()
    written = logs(run)
    assert same_caches(run, slow), written
    after = run.records()
    assert {name: after[name] for name in before} == before, "a committed shard was written again"
    assert f"job {array}_1: stopped with code 75, requeued" in written
    for task in (0, 1):
        assert re.search(rf"[123] of 4 shards of task {task} of 2 found", written), "the signals came too late"
        assert f"job {array}_{task}, start 2" in written


@pytest.mark.slow
def test_cancelled_and_submitted_again(
    slurm: Slurm, slow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = slow.prepared_copy(tmp_path / "run").with_("cluster.tasks=2")
    assert run("submit", "--only", "cache") == 0
    wait_until(lambda: {"00000.json", "00001.json"} <= set(run.records()), "two shards")
    subprocess.run(["scancel", f"{job_id(run, 'cache')}"], check=True)
    # The finalise job can no longer run and must not stay in the queue; a cancelled task must not requeue itself.
    slurm.wait_for_all()
    # A cancelled job leaves the queue before its process has committed the shard that it was writing.
    wait_until(lambda: logs(run).count("stopped by SIGTERM") == 2, "the end of both tasks")
    before = run.records()
    assert len(before) < 8, "cancelled too late to test anything"
    assert "requeued" not in logs(run)
    status = run.status()
    assert status["cache"]["failed"] == 8 - len(before)
    assert [job["failed"][0]["state"] for job in status["jobs"]] == ["CANCELLED", "CANCELLED"]
    capsys.readouterr()
    assert run("status") == 0
    assert "task 0: cancelled" in capsys.readouterr().out
    assert run("submit", "--only", "cache") == 0
    slurm.wait_for_all()
    assert same_caches(run, slow), logs(run)
    after = run.records()
    assert {name: after[name] for name in before} == before, "a committed shard was written again"


@pytest.mark.slow
def test_what_slurm_refuses_leaves_no_job(slurm: Slurm, tiny: Tiny, tmp_path: Path) -> None:
    run = tiny.with_(f"run_dir={tmp_path / 'run'}", "cluster.train.partition=nowhere")
    with pytest.raises(RecipeError, match=r"train-student\.sbatch: sbatch refuses it: .*partition"):
        submit_jobs(run.recipe, run.jobs(), lambda job, number: None)
    slurm.wait_for_all(30)


@pytest.mark.slow
def test_a_student_trained_on_two_nodes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slurmd, one process on each, torchrun's rendezvous between them: the student of one process. Told of its time
    limit, the job goes back into the queue and continues from its checkpoint."""
    reason = slurm_machine.missing()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one, two = (tiny.with_(f"run_dir={tmp_path / name}", "train.steps=60", "train.save_steps=1") for name in ("1", "2"))
    for run in (one, two):
        shutil.copytree(tiny.dir / "cache", run.dir / "cache")
        shutil.copytree(tiny.dir / "heldout", run.dir / "heldout")
        shutil.copytree(tiny.dir / "students/student/start", run.dir / "students/student/start")
    assert one("train") == 0
    with Slurm(nodes=2) as slurm:
        run = two.with_("cluster.train.nodes=2")
        assert run("submit", "--only", "train") == 0
        checkpoints = run.dir / "students/student/checkpoints"
        wait_until(lambda: list(checkpoints.glob("checkpoint-*/trainer_state.json")), f"a checkpoint\n{logs(run)}", 120)
        subprocess.run(["scancel", "--batch", "--signal=USR1", str(job_id(run, "train-student"))], check=True)
        slurm.wait_for_all(240)
    written = logs(run)
    assert "requeued" in written and "start 2, on node" in written and "continuing from" in written, written
    weights, expected = (load_file(r.dir / "students/student/final/model.safetensors") for r in (two, one))
    assert max(float((weights[name] - expected[name]).abs().max()) for name in expected) < 1e-4, written
