"""A study in a world made for it: every arm runs, what is done is not done again, and the table is what the runs say."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest
import tomli_w
from logit_cache.base.places import RemotePath
from logit_cache.lab.study_arms import arms, cache_recipe
from logit_cache.lab.study_results import interval, read_result, summarise
from logit_cache.recipe.loading import load_recipe
from logit_cache.stages.app import main

from tests.helpers.tiny import make_recipe

SHAPE = {"model_type": "llama", "vocab_size": 320, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1, "intermediate_size": 32}
STEPS = {"batch_rows": 4, "learning_rate": 1e-2, "warmup_steps": 0, "save_steps": 100, "device": "cpu"}
STUDY = """
[study]
seeds = [0, 1]
tails = ["renormalize_teacher"]
longer_labels = 2.0
warm = ["top12"]
warm_tails = ["renormalize"]
results = "RESULTS"
only_at = { drawn = [1.0], top12 = [1.0], top4 = [2.0] }

[study.caches]
top12 = { k = 12, tail_rank = 0 }
top4 = { k = 4, tail_rank = 0 }
shape = { k = 6, tail_rank = 4 }
drawn = { support = "sampled", draws = 10 }
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    teacher = {"architecture": {**SHAPE, "hidden_size": 32}, "vocabulary": 320, "steps": 30, **STEPS}
    student = {"architecture": {**SHAPE, "hidden_size": 16}, "steps": 4, "eval_steps": 2, "log_steps": 4, **STEPS}
    file = make_recipe(
        folder, train={"dtype": "float32", "ce_weight": 0.0}, students={"student": student}, cache__heldout_k=320
    )
    text = file.read_text()
    made = {"model": str(folder / "made"), "training": {**teacher, "dtype": "float32"}, "dtype": "float32"}
    whole = {**tomllib.loads(text), "teacher": {**made, "device": "cpu"}}
    file.write_text(tomli_w.dumps(whole) + STUDY.replace("RESULTS", str(folder / "results")))
    return file


