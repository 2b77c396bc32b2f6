"""Students from the cache, with transformers' Trainer."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logit_cache import DistillationTrainer, LogitCache, SparseTargets, collate
from logit_cache.base.errors import MismatchError
from logit_cache.distill.fused import fused_loss, fused_online_loss
from logit_cache.distill.loss import distillation_loss
from logit_cache.distill.loss_settings import LossSettings
from logit_cache.distill.metrics import read_metrics
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.packing import document_positions
from logit_cache.models.rows import body_hidden
from logit_cache.models.teacher import Teacher
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from tests.conftest import Run, files_of


@pytest.fixture(scope="module")
def cache(small_run: Run) -> LogitCache:
    return LogitCache(small_run.dir / "cache")


def tiny_student(vocab_size: int = 49152) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


def one_update(cache: LogitCache, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Weights after one plain gradient step of size 1 over eight rows."""
    options = {key: settings.pop(key) for key in ("mode", "temperature", "teacher", "ce_weight") if key in settings}
    model = tiny_student()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=3,
        data_seed=3,
        save_strategy="no",
        **settings,
    )
    DistillationTrainer(model, args, cache, **options).train()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("mode", ["cached", "ce"])
def test_accumulation_does_not_change_the_update(cache: LogitCache, tmp_path: Path, mode: str) -> None:
    """Rows hold different numbers of positions, so averaging per micro-batch would show."""
    counts = {int(cache[i]["targets"].mask.sum()) for i in range(len(cache))}
    assert len(counts) > 2
    whole = one_update(cache, tmp_path, mode=mode, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    split = one_update(cache, tmp_path, mode=mode, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert largest_difference(whole, dict(tiny_student().state_dict())) > 1e-4, "nothing was learned"
    assert largest_difference(whole, split) < 1e-6


def test_cached_with_all_of_the_vocabulary_is_online(teacher: Teacher, cache: LogitCache) -> None:
    """K = V against the teacher beside the student: same loss, same gradient, at T = 2."""
    batch = cache.batch([0])
    labels, student = batch["labels"], tiny_student()
    hidden_teacher = teacher.hidden(batch["input_ids"], batch["segment_ids"]).flatten(0, 1)
    logits = teacher.output_layer.logits(hidden_teacher)
    targets = SparseTargets.from_logits(logits, k=teacher.vocab_size, mask=batch["targets"].mask[0])
    gradients, losses = [], []
    for online in (False, True):
        student.zero_grad()
        hidden = body_hidden(student, batch["input_ids"], batch["segment_ids"]).flatten(0, 1)
        layer, settings = OutputLayer.of(student), LossSettings(temperature=2.0)
        if online:
            mask = batch["targets"].mask
            loss = fused_online_loss(hidden, layer, lambda rows: logits[rows], mask, labels, settings).loss
        else:
            loss = fused_loss(hidden, layer, targets, labels[0], settings).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    scale = max(float(g.abs().max()) for g in gradients[0].values())
    assert largest_difference(*gradients) < 1e-5 * scale


def test_online_mode_trains_like_cached(cache: LogitCache, teacher: Teacher, tmp_path: Path) -> None:
    """The 32 cached candidates and their tail lead nearly where the whole distribution leads."""
    start = dict(tiny_student().state_dict())
    options = {"per_device_train_batch_size": 4, "ce_weight": 0.0}
    cached = one_update(cache, tmp_path, mode="cached", **options)
    online = one_update(cache, tmp_path, mode="online", teacher=teacher, **options)

    def direction(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([(weights[name] - start[name]).flatten() for name in start])

    cosine = torch.nn.functional.cosine_similarity(direction(cached), direction(online), dim=0)
    assert cosine > 0.98


def test_the_trainers_loss_is_the_reference(cache: LogitCache, tmp_path: Path) -> None:
    model = tiny_student()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = DistillationTrainer(model, args, cache, temperature=2.0, kd_weight=0.7, ce_weight=0.3)
    batch = cache.batch([1, 2, 3])
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=document_positions(batch["segment_ids"]),
        ).logits
        actual = trainer.compute_loss(model, batch)
    expected = distillation_loss(
        logits, batch["targets"], batch["labels"], temperature=2.0, kd_weight=0.7, ce_weight=0.3
    )
    assert float(actual) == pytest.approx(float(expected.loss), rel=1e-5)


def test_an_interrupted_student_ends_as_an_undisturbed_one(small_run: Run, tmp_path: Path) -> None:
    run = small_run.copy(tmp_path / "run", keep=("cache", "heldout", "students"))
    student = run.dir / "students/student"
    shutil.rmtree(student / "final")
    shutil.rmtree(student / "checkpoints/checkpoint-4")
    with (student / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a line cut short by the crash
    assert run.stage("train", "--student", "student") == 0
    weights = load_file(student / "final/model.safetensors")
    expected = load_file(small_run.dir / "students/student/final/model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    lines, before = (read_metrics(r.dir / "students/student/metrics.jsonl") for r in (run, small_run))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for key in ("loss", "kd", "ce"):
        assert [line[key] for line in lines] == [line[key] for line in before]


def test_train_again_finds_it_done(small_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run.stage("train") == 0
    assert capsys.readouterr().out.count("done") == 2


def test_other_settings_under_the_same_name_are_refused(small_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run.stage("train", train__temperature=2.0) == 4
    assert "temperature" in capsys.readouterr().err


def test_learning_lowers_both_losses(small_run: Run) -> None:
    for name in ("student", "control"):
        lines = read_metrics(small_run.dir / "students" / name / "metrics.jsonl")
        assert lines[-1]["ce"] < lines[0]["ce"]
        assert all(np.isfinite(line["loss"]) for line in lines)
    assert read_metrics(small_run.dir / "students/student/metrics.jsonl")[0]["kd"] > 0


def test_the_logged_loss_is_the_sum_of_its_parts(small_run: Run) -> None:
    for line in read_metrics(small_run.dir / "students/student/metrics.jsonl"):
        # Trainer keeps the loss in float32 and prints it rounded.
        assert line["loss"] == pytest.approx(line["kd"] + 0.1 * line["ce"], rel=2e-3)


def test_a_student_with_a_smaller_vocabulary_is_refused(cache: LogitCache, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(MismatchError, match="49152"):
        DistillationTrainer(tiny_student(1000), args, cache)


def test_a_fresh_architecture_trains(small_run: Run, tmp_path: Path) -> None:
    run = small_run.copy(tmp_path / "run")
    shape = (
        '{model_type="llama", vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=1, '
        "num_attention_heads=2, num_key_value_heads=1}"
    )
    options = {"students__fresh__architecture": shape, "train__steps": 2, "train__dtype": "float32"}
    assert run.stage("train", "--student", "fresh", **options) == 0
    assert json.loads((run.dir / "students/fresh/final/config.json").read_text())["hidden_size"] == 16


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_read_the_same_rows(cache: LogitCache, context: str) -> None:
    cache.batch([0])  # open files in the parent first
    loader = DataLoader(cache, batch_size=4, collate_fn=collate, num_workers=2, multiprocessing_context=context)
    seen = list(loader)
    expected = cache.batch(np.arange(len(cache)))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in seen]), expected["input_ids"])
    assert torch.equal(torch.cat([batch["targets"].token_ids for batch in seen]), expected["targets"].token_ids)
    assert torch.equal(torch.cat([batch["targets"].log_probs for batch in seen]), expected["targets"].log_probs)


def test_evaluation_and_report_are_there(small_run: Run) -> None:
    results = json.loads((small_run.dir / "evaluation.json").read_text())["results"]
    assert set(results) == {"teacher", "student", "control"}
    teacher = results["teacher"]
    assert teacher["kl_to_teacher"] == 0
    assert teacher["perplexity"] < results["student"]["perplexity"]
    for name in ("student", "control"):
        line = results[name]
        assert 0 <= line["agreement"] < 1
        assert 0 < line["acceptance"] < 1
        assert 0 <= line["calibration_error"] <= 1
        assert line["bytes"] == sum(
            p.stat().st_size for p in (small_run.dir / "students" / name / "final").glob("*.safetensors")
        )
    page = (small_run.dir / "report/index.html").read_text()
    assert page.count("<svg ") == 7 and 'class="explorer"' in page
    assert "http" not in page.replace("http-equiv", ""), "the page must need nothing from elsewhere"
    for name in ("candidates", "tail", "coverage", "losses", "training-kd", "training-ce", "training-agreement"):
        assert (small_run.dir / "report" / f"{name}.png").stat().st_size > 5000


def test_evaluating_the_teacher_itself_gives_its_own_line(small_run: Run, teacher: Teacher) -> None:
    """Run as a student, the teacher has no KL to itself, agrees everywhere, and has the perplexity that was cached."""
    from logit_cache.assess.evaluation import evaluate_student, evaluate_teacher

    heldout = LogitCache(small_run.dir / "heldout")
    facts = json.loads((small_run.dir / "teacher.json").read_text())
    cached = evaluate_teacher(heldout, facts)
    again = evaluate_student(copy.copy(teacher.model), heldout, batch_rows=4, size=1, title="teacher")
    assert again.perplexity == pytest.approx(cached.perplexity, rel=1e-4)
    assert again.kl_to_teacher < 5e-4  # the codec's rounding
    assert again.agreement == 1.0  # also where bf16 logits are equal: ties go to the lower id
    assert again.calibration_error == pytest.approx(cached.calibration_error, abs=0.02)
    assert again.acceptance > 0.97
    assert again.parameters == facts["parameters"]


def test_the_control_differs_only_by_its_targets(small_run: Run) -> None:
    one, other = (small_run.dir / "students" / name / "start" for name in ("student", "control"))
    assert files_of(one)["model.safetensors"] == files_of(other)["model.safetensors"]
