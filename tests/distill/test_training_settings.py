"""A student's settings and the directory of its training, on a tiny model and a synthetic cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cache import LogitCache, model_inputs
from logit_cache.base.errors import MismatchError, RecipeError
from logit_cache.base.progress import Meter
from logit_cache.distill.loss import distillation_loss
from logit_cache.distill.metrics import read_metrics
from logit_cache.distill.stage_two import train_student
from logit_cache.distill.student import build_student
from logit_cache.distill.student_rows import student_rows
from logit_cache.distill.trainer import DistillationTrainer
from logit_cache.distill.training_arguments import loader_workers
from logit_cache.recipe.paths import StudentPaths
from logit_cache.recipe.student import Schedule, StudentConfig
from logit_cache.store.mixture import Ensemble, Mixture
from logit_cache.store.views import ShorterRows, Subset
from transformers import TrainerCallback

from tests.distill.test_ecosystem import SHAPE, arguments, student
from tests.helpers.synthetic import make_cache

BASE: dict[str, Any] = {
    "architecture": {"model_type": "llama", **SHAPE},
    "steps": 4,
    "batch_rows": 4,
    "warmup_steps": 0,
    "save_steps": 100,
    "log_steps": 1,
    "dtype": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("settings") / "cache", vocab_size=SHAPE["vocab_size"])


@pytest.mark.parametrize(
    ("asked", "source", "device", "expected"),
    [
        (None, "runs/cache", "cpu", 0),
        (None, "s3://bucket/cache", "cpu", 2),
        (None, "runs/cache", "cuda", 2),
        (0, "s3://bucket/cache", "cuda", 0),
        (5, "runs/cache", "cpu", 5),
    ],
)
def test_loader_workers_where_the_step_leaves_cores_free(
    asked: int | None, source: str, device: str, expected: int
) -> None:
    config = StudentConfig(layers=1, loader_workers=asked)
    assert loader_workers(config, ["other", source], torch.device(device)) == expected


def test_schedules() -> None:
    linear = Schedule(shape="linear", start=1.0, end=0.2)
    assert [linear(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2])
    wsd = Schedule(shape="wsd", start=0.1, peak=0.9, end=0.3, warmup=0.2, decay=0.25)
    expected = {0.0: 0.1, 0.1: 0.5, 0.2: 0.9, 0.5: 0.9, 0.75: 0.9, 0.875: 0.6, 1.0: 0.3}
    for progress, weight in expected.items():
        assert wsd(progress) == pytest.approx(weight), progress
    sudden = Schedule(shape="wsd", warmup=0.0, decay=0.0, peak=0.7)
    assert [sudden(p) for p in (0.0, 1.0)] == [0.7, 0.7]


@given(
    st.builds(
        Schedule,
        shape=st.sampled_from(["linear", "wsd"]),
        start=st.floats(0, 5),
        peak=st.floats(0, 5),
        end=st.floats(0, 5),
        warmup=st.floats(0, 0.5),
        decay=st.floats(0, 0.5),
    ),
    st.floats(0, 1),
)
def test_a_schedule_stays_between_its_values(schedule: Schedule, progress: float) -> None:
    values = [schedule.start, schedule.end, *([schedule.peak] if schedule.shape == "wsd" else [])]
    assert min(values) - 1e-9 <= schedule(progress) <= max(values) + 1e-9


def test_scheduled_weights_reach_the_loss_and_the_log(cache: LogitCache, tmp_path: Path) -> None:
    config = StudentConfig(
        **{**BASE, "steps": 5},
        kd_weight={"shape": "linear", "start": 1.0, "end": 0.0},
        ce_weight={"shape": "linear", "start": 0.0, "end": 1.0},
        temperature=2.0,
    )
    train_student(config, "s", cache, tmp_path / "s", seed=0)
    lines = read_metrics(tmp_path / "s/metrics.jsonl")
    assert [line["kd_weight"] for line in lines] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert [line["ce_weight"] for line in lines] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    for line in lines:
        expected = line["kd_weight"] * 4 * line["kd"] + line["ce_weight"] * line["ce"]
        assert line["loss"] == pytest.approx(expected, rel=2e-3)
    assert lines[-1]["kd"] > 0, "reported also where its weight is 0"


def test_a_schedule_runs_from_0_to_1(cache: LogitCache, tmp_path: Path) -> None:
    asked: list[float] = []

    def weight(progress: float) -> float:
        asked.append(progress)
        return 1.0

    args = arguments(tmp_path / "own", logging_strategy="steps", logging_steps=1, max_steps=3)
    trainer = DistillationTrainer(student(), args, cache, kd_weight=weight)
    trainer.train()
    trainer.evaluate(cache)
    assert set(asked) == {0.0, 0.5, 1.0}
    # A schedule that has no decay to be in at its end.
    config = StudentConfig(**BASE, kd_weight={"shape": "wsd", "warmup": 0.0, "decay": 0.0, "peak": 0.7})
    train_student(config, "s", cache, tmp_path / "s", seed=0)
    assert [line["kd_weight"] for line in read_metrics(tmp_path / "s/metrics.jsonl")] == [0.7] * 4


def test_an_interrupted_training_closes_its_display(
    cache: LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[str] = []

    class Shown(Meter):
        def __enter__(self) -> Meter:
            states.append("shown")
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            states.append("closed")

        def advance(self, *_: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("logit_cache.distill.metrics.Meter", Shown)
    with pytest.raises(KeyboardInterrupt):
        train_student(StudentConfig(**BASE), "s", cache, tmp_path / "s", seed=0)
    assert states == ["shown", "closed"]


def test_every_line_of_the_log_has_kd_ce_coverage_and_agreement(cache: LogitCache, tmp_path: Path) -> None:
    """Against the reference on the same rows, at the weights before the first step."""
    seen: list[Any] = []

    class Recorder(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                logits = model(**model_inputs(inputs, model)).logits
            seen.append(distillation_loss(logits, inputs["targets"], inputs["labels"], temperature=2.0))
            return super().compute_loss(model, inputs, *args, **kwargs)

    lines: list[dict[str, float]] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            lines.append(logs)

    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1)
    Recorder(student(), args, cache, temperature=2.0, callbacks=[Keep()]).train()
    assert len(seen) == 3
    for output, line in zip(seen, lines, strict=False):
        for name in ("kd", "ce", "coverage", "agreement"):
            assert line[name] == pytest.approx(getattr(output, name).item(), rel=1e-4, abs=1e-6), name
    assert 0 < lines[0]["coverage"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "skew_kl", "total_variation", "tail_aware_kl"])
def test_a_recipe_names_a_divergence(cache: LogitCache, tmp_path: Path, name: str) -> None:
    config = StudentConfig(**{**BASE, "steps": 24, "learning_rate": 0.02}, divergence=name, ce_weight=0.0)
    train_student(config, name, cache, tmp_path / name, seed=0)
    kd = [line["kd"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
    # A step sees a few rows; several together are the same rows again.
    assert sum(kd[-6:]) < sum(kd[:6])


def test_a_run_directory_says_what_made_it(cache: LogitCache, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train_student(StudentConfig(**BASE), "s", cache, tmp_path / "s", seed=7)
    made = json.loads((tmp_path / "s/provenance.json").read_text())
    assert made["versions"]["torch"] == torch.__version__ and made["cache"] == cache.digest
    assert "device cpu" in made["placement"] and made["command"] and made["started"]
    assert len(made["git_commit"] or "0" * 40) == 40
    run = json.loads((tmp_path / "s/run.json").read_text())
    assert run["seed"] == 7 and run["config"]["steps"] == 4 and run["cache"] == cache.digest
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "s/tensorboard"))
    events.Reload()
    written = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    lines = read_metrics(tmp_path / "s/metrics.jsonl")
    for name in ("loss", "kd", "ce", "coverage", "agreement"):
        assert written[f"train/{name}"] == pytest.approx([line[name] for line in lines], rel=1e-5)
    assert not list((tmp_path / "s/checkpoints").rglob("*tfevents*"))


def test_no_logger_where_none_is_wanted(cache: LogitCache, tmp_path: Path) -> None:
    train_student(StudentConfig(**BASE, report_to=[]), "s", cache, tmp_path / "s", seed=0)
    assert not (tmp_path / "s/tensorboard").exists()


def test_a_missing_logger_is_refused(cache: LogitCache, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"students\.s\.report_to: 'nothing' is not installed"):
        train_student(StudentConfig(**BASE, report_to=["nothing"]), "s", cache, tmp_path / "s", seed=0)


def test_epochs_instead_of_steps(cache: LogitCache, tmp_path: Path) -> None:
    train_student(StudentConfig(**BASE, epochs=2.5), "s", cache, tmp_path / "s", seed=0)
    # 12 rows in batches of 4 are 3 steps an epoch; what is left of a half is rounded up.
    assert read_metrics(tmp_path / "s/metrics.jsonl")[-1]["step"] == 8


def test_the_order_of_rows_is_a_function_of_the_seed(cache: LogitCache, tmp_path: Path) -> None:
    def order(seed: int, name: str) -> list[list[int]]:
        seen: list[list[int]] = []

        class Recorder(DistillationTrainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                seen.extend(inputs["input_ids"].tolist())
                return super().compute_loss(model, inputs, *args, **kwargs)

        Recorder(student(), arguments(tmp_path / name, seed=seed, data_seed=seed, max_steps=6), cache).train()
        return seen

    first = order(1, "a")
    assert first == order(1, "b") != order(2, "c")
    assert first[:12] != first[12:24] and sorted(first[:12]) == sorted(first[12:24]), "another order in every epoch"


def test_a_student_of_several_caches(cache: LogitCache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=4, length=20, vocab_size=SHAPE["vocab_size"])
    mixture = StudentConfig(**BASE, caches={str(cache.path): 1.0, str(other.path): 3.0})
    rows = student_rows(mixture, "s", cache, 0)
    assert isinstance(rows, Mixture) and rows.row_length == 16
    train_student(mixture, "mixed", cache, tmp_path / "mixed", seed=0)
    assert json.loads((tmp_path / "mixed/run.json").read_text())["cache"] == rows.digest != cache.digest

    second = make_cache(tmp_path / "second", teacher=1, vocab_size=SHAPE["vocab_size"])
    teachers = StudentConfig(**BASE, teachers=[str(cache.path), str(second.path)])
    assert isinstance(student_rows(teachers, "s", cache, 0), Ensemble)
    train_student(teachers, "taught", cache, tmp_path / "taught", seed=0)
    assert (tmp_path / "taught/final/config.json").exists()
    hot = StudentConfig(**BASE, teachers=[str(cache.path), str(second.path)], temperature=2.0)
    with pytest.raises(RecipeError, match=r"students\.hot: .*at 1 only"):
        train_student(hot, "hot", cache, tmp_path / "hot", seed=0)


def test_fewer_and_shorter_rows(cache: LogitCache) -> None:
    rows = student_rows(StudentConfig(**BASE, row_length=8, max_rows=5), "s", cache, 3)
    assert isinstance(rows, Subset) and len(rows) == 5 and rows.row_length == 8
    again = student_rows(StudentConfig(**BASE, row_length=8, max_rows=5), "s", cache, 3)
    assert torch.equal(rows.batch([0, 4])["input_ids"], again.batch([0, 4])["input_ids"])
    assert isinstance(student_rows(StudentConfig(**BASE, row_length=8), "s", cache, 3), ShorterRows)
    assert student_rows(StudentConfig(**BASE, max_rows=99), "s", cache, 3) is cache
    with pytest.raises(RecipeError, match=r"outside 2\.\.16"):
        student_rows(StudentConfig(**BASE, row_length=17), "s", cache, 3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"divergence": "reverse_kl", "tail": "drop"}, "bucket"),
        ({"caches": {"a": 1.0}, "teachers": ["b"]}, "exclude each other"),
        ({"kd_weight": {"shape": "wsd", "warmup": 0.6, "decay": 0.6}}, "longer than the training"),
        ({"kd_weight": -1.0}, "greater than or equal to 0"),
        ({"divergence": "wasserstein"}, "reverse_kl"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StudentConfig(**BASE, **settings)


def test_an_unusable_alpha_is_refused_before_training(cache: LogitCache, tmp_path: Path) -> None:
    config = StudentConfig(**BASE, divergence="skew_kl", alpha=2.0)
    with pytest.raises(RecipeError, match=r"students\.s: alpha = 2"):
        train_student(config, "s", cache, tmp_path / "s", seed=0)
    assert not (tmp_path / "s").exists()


def test_rows_that_the_teacher_finds_implausible_are_left_out(
    cache: LogitCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    losses = cache.teacher_losses()
    limit = float(np.sort(losses)[7])
    config = StudentConfig(**BASE, max_teacher_loss=limit)
    train_student(config, "s", cache, tmp_path / "s", seed=0)
    assert "train s: 4 of 12 rows left out, where the teacher's loss is above" in caplog.text
    rows = student_rows(config, "s", cache, 0)
    assert isinstance(rows, Subset) and len(rows) == 8
    np.testing.assert_array_equal(rows.teacher_losses(), losses[losses <= np.float32(limit)])
    run = json.loads((tmp_path / "s/run.json").read_text())
    assert run["cache"] == rows.digest != cache.digest and run["config"]["max_teacher_loss"] == limit
    with pytest.raises(MismatchError, match="max_teacher_loss"):
        train_student(StudentConfig(**BASE, max_teacher_loss=99.0), "s", cache, tmp_path / "s", seed=0)
    assert student_rows(StudentConfig(**BASE, max_teacher_loss=99.0), "s", cache, 0) is cache
    assert len(student_rows(StudentConfig(**BASE, max_teacher_loss=limit, max_rows=3), "s", cache, 0)) == 3
    with pytest.raises(RecipeError, match=r"students\.s\.max_teacher_loss = 0\.001 leaves no row"):
        student_rows(StudentConfig(**BASE, max_teacher_loss=0.001), "s", cache, 0)


def test_every_cache_of_a_student_leaves_out_rows(cache: LogitCache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", teacher=1, vocab_size=SHAPE["vocab_size"])
    losses = np.stack([cache.teacher_losses(), other.teacher_losses()])
    limit = float(np.median(losses))
    paths = [str(cache.path), str(other.path)]
    mixed = student_rows(StudentConfig(**BASE, caches=dict.fromkeys(paths, 1.0), max_teacher_loss=limit), "s", cache, 0)
    assert isinstance(mixed, Mixture) and len(mixed) == int((losses <= np.float32(limit)).sum())
    taught = student_rows(StudentConfig(**BASE, teachers=paths, max_teacher_loss=limit), "s", cache, 0)
    assert isinstance(taught, Subset) and len(taught) == int((losses.mean(0) <= np.float32(limit)).sum())
    without = make_cache(tmp_path / "without", vocab_size=SHAPE["vocab_size"], label_log_probs=False)
    with pytest.raises(RecipeError, match=r"does not keep the teacher's loss.*cache\.label_log_probs = true"):
        student_rows(StudentConfig(**BASE, max_teacher_loss=limit), "s", without, 0)


def test_the_first_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    models = [build_student(StudentConfig(**BASE), StudentPaths(tmp_path), seed) for seed in (0, 0, 1)]
    one, two, three = (model.lm_head.weight.detach().numpy() for model in models)
    assert np.array_equal(one, two) and not np.array_equal(one, three)
