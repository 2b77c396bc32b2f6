"""Several processes, under torchrun and `accelerate launch`: the same cache, the same student.

The launchers themselves start what shows that their processes are understood; the others are forked, each with what
torchrun tells a process, by a server that has imported everything.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from logit_cache import DistillationTrainer, LogitCache
from logit_cache.distill.metrics import read_metrics
from logit_cache.stages.app import main
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from tests.conftest import REPOSITORY, files_of
from tests.helpers import update_worker
from tests.helpers.fault_client import Server
from tests.helpers.tiny import WORDS, make_recipe

pytestmark = pytest.mark.slow

STEPS = 6
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--main_process_port=0", "--num_machines=1", "--num_processes")


def launch(launcher: tuple[str, ...], count: int, *command: str) -> str:
    """Run a command in several processes of a launcher; returns what they print."""
    options = [*launcher[1:-1], f"{launcher[-1]}={count}", "-m", "logit_cache", *command]
    done = subprocess.run(
        [sys.executable, "-m", launcher[0], *options],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Cached and trained by one process: ten shards, six steps of six rows."""
    folder = tmp_path_factory.mktemp("processes")
    file = str(
        make_recipe(
            folder,
            train__batch_rows=3,
            train__accumulate=2,
            train__steps=STEPS,
            train__save_steps=2,
            train__eval_steps=4,
        )
    )
    for command in ("prepare", "cache", "train"):
        assert main([command, file]) == 0
    return file


@pytest.fixture(scope="module")
def server(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "one", Path(recipe).parent / "teacher")
    yield running
    running.close()


def fork(server: Server, count: int, *command: str, **options: str) -> str:
    """Run a command in several processes that are there at once; returns what they print."""
    ended = server.run(*command, processes=count, **options)
    assert ended.code == 0, ended.output
    return ended.output


def run_dir(recipe: str) -> Path:
    return Path(recipe).parent / "run"


def copy(recipe: str, folder: Path, *parts: str) -> str:
    """The --set that sends the run to another directory, with some of its parts already there."""
    for part in parts:
        source = run_dir(recipe) / part
        shutil.copytree(source, folder / part) if source.is_dir() else shutil.copy(source, folder / part)
    return f"run_dir={folder}"


# --- stage one ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("launcher", "count"), [(TORCHRUN, 3), (ACCELERATE, 2)], ids=["torchrun", "accelerate"])
def test_any_number_of_processes_writes_the_same_cache(
    recipe: str, tmp_path: Path, launcher: tuple[str, ...], count: int
) -> None:
    other = copy(recipe, tmp_path / "run", "cache/corpus", "heldout/corpus")
    shown = launch(launcher, count, "cache", recipe, "--set", other)
    for side in ("cache", "heldout"):
        assert files_of(tmp_path / "run" / side) == files_of(run_dir(recipe) / side)
    start = "students/student/start"
    assert files_of(tmp_path / "run" / start) == files_of(run_dir(recipe) / start)
    assert shown.count("teacher loss") == 1, "the first process alone speaks"


def test_one_of_several_processes_prepares(recipe: str, server: Server, tmp_path: Path) -> None:
    shown = fork(server, 2, "prepare", recipe, "--set", f"run_dir={tmp_path / 'run'}")
    for side in ("cache", "heldout"):
        assert files_of(tmp_path / "run" / side / "corpus") == files_of(run_dir(recipe) / side / "corpus")
    assert shown.count("train rows") == 1 and "waiting" not in shown


# --- stage two ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def updated(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of six rows by one process."""
    folder = tmp_path_factory.mktemp("updated")
    update_worker.main([str(run_dir(recipe) / "cache"), str(folder), "6", "1", "ddp"])
    return folder


@pytest.mark.parametrize(
    ("count", "rows", "accumulate", "parallel"), [(2, 3, 1, "ddp"), (3, 1, 2, "ddp"), (2, 1, 3, "fsdp")]
)
def test_any_number_of_processes_makes_the_same_update(
    recipe: str, server: Server, updated: Path, tmp_path: Path, count: int, rows: int, accumulate: int, parallel: str
) -> None:
    """Rows hold different numbers of positions, so averaging over processes would show; sums of float32 in another order
    differ by a few 1e-8 on gradients below 1."""
    arguments = (str(run_dir(recipe) / "cache"), str(tmp_path / "out"), str(rows), str(accumulate), parallel)
    fork(server, count, *arguments, module="tests.helpers.update_worker")
    for tied in (True, False):
        one, other = (load_file(f / f"tied-{tied}.safetensors") for f in (updated, tmp_path / "out"))
        torch.manual_seed(1)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        start = LlamaForCausalLM(LlamaConfig(vocab_size=300, tie_word_embeddings=tied, **shape)).state_dict()
        assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-2, "nothing was learned"
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6


def test_positions_differ_between_rows(recipe: str) -> None:
    cache = LogitCache(run_dir(recipe) / "cache")
    assert len({int(cache[row]["targets"].mask.sum()) for row in range(len(cache))}) > 2


