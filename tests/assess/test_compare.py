"""Students side by side: their table, and that students of different data are not compared by mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from logit_cache.assess.compare import comparison, differing, draw_comparison, over_seeds, read_students
from logit_cache.assess.evaluation import student_stamp
from logit_cache.base.errors import IncompleteError
from logit_cache.recipe.student import StudentConfig
from logit_cache.stages.app import main


def write_student(
    run: Path,
    name: str,
    *,
    cache: str = "c1",
    heldout: str = "h1",
    kl: float | None = None,
    steps: int = 20,
    seed: int = 0,
    **settings: Any,
) -> None:
    """A student's directory as training and evaluation leave it."""
    folder = run / "students" / name
    folder.mkdir(parents=True)
    config = StudentConfig(layers=2, steps=steps, **settings).model_dump(mode="json")
    (folder / "run.json").write_text(json.dumps({"config": config, "cache": cache, "seed": seed}))
    lines = [
        {"step": s + 1, "loss": 9.0, "ce": 4.0 - s / 10, "kd": 2.0 - s / 20, "agreement": s / 40} for s in range(steps)
    ]
    if settings.get("mode") == "ce":
        lines = [{key: line[key] for key in ("step", "loss", "ce")} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if kl is not None:
        (folder / "final").mkdir()
        (folder / "final/model.safetensors").write_text(name)
        file = run / "evaluation.json"
        known = json.loads(file.read_text()) if file.exists() else {"results": {}, "stamps": {}}
        known["results"][name] = {"perplexity": 30.0, "kl_to_teacher": kl, "agreement": 0.5, "acceptance": 0.6}
        known["stamps"] |= {"heldout": heldout, name: student_stamp(folder)}
        file.write_text(json.dumps(known))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    write_student(run, "hot", temperature=2.0, kl=0.25)
    write_student(run, "plain", kl=0.5)
    write_student(run, "labels", mode="ce")
    return run


def test_students_of_one_recipe_over_its_seeds(tmp_path: Path) -> None:
    for seed, kl in ((0, 0.25), (1, 0.75)):
        write_student(tmp_path / "run", f"student-seed{seed}", seed=seed, seeds=[seed], kl=kl)
        write_student(tmp_path / "run", f"control-seed{seed}", seed=seed, seeds=[seed], kl=1.0, mode="ce")
    students = read_students([tmp_path / "run"])
    assert differing(students) == ["mode"]
    rows = over_seeds(students)
    assert [(row["student"], row["seeds"]) for row in rows] == [("control", "2"), ("student", "2")]
    assert rows[1]["KL to teacher"].startswith("0.5000 ± 3.17")  # .25, the standard error, times t = 12.706


def test_the_table_tells_what_differs_and_where_it_ended(run: Path) -> None:
    students = read_students([run])
    assert [s.name for s in students] == ["hot", "labels", "plain"]
    assert differing(students) == ["mode", "temperature"]
    rows = comparison(students)
    assert [row["student"] for row in rows] == ["hot", "labels", "plain"]
    assert list(rows[0])[:4] == ["student", "mode", "temperature", "steps done"]
    # The last tenth of 20 lines is 2 of them.
    assert rows[0]["train kd"] == "1.0750" and rows[0]["train ce"] == "2.1500"
    assert rows[1]["train kd"] == "-" and rows[1]["KL to teacher"] == "-"
    assert [t["temperature"] for t in rows] == ["2", "1", "1"]
    assert rows[0]["KL to teacher"] == "0.2500" and rows[2]["top-1 agreement"] == "50.0%"


def test_single_students_of_several_runs(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_student(other, "plain", learning_rate=1e-3)
    students = read_students([run / "students/hot", other, run / "students/hot"])
    assert [s.name for s in students] == ["run/hot", "other/plain"]
    assert differing(students) == ["temperature", "learning_rate"]


def test_a_student_trained_since_is_not_shown_as_it_was(run: Path) -> None:
    (run / "students/hot/final/model.safetensors").write_text("trained again")
    with pytest.raises(
        IncompleteError, match="'hot' has changed since it was evaluated: run `logit-cache evaluate` again"
    ):
        read_students([run])


def test_the_figure_has_a_panel_for_each_measure(run: Path) -> None:
    figure = draw_comparison(read_students([run]))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "divergence to the teacher",
        "cross-entropy on the text",
        "top-1 agreement",
        "KL to the teacher, held out",
    ]
    bars = figure.axes[-1].patches
    assert [bar.get_width() for bar in bars] == [0.25, 0.5]


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), "--output", str(tmp_path / "out.png")]) == 0
    out = capsys.readouterr().out
    assert "hot" in out and "temperature" in out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [line["student"] for line in rows] == ["hot", "labels", "plain"]


def test_students_of_different_data_are_not_compared_by_mistake(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_student(tmp_path / "elsewhere", "plain", cache="c2")
    assert main(["compare", str(run), str(tmp_path / "elsewhere")]) == 4
    assert "--any-cache" in capsys.readouterr().err
    assert main(["compare", str(run), str(tmp_path / "elsewhere"), "--any-cache"]) == 0
    write_student(tmp_path / "measured", "plain", heldout="h2", kl=0.1)
    assert main(["compare", str(run), str(tmp_path / "measured")]) == 4
    assert "different held-out rows" in capsys.readouterr().err


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="no trained student"):
        read_students([tmp_path])
    write_student(tmp_path / "run", "fresh", steps=1)
    (tmp_path / "run/students/fresh/metrics.jsonl").unlink()
    students = read_students([tmp_path / "run"])
    assert comparison(students)[0]["steps done"] == "0"
    with pytest.raises(IncompleteError, match="nothing to draw"):
        draw_comparison(students)
