"""A student that was begun: which settings may change, who may train it, and how it is measured meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache import LogitCache
from logit_cache.assess.evaluation import evaluate_student
from logit_cache.base.errors import IncompleteError, MismatchError, RecipeError
from logit_cache.base.lock import claimed
from logit_cache.distill.metrics import read_metrics
from logit_cache.distill.stage_two import train_student, train_students
from logit_cache.recipe.loading import load_recipe
from logit_cache.recipe.student import StudentConfig, deciding_settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distill.test_ecosystem import SHAPE, largest_difference
from tests.distill.test_training_settings import BASE
from tests.helpers.synthetic import make_cache
from tests.helpers.tiny import make_recipe

NEUTRAL: dict[str, Any] = {
    "device": "auto",
    "parallel": "fsdp",
    "save_steps": 7,
    "log_steps": 3,
    "eval_steps": 2,
    "loader_workers": 0,
    "local_store": "elsewhere",
    "local_bytes": 0,
    "report_to": [],
    "trust_remote_code": True,
    "seeds": [0],  # the seed itself is recorded beside the settings
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[LogitCache, LogitCache]:
    """Rows to learn from, and held-out ones."""
    folder = tmp_path_factory.mktemp("continuing")
    options = {"vocab_size": SHAPE["vocab_size"], "tail_rank": 2}
    heldout = make_cache(folder / "heldout", rows=7, seed=5, k=20, vocab_size=SHAPE["vocab_size"])
    return make_cache(folder / "cache", **options), heldout


@pytest.fixture(scope="module")
def finished(caches: tuple[LogitCache, LogitCache], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student after four steps, with a checkpoint at the second."""
    folder = tmp_path_factory.mktemp("finished") / "s"
    train_student(StudentConfig(**{**BASE, "save_steps": 2}), "s", caches[0], folder, seed=0)
    return folder


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final/model.safetensors")


# --- what decides a student ---------------------------------------------------------------------------------------------


def test_every_key_decides_or_is_known_not_to() -> None:
    start = StudentConfig(**BASE).model_dump(mode="json")
    for key in StudentConfig.model_fields:
        changed = deciding_settings(
            {**start, key: "something else"} if key not in ("batch_rows", "accumulate") else {**start, key: 9}
        )
        assert (changed == deciding_settings(start)) == (key in NEUTRAL), key
    best = {**start, "keep_best": "kd", "eval_steps": 2}
    assert deciding_settings(best) != deciding_settings({**best, "eval_steps": 4})
    by_epochs = {**start, "epochs": 1.0}
    assert deciding_settings(by_epochs) == deciding_settings({**by_epochs, "steps": 9})


@pytest.mark.parametrize(
    "change",
    [
        *({key: value} for key, value in NEUTRAL.items() if key not in ("parallel", "eval_steps")),
        {"batch_rows": 2, "accumulate": 2},
    ],
)
def test_a_finished_student_stays_finished(
    caches: tuple[LogitCache, LogitCache], finished: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    train_student(StudentConfig(**{**BASE, **change}), "s", caches[0], finished, seed=0)
    assert "train s: done" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [({"batch_rows": 2}, "batch_rows x accumulate"), ({"steps": 5}, "steps"), ({"temperature": 2.0}, "temperature")],
)
def test_what_decides_a_student_bars(
    caches: tuple[LogitCache, LogitCache], finished: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(MismatchError, match=rf"\({named} differ\)"):
        train_student(StudentConfig(**{**BASE, **change}), "s", caches[0], finished, seed=0)


def test_a_student_goes_on_with_smaller_batches(
    caches: tuple[LogitCache, LogitCache], finished: Path, tmp_path: Path
) -> None:
    """As the advice after a lack of memory says."""
    folder = Path(shutil.copytree(finished, tmp_path / "s"))
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints/checkpoint-4")
    change = {"batch_rows": 1, "accumulate": 4, "save_steps": 3, "log_steps": 2}
    train_student(StudentConfig(**{**BASE, **change}), "s", caches[0], folder, seed=0)
    assert largest_difference(final(folder), final(finished)) < 1e-5
    assert json.loads((folder / "run.json").read_text())["config"]["accumulate"] == 4


def test_a_student_of_an_earlier_version_has_the_defaults_of_new_keys(
    caches: tuple[LogitCache, LogitCache], finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "s"))
    run = json.loads((folder / "run.json").read_text())
    for key in ("keep_best", "eval_steps", "token_types"):
        del run["config"][key]
    (folder / "run.json").write_text(json.dumps(run))
    train_student(StudentConfig(**BASE), "s", caches[0], folder, seed=0)