@pytest.mark.slow
def test_a_study(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(recipe)]) == 0
    out = capsys.readouterr().out
    plan = load_recipe(recipe)
    names = [arm.name for arm in arms(plan)]
    assert names == [
        *("labels", "online T=1", "online T=2", "top12 renormalize_teacher T=1", "top4 renormalize_teacher T=2"),
        *("shape T=1", "shape T=2", "drawn T=1", "labels 2x"),
        *("warm labels", "warm online T=1", "warm online T=2", "warm top12 renormalize T=1"),
    ]
    for name in ("teacher", *names):
        assert any(line.startswith(name + " ") for line in out.splitlines()), name
    folder = Path(str(plan.study.results))
    assert (folder / "gap.png").stat().st_size > 5000 and (folder / "curves.png").stat().st_size > 5000
    files = sorted(folder.glob("*-seed*.json"))
    assert len(files) == 2 * len(names)
    assert not list(plan.run_dir.glob("runs/*/final")), "weights of runs that are evaluated are not kept"

    # The numbers of the files are the numbers of the table.
    found = {
        (arm.name, seed): result
        for arm in arms(plan)
        for seed in (0, 1)
        if (result := read_result(plan, arm, seed)) is not None
    }

    def kl(name: str, seed: int) -> float:
        return found[name, seed].measures["kl_to_teacher"]

    for name, labels, online in (
        ("drawn T=1", "labels", "online T=1"),
        ("warm top12 renormalize T=1", "warm labels", "warm online T=1"),
    ):
        closed = [(kl(labels, s) - kl(name, s)) / (kl(labels, s) - kl(online, s)) for s in (0, 1)]
        mean, half = interval(closed)
        assert f"{mean:.1%} ± {half:.1%}" in next(line for line in out.splitlines() if line.startswith(name + " "))
    assert found["labels 2x", 0].tokens == 2 * found["labels", 0].tokens == 2 * 4 * 4 * 16
    assert [tokens for tokens, _ in found["labels", 0].curve] == [2 * 4 * 16, 4 * 4 * 16]
    assert kl("warm labels", 0) != kl("labels", 0)
    shape, few, drawn = (found[name, 0] for name in ("shape T=2", "top4 renormalize_teacher T=2", "drawn T=1"))
    assert 0 < few.kept_mass < shape.kept_mass < 1 and drawn.kept_mass == 0
    assert found["labels", 0].kept_mass is None and found["labels", 0].bytes_per_position is None

    # Only what is missing is done again, and comes out the same.
    before = {file: file.read_text() for file in files}
    gone = next(file for file in files if file.name.startswith("warm-top12"))
    gone.unlink()
    assert summarise(plan).missing == 1
    assert main(["study", str(recipe), "--table"]) == 0
    assert "1 runs are missing" in capsys.readouterr().out
    assert main(["study", str(recipe)]) == 0
    assert {file: file.read_text() for file in files if file != gone} == {
        file: text for file, text in before.items() if file != gone
    }
    again, first = json.loads(gone.read_text()), json.loads(before[gone])
    assert again["identity"] == first["identity"]
    for key, value in first["measures"].items():
        assert again["measures"][key] == pytest.approx(value, rel=1e-6), key

    # There is nothing to draw before the references.
    alone = folder.parent / "alone"
    alone.mkdir()
    (alone / "labels-seed0.json").write_text((folder / "labels-seed0.json").read_text())
    assert main(["study", str(recipe), "--table", "--set", f"study.results={alone}"]) == 0
    assert "no figures yet" in capsys.readouterr().out and not list(alone.glob("*.png"))

    # Results of other settings are not mixed in.
    changed = load_recipe(recipe, ["study.caches.shape.tail_rank=3"])
    assert summarise(changed).missing == 2 * 2 and summarise(changed).teachers == 1
    assert main(["study", str(recipe), "--table", "--set", "corpus.row_length=15"]) == 3
    assert "no results of these settings" in capsys.readouterr().err


def test_every_cache_of_a_study_has_a_place_of_its_own(recipe: Path, tmp_path: Path) -> None:
    for location in (None, str(tmp_path / "elsewhere"), "memory://bucket/run"):
        plan = load_recipe(recipe, [] if location is None else [f"cache.location={location}"])
        places = [cache_recipe(plan, name).paths.cache for name in plan.study.caches]
        assert len({str(place) for place in places}) == 4
        assert all(str(place).startswith(str(location or plan.run_dir)) for place in places)
    assert isinstance(places[0], RemotePath)


def test_a_results_settings_are_those_that_decide(recipe: Path) -> None:
    def identities(*changes: str) -> dict[str, str]:
        plan = load_recipe(recipe, list(changes))
        return {arm.name: arm.identity(plan, 0) for arm in arms(plan)}

    first = identities()
    assert len(set(first.values())) == len(first)
    assert identities("cache.shard_rows=2", "students.student.log_steps=1", "run_dir=elsewhere") == first
    of_cache = identities("study.caches.top4.k=5")
    assert {name for name in first if of_cache[name] != first[name]} == {n for n in first if n.startswith("top4")}
    for change in ("teacher.training.steps=31", "corpus.max_rows=39", "students.student.steps=5", "seed=1"):
        assert all(identity != first[name] for name, identity in identities(change).items()), change


def test_rows_beyond_the_teachers_positions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_recipe(tmp_path)
    file.write_text(file.read_text() + "\n[study.caches]\na = { k = 4 }\n")
    assert main(["study", str(file), "--set", "corpus.row_length=257"]) == 2
    assert "exceeds the teacher's 256 positions" in capsys.readouterr().err


def test_an_interval_is_students_t() -> None:
    assert interval([2.0]) == (2.0, None)
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)


def test_a_recipe_without_a_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(make_recipe(tmp_path))]) == 2
    assert "study.caches" in capsys.readouterr().err
