"""A study on a small teacher: every variant runs, what is done is not done again, and the table is what the runs say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from logit_cache.base.places import RemotePath
from logit_cache.lab.study import cache_recipe, interval, variants
from logit_cache.recipe.loading import load_recipe
from logit_cache.stages.app import main

from tests.helpers.tiny import make_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = make_recipe(tmp_path_factory.mktemp("study"), train__steps=3, train__ce_weight=0.0)
    study = """
[study]
seeds = [0, 1]
gradient_rows = 2

[study.caches]
topk12 = { k = 12, tail_rank = 0 }
shape = { k = 6, tail_rank = 4 }
drawn = { support = "sampled", draws = 10 }
"""
    file.write_text(file.read_text() + study)
    return file


@pytest.mark.slow
def test_a_study(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(recipe)]) == 0
    out = capsys.readouterr().out
    plan = load_recipe(recipe)
    names = [variant.name for variant in variants(plan)]
    assert names == [
        "ce",
        *(
            "online T=1",
            "topk12 bucket T=1",
            "topk12 renormalize T=1",
            "topk12 drop T=1",
            "topk12 label T=1",
            "shape T=1",
            "drawn T=1",
        ),
        *(
            "online T=2",
            "topk12 bucket T=2",
            "topk12 renormalize T=2",
            "topk12 drop T=2",
            "topk12 label T=2",
            "shape T=2",
            "drawn T=2",
        ),
    ]
    for name in names:
        assert any(line.startswith(name + " ") for line in out.splitlines()), name
    assert (plan.run_dir / "study.png").exists()
    results = sorted(plan.run_dir.glob("runs/*/result.json"))
    assert len(results) == 2 * len(names)
    assert not list(plan.run_dir.glob("runs/*/final")), "weights of runs that are evaluated are not kept"

    # Of these numbers the table is made.
    def kl(name: str, seed: int) -> float:
        return json.loads((plan.run_dir / f"runs/{name}-seed{seed}/result.json").read_text())["kl_to_teacher"]

    closed = [(kl("ce", s) - kl("drawn-T1", s)) / (kl("ce", s) - kl("online-T1", s)) for s in (0, 1)]
    mean, half = interval(closed)
    assert f"{mean:.0%} ± {half:.0%}" in next(line for line in out.splitlines() if line.startswith("drawn T=1"))

    # Only what is missing is done again, and comes out the same.
    before = {file: file.read_text() for file in results}
    results[3].unlink()
    for leftover in results[3].parent.glob("run.json"):
        leftover.unlink()
    stamps = {file: file.stat().st_mtime_ns for file in results if file.exists()}
    assert main(["study", str(recipe)]) == 0
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}
    again = json.loads(results[3].read_text())
    for key, value in json.loads(before[results[3]]).items():
        if key != "tokens_per_second":
            assert again[key] == pytest.approx(value, rel=1e-6), key


def test_every_cache_of_a_study_has_a_place_of_its_own(recipe: Path, tmp_path: Path) -> None:
    for location in (None, str(tmp_path / "elsewhere"), "memory://bucket/run"):
        plan = load_recipe(recipe, [] if location is None else [f"cache.location={location}"])
        places = [cache_recipe(plan, name).paths.cache for name in plan.study.caches]
        assert len({str(place) for place in places}) == 3
        assert all(str(place).startswith(str(location or plan.run_dir)) for place in places)
    assert isinstance(places[0], RemotePath)


def test_rows_beyond_the_teachers_positions_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(recipe), "--set", f"run_dir={tmp_path}", "--set", "corpus.row_length=257"]) == 2
    assert "exceeds the teacher's 256 positions" in capsys.readouterr().err


def test_an_interval_is_students_t() -> None:
    assert interval([2.0]) == (2.0, None)
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)


def test_a_recipe_without_a_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(make_recipe(tmp_path))]) == 2
    assert "study.caches" in capsys.readouterr().err
