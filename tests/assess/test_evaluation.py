"""Evaluations: continued where they stopped, made anew of what has changed, and never shown as current when they are not."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from logit_cache import LogitCache
from logit_cache.assess.evaluation import evaluate_student, table
from logit_cache.models.loading import load_model
from logit_cache.models.placement import choose_placement
from logit_cache.stages.app import main

from tests.helpers.tiny import make_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two students, trained and not evaluated."""
    students = {"student": {"mode": "cached"}, "control": {"mode": "ce"}}
    recipe = make_recipe(tmp_path_factory.mktemp("evaluation"), students=students, train__steps=2)
    for stage in ("prepare", "cache", "train"):
        assert main([stage, str(recipe)]) == 0
    return recipe


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Its directory, copied, and the arguments of commands on it."""
    shutil.copytree(trained.parent / "run", tmp_path / "run")
    return tmp_path / "run", [str(trained), "--set", f"run_dir={tmp_path / 'run'}"]


def test_it_continues_where_it_stopped(
    run: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = run
    real = evaluate_student

    def stops(*args: Any, title: str, **kwargs: Any) -> Any:
        if title == "control":
            raise KeyboardInterrupt
        return real(*args, title=title, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("logit_cache.assess.evaluation.evaluate_student", stops)
        assert main(["evaluate", *arguments]) == 130
    first = json.loads((folder / "evaluation.json").read_text())["results"]["student"]
    assert main(["report", *arguments]) == 3
    assert "'control' is not in" in capsys.readouterr().err
    assert main(["evaluate", *arguments]) == 0
    out = capsys.readouterr().out
    assert "evaluate student: done" in out and "evaluate control: done" not in out
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    assert results["student"] == first and set(results) == {"teacher", "student", "control"}


@pytest.mark.parametrize("what", ["control", "heldout"])
def test_what_has_changed_is_evaluated_again(
    what: str, run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = run
    assert main(["evaluate", *arguments]) == 0
    if what == "control":
        weights = folder / "students/control/final/model.safetensors"
        shutil.copy(folder / "students/student/final/model.safetensors", weights)
        changed = arguments
    else:
        shutil.rmtree(folder / "heldout")
        changed = [*arguments, "--set", "cache.heldout_k=15"]
        assert main(["prepare", *changed]) == 0 and main(["cache", *changed]) == 0
    capsys.readouterr()
    assert main(["report", *changed]) == 3
    assert f"'{what}' has changed since it was evaluated" in capsys.readouterr().err
    assert main(["evaluate", *changed]) == 0
    assert ("evaluate student: done" in capsys.readouterr().out) == (what == "control")
    assert main(["report", *changed]) == 0


def test_a_student_that_diverged_has_a_line(run: tuple[Path, list[str]]) -> None:
    folder, _ = run
    model = load_model(folder / "students/control/final", choose_placement("cpu", "float32"))
    model.get_output_embeddings().weight.data.mul_(1e5)
    found = evaluate_student(model, LogitCache(folder / "heldout"), batch_rows=2, size=1, title="wild")
    assert found.perplexity == math.inf and math.isfinite(found.kl_to_teacher)
    assert [row["perplexity"] for row in table({"wild": asdict(found)})] == ["inf"]
