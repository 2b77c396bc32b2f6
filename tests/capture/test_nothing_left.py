"""A stage one that is finished says so without the teacher; whatever has changed of it is noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from logit_cache.models import teacher as teacher_module
from logit_cache.stages.app import main
from safetensors.torch import load_file, save_file

from tests.conftest import files_of
from tests.helpers.tiny import make_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks, finalised."""
    recipe = make_recipe(tmp_path_factory.mktemp("made"), cache__shard_rows=8)
    for command in (["prepare"], ["cache", "--task=0", "--num-tasks=2"], ["cache", "--task=1", "--num-tasks=2"]):
        assert main([command[0], str(recipe), *command[1:]]) == 0
    assert main(["finalise", str(recipe)]) == 0
    return recipe


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The teachers that are loaded."""
    loaded: list[str] = []
    load = teacher_module.load_model

    def counted(source: str, *arguments: object) -> object:
        loaded.append(source)
        return load(source, *arguments)

    monkeypatch.setattr(teacher_module, "load_model", counted)
    return loaded


def test_nothing_is_loaded_where_nothing_is_left(
    made: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(made.parent / "run/cache")
    for command in ("cache", "finalise"):
        assert main([command, str(made)]) == 0
        assert f"cache: {made.parent}/run/cache: done, " in capsys.readouterr().out
    assert main(["cache", str(made), "--task=1", "--num-tasks=3"]) == 0
    assert "nothing to do for task 1 of 3" in capsys.readouterr().out
    assert not loads and files_of(made.parent / "run/cache") == before


@pytest.mark.parametrize("change", ["a shard", "a heldout shard", "the facts", "first weights", "teacher", "touched"])
def test_what_is_left_takes_the_teacher(made: Path, tmp_path: Path, loads: list[str], change: str) -> None:
    shutil.copytree(made.parent, tmp_path / "copy", copy_function=shutil.copy2)
    folder = tmp_path / "copy"
    recipe, run = folder / made.name, folder / "run"
    recipe.write_text(recipe.read_text().replace(str(made.parent), str(folder)))
    assert main(["cache", str(recipe)]) == 4, "the teacher of a copy has another name"
    assert main(["cache", str(recipe), "--accept", "teacher.source"]) == 0
    again = ["cache", str(recipe), "--accept", "teacher.source"]
    loads.clear()
    assert main(again) == 0 and not loads
    if change == "a shard":
        (run / "cache/shards/00001.json").unlink()
    elif change == "a heldout shard":
        (run / "heldout/shards/00000.json").unlink()
    elif change == "the facts":
        (run / "teacher.json").unlink()
    elif change == "first weights":
        shutil.rmtree(next((run / "students").glob("*/start")))
    elif change == "teacher":
        file = folder / "teacher/model.safetensors"
        weights = load_file(file)
        next(tensor for tensor in weights.values() if tensor.dim() == 2)[0, 0] += 1
        save_file(weights, file, metadata={"format": "pt"})
    else:
        (folder / "teacher/model.safetensors").touch()
    assert main(again) == (4 if change == "teacher" else 0)
    assert loads
    loads.clear()
    if change != "teacher":
        assert main(again) == 0 and not loads


def test_another_setting_is_refused_before_the_teacher_is_loaded(
    made: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", str(made), "--set", "cache.k=5"]) == 4
    assert "support.k is 8 in the cache and 5 now" in capsys.readouterr().err
    assert not loads


def test_a_finished_student_needs_no_teacher_beside_it(made: Path, loads: list[str]) -> None:
    online = ["train", str(made), "--student=student", "--set", "students.student.mode=online"]
    assert main(online) == 0 and loads
    loads.clear()
    assert main(online) == 0 and not loads