def test_one_process_trains_a_student(caches: tuple[LogitCache, LogitCache], tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with (
        claimed(tmp_path / "s/train.lock", ValueError),
        pytest.raises(IncompleteError, match=r"s: this process .*, trains s: wait for it to end"),
    ):
        train_student(StudentConfig(**BASE), "s", caches[0], tmp_path / "s", seed=0)
    assert not (tmp_path / "s/run.json").exists()


# --- rows ---------------------------------------------------------------------------------------------------------------


def test_a_student_of_a_shared_cache_needs_none_of_its_own(
    caches: tuple[LogitCache, LogitCache], tmp_path: Path
) -> None:
    file = make_recipe(tmp_path, train={**BASE, "steps": 1}, students={})
    shared = str(caches[0].path)
    for name, key in (("mixed", f'caches = {{"{shared}" = 1.0}}'), ("taught", f'teachers = ["{shared}"]')):
        recipe = load_recipe(file, [f"students.{name}={{{key}}}"])
        train_students(recipe)
        assert (tmp_path / "run/students" / name / "final/config.json").exists()
    with pytest.raises(IncompleteError, match="no cache here"):
        train_students(load_recipe(file, ["students.own.mode=cached"]))


# --- evaluation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cached", "ce"])
def test_a_student_is_evaluated_while_it_learns(
    caches: tuple[LogitCache, LogitCache], tmp_path: Path, mode: str
) -> None:
    """On held-out rows, also after the last step; what it learns stays the same, dropout included."""
    rows, heldout = caches
    shape = {"model_type": "llama", **SHAPE, "attention_dropout": 0.4}
    settings = {**BASE, "architecture": shape, "mode": mode, "steps": 5, "tail": "shape"}
    for name, more in (("plain", {}), ("evaluated", {"eval_steps": 2})):
        train_student(StudentConfig(**settings, **more), name, rows, tmp_path / name, seed=0, heldout=heldout)
    assert largest_difference(final(tmp_path / "plain"), final(tmp_path / "evaluated")) == 0
    assert not (tmp_path / "plain/evaluations.jsonl").exists()
    lines = read_metrics(tmp_path / "evaluated/evaluations.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [line["step"] for line in read_metrics(tmp_path / "evaluated/metrics.jsonl")] == [1, 2, 3, 4, 5]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "evaluated/final")
    expected = evaluate_student(model, heldout, batch_rows=3, size=1, title="s")
    assert lines[-1]["kd"] == pytest.approx(expected.kl_to_teacher, rel=1e-4)
    assert lines[-1]["agreement"] == pytest.approx(expected.agreement, rel=1e-6)
    weights = (0.0, 1.0) if mode == "ce" else (1.0, 0.1)
    assert lines[-1]["loss"] == pytest.approx(weights[0] * lines[-1]["kd"] + weights[1] * lines[-1]["ce"], rel=1e-5)


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": ["q_proj", "lm_head"]}])
def test_the_best_student_is_published(
    caches: tuple[LogitCache, LogitCache], tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    rows, heldout = caches
    settings = {**BASE, "learning_rate": 0.5, "scheduler": "constant", "steps": 6, "lora": lora}  # it diverges
    config = StudentConfig(**settings, eval_steps=1, keep_best="kd")
    train_student(config, "s", rows, tmp_path / "s", seed=0, heldout=heldout)
    kd = [line["kd"] for line in read_metrics(tmp_path / "s/evaluations.jsonl")]
    assert len(kd) == 6 and min(kd) < kd[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "s/final")
    best = evaluate_student(model, heldout, batch_rows=8, size=1, title="s").kl_to_teacher
    assert best == pytest.approx(min(kd), rel=1e-4)


def test_evaluations_that_cannot_be(caches: tuple[LogitCache, LogitCache], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"students\.s\.eval_steps: there are no held-out rows"):
        train_student(StudentConfig(**BASE, eval_steps=1), "s", caches[0], tmp_path / "s", seed=0)
    with pytest.raises(ValueError, match="keep_best needs eval_steps"):
        StudentConfig(**BASE, keep_best="kd")
