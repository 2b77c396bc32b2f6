"""`plan`: the fidelity table of a small teacher, bytes and disk, and when it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from logit_cache import LogitCache
from logit_cache.assess.plan import plan_capture
from logit_cache.recipe.loading import load_recipe
from logit_cache.stages.app import main

from tests.helpers.tiny import make_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = make_recipe(
        tmp_path_factory.mktemp("plan"),
        corpus__row_length=64,
        corpus__max_rows=60,
        cache__shard_rows=20,
        cache__tail_rank=4,
        cache__tail_step=0.1,
    )
    assert main(["prepare", str(file)]) == 0
    return file


def planned(recipe: Path, capsys: pytest.CaptureFixture[str], *extra: str) -> dict[str, object]:
    capsys.readouterr()
    assert main(["plan", str(recipe), "--json", *extra]) == 0
    out, _ = capsys.readouterr()
    return json.loads(out)


@pytest.mark.slow
def test_the_bytes_of_the_plan_are_those_of_the_cache(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learned from 24 rows of 60, and measured on 6 others: within a fifth of what the whole cache then takes."""
    plan = planned(recipe, capsys, "--sample-rows", "30")
    assert main(["cache", str(recipe)]) == 0
    cache = LogitCache(recipe.parent / "run/cache")
    first = plan["fidelity"]["lines"][0]
    assert first["setting"] == "topk k=8 r=4 step=0.1"
    assert first["bytes_per_position"] == pytest.approx(cache.bytes / cache.positions, rel=0.2)
    assert plan["bytes"] == pytest.approx(cache.bytes, rel=0.25), (
        "positions without a target are counted as if they had one"
    )
    assert plan["teacher_hours"] > 0


@pytest.mark.slow
def test_the_table_says_what_is_known(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fidelity = planned(recipe, capsys, "--sample-rows", "40")["fidelity"]
    assert fidelity["students"] == {"near": 1, "far": 1}  # type: ignore[index]
    lines = {line["setting"]: line for line in fidelity["lines"]}  # type: ignore[index]
    for name, line in lines.items():
        assert 0 <= line["mass"] <= 1 + 1e-6
        served = ["1.0"] if name.endswith(" T=1") else ["1.0", "2.0", "4.0"]
        assert list(line["rounding"]) == list(line["gradient"]["near"]) == list(line["gradient"]["far"]) == served
        assert all(-1e-9 < kl < 2e-3 for kl in line["rounding"].values())
        sampled = line["support"]["name"] in ("threshold", "sampled")
        assert list(line["kl"]) == ([] if sampled else served)
        assert all(0 < kl < 1 for kl in line["kl"].values()) and all(x > 0 for x in line["gradient"]["far"].values())
    for samples in ("threshold tau=0.05", "sampled draws=50"):
        plain, lean = lines[samples], lines[f"{samples} T=1"]
        assert lean["bytes_per_position"] < 0.85 * plain["bytes_per_position"]
        errors = [line["gradient"]["far"]["1.0"] for line in (plain, lean)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02), "the same samples"
    masses = [lines[f"topk k={k}"]["mass"] for k in (8, 16, 32, 64, 128)]
    assert masses == sorted(masses)
    assert lines["sampled draws=50"]["mass"] == 0
    for t in ("1.0", "2.0", "4.0"):
        # More entries, more coordinates, and a shape instead of none: each is nearer to the teacher.
        for settings in (
            ["topk k=8 r=32 step=0.1", "topk k=8 r=16 step=0.1", "topk k=8"],
            ["topk k=64 r=16 step=0.1", "topk k=24 r=16 step=0.1", "topk k=8 r=16 step=0.1"],
        ):
            kl = [lines[setting]["kl"][t] for setting in settings]
            error = [lines[setting]["gradient"]["far"][t] for setting in settings]
            assert kl == sorted(kl) and error == sorted(error)
    bytes_by_rank = [
        lines[f"topk k=16{shape}"]["bytes_per_position"] for shape in ("", " r=16 step=0.1", " r=32 step=0.1")
    ]
    assert bytes_by_rank == sorted(bytes_by_rank)
    assert any(line["front"]["kl"] for line in lines.values()) and any(line["front"]["near"] for line in lines.values())


@pytest.mark.slow
def test_as_text_and_in_the_report(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--sample-rows", "4", "--gpu", "a100"]) == 0
    shown = capsys.readouterr().out
    assert "settings on 4 rows take about" in shown
    assert "topk k=8 r=4" in shown and "tokens/s here" in shown and "A100" in shown and "are free" in shown
    table = shown[shown.index("support ") : shown.index("measured on")].splitlines()
    assert max(map(len, table)) <= 120
    run = recipe.parent / "run"
    assert (run / "plan.png").stat().st_size > 10_000
    for stage in ("cache", "train", "evaluate", "report"):
        assert main([stage, str(recipe)]) == 0
    assert (run / "report/plan.png").read_bytes() == (run / "plan.png").read_bytes()
    assert "logit-cache plan" in (run / "report/index.html").read_text()


def test_a_library_user_plans_without_a_command(recipe: Path, tmp_path: Path) -> None:
    plan = plan_capture(load_recipe(recipe, [f"run_dir={tmp_path}"]), probe=False, tokens=1000, bytes_per_position=3.0)
    assert plan.bytes == 3000 and plan.files > 0 and plan.fidelity is None and plan.written_bytes == 0
    assert not list(tmp_path.iterdir()), "without a probe nothing is written"
    plan.check_disk()


def test_without_weights(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(recipe.parent / "teacher/config.json", bare)
    options = ["--no-probe", "--set", f"teacher.model={bare}", "--set", f"run_dir={tmp_path / 'run'}"]
    assert main(["plan", str(recipe), *options]) == 3, "the corpus is not prepared and --tokens is not given"
    assert "--tokens" in capsys.readouterr().err
    plan = planned(recipe, capsys, *options, "--tokens", "1000000", "--gpu", "h100", "--num-gpus", "2")
    assert plan["estimate"]["tokens"] == 1_000_000 and plan["estimate"]["num_gpus"] == 2
    assert plan["bytes"] == pytest.approx(1e6 * (1.2 * 8 + 0.13 * 4 + 4 + 1.1))
    overhead = plan["estimate"]["capture_overhead"]
    assert plan["estimate"]["break_even"] == 1 + overhead // (6 * 2 * 64 / 1e6), "six steps of two rows are not many"
    assert main(["plan", str(recipe), *options, "--tokens", "1000", "--gpu", "abacus"]) == 2


def test_a_disk_that_is_too_small_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_345))
    options = ["--no-probe", "--tokens", "1000000", "--set", f"run_dir={tmp_path / 'run'}"]
    assert main(["plan", str(recipe), *options]) == 2
    error = capsys.readouterr().err
    assert "15.2 MB" in error and "12.3 kB" in error
    # What counts is where the cache will lie, and a store does not tell.
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    other = tmp_path / "other disk"
    other.mkdir()
    assert main(["plan", str(recipe), *options, "--set", f"cache.location={other}"]) == 0
    assert asked == [other]
    assert main(["plan", str(recipe), *options, "--set", "cache.location=memory://bucket/run"]) == 0
    assert asked == [other] and "are free" not in capsys.readouterr().out.splitlines()[-1]


def test_more_candidates_than_tokens_are_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--no-probe"]):
        assert main(["plan", str(recipe), "--set", "cache.k=301", *options]) == 2
        assert "k = 301 is outside 1..300" in capsys.readouterr().err