def same_student(one: Path, other: Path) -> None:
    """Weights after six AdamW steps, and every logged number, as one process has them."""
    weights, expected = (load_file(folder / "final/model.safetensors") for folder in (one, other))
    # AdamW divides by the root of the squared gradient: rounding moves a weight by a small part of the step, 5e-4.
    assert max(float((weights[name] - expected[name]).abs().max()) for name in expected) < 1e-5
    lines, before = read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, reference in zip(lines, before, strict=True):
        assert line == pytest.approx(reference, rel=1e-4)
    held, before = (read_metrics(folder / "evaluations.jsonl") for folder in (one, other))
    assert [line["step"] for line in held] == [4, STEPS]
    for line, reference in zip(held, before, strict=True):
        assert line == pytest.approx(reference, rel=1e-4)
    assert files_of(one)["run.json"] == files_of(other)["run.json"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_student_by_two_processes_continued_by_one(
    recipe: str, server: Server, tmp_path: Path, parallel: str
) -> None:
    run = copy(recipe, tmp_path / "run", "cache", "heldout", "students/student/start")
    options = ("train", recipe, "--set", run, "--set", f"train.parallel={parallel}")
    reference, student = run_dir(recipe) / "students/student", tmp_path / "run/students/student"
    if parallel == "fsdp":
        settings = json.loads((reference / "run.json").read_text())
        settings["config"]["parallel"] = parallel
        reference = shutil.copytree(reference, tmp_path / "reference")
        (reference / "run.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    shown = launch(TORCHRUN, 2, *options) if parallel == "ddp" else fork(server, 2, *options)
    assert shown.count("done") == 1, "the first process alone speaks"
    same_student(student, reference)
    shutil.rmtree(student / "final")
    shutil.rmtree(student / f"checkpoints/checkpoint-{STEPS}")
    if parallel == "fsdp":
        shown = fork(server, 1, *options)
        assert f"checkpoint-{STEPS - 2}" in shown
    else:
        assert main(list(options)) == 0
    same_student(student, reference)


def test_a_student_by_one_process_continued_by_two(recipe: str, server: Server, tmp_path: Path) -> None:
    run = copy(recipe, tmp_path / "run", "cache", "heldout", "students")
    student = tmp_path / "run/students/student"
    shutil.rmtree(student / "final")
    shutil.rmtree(student / f"checkpoints/checkpoint-{STEPS}")
    assert f"checkpoint-{STEPS - 2}" in fork(server, 2, "train", recipe, "--set", run)
    same_student(student, run_dir(recipe) / "students/student")


@pytest.fixture(scope="module")
def matched(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A narrower student that learns a masked teacher's hidden states, by a projection, and attention, and its targets last."""
    small = {"model_type": "bert", "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "intermediate_size": 20, "max_position_embeddings": 64, "pad_token_id": 0}
    small |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # each process draws its own
    inner = {"architecture": small, "hidden_weight": 1.0, "hidden_layers": [[0, 0], [2, 3]]}
    inner |= {"attention_weight": 0.5, "attention_layers": [[0, 1], [1, 2]]}
    file = make_recipe(
        tmp_path_factory.mktemp("matched"),
        corpus__objective="masked",
        cache__signals=["hidden.0", "hidden.3", "attention.1", "qk.2"],
        train__batch_rows=3,
        train__accumulate=2,
        train__steps=STEPS,
        students={"student": {**inner, "kd_weight": 0.0, "ce_weight": 0.0}, "both": inner},
    )
    for command in ("prepare", "cache", "train"):
        assert main([command, str(file)]) == 0
    return str(file)


@pytest.mark.parametrize("name", ["student", "both"])
def test_matched_layers_by_two_processes(matched: str, server: Server, tmp_path: Path, name: str) -> None:
    """Means over pairs and positions of a step, of which each process sees its own number."""
    run = copy(matched, tmp_path / "run", "cache")
    fork(server, 2, "train", matched, "--student", name, "--set", run)
    reference, student = run_dir(matched) / "students" / name, tmp_path / "run/students" / name
    weights, expected = (load_file(folder / "final/model.safetensors") for folder in (student, reference))
    assert max(float((weights[key] - expected[key]).abs().max()) for key in expected) < 1e-5
    for line, before in zip(*(read_metrics(f / "metrics.jsonl") for f in (student, reference)), strict=True):
        assert line["hidden"] > 0 and line["attention"] > 0
        assert line == pytest.approx(before, rel=1e-4)


def test_what_fsdp_would_shard_twice_is_refused(
    matched: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias of a BERT's output layer has two names."""
    monkeypatch.setattr("logit_cache.base.processes.launched", lambda: True)
    run = copy(matched, tmp_path / "run", "cache")
    assert main(["train", matched, "--student", "student", "--set", run, "--set", "train.parallel=fsdp"]) == 2
    assert "cls.predictions.decoder.bias): use 'ddp'" in capsys.readouterr().err


def test_a_step_that_cannot_be_shared_is_refused(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(recipe, tmp_path / "run", "cache", "heldout", "students/student/start")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", recipe, "--set", run]) == 2
    assert "6 rows (batch_rows x accumulate) cannot be shared evenly by 4" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert main(["train", recipe, "--set", run, "--set", "train.parallel=fsdp"]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run/students/student/run.json").exists()


def test_several_gpus_are_left_to_several_processes(recipe: str, tmp_path: Path) -> None:
    """torch's DataParallel would cut our batches to pieces."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2)
    args._n_gpu = 4
    cache = LogitCache(run_dir(recipe) / "cache")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    trainer = DistillationTrainer(LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape)), args, cache)
    assert trainer.args.n_gpu == 1
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[0] == 2
