"""No batch makes the host wait for the device: not in stage one, and not in the forward pass of a student.

There is no GPU here: what goes through `to_device` counts as the device's, and so does all that is made from it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logit_cache.capture.teacher_pass import TeacherPass
from logit_cache.distill.loss_settings import LossSettings
from logit_cache.distill.student_loss import StudentLoss
from logit_cache.distill.trainer import DistillationTrainer
from logit_cache.lab.host_waits import as_of_device, host_waits
from logit_cache.models import packing
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.packing import RowLayout
from logit_cache.models.placement import Placement
from logit_cache.models.probe import check_model
from logit_cache.models.teacher import Teacher
from logit_cache.store.reader import LogitCache
from logit_cache.targets.supports import Support, row_seeds
from torch import Tensor
from transformers import TrainingArguments

from tests.helpers.synthetic import make_cache
from tests.models.tiny import small_model

CPU = torch.device("cpu")
SEGMENTS = torch.tensor([[0] * 9 + [1] * 11 + [2] * 4, [0] * 3 + [1] * 18 + [-1] * 3, [0] * 24])
IDS = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied to the device counts as its own, and its operations are those that a GPU runs."""
    for name in ("models.packing", "models.taps", "capture.teacher_pass", "distill.student_loss", "distill.trainer"):
        module = importlib.import_module(f"logit_cache.{name}")
        monkeypatch.setattr(module, "to_device", lambda tensor, device: as_of_device(tensor.clone()))
    by_cost, gpu = packing.layouts_by_cost, torch.device("cuda")
    monkeypatch.setattr("logit_cache.models.probe.layouts_by_cost", lambda model, device: by_cost(model, gpu))
    monkeypatch.setattr("logit_cache.targets.reduction.runs_compiled", lambda x: False)
    for name, stand_in in {"CompiledRows": lambda *_: None, "CompiledLoss": lambda rows, plain, has_kd: plain}.items():
        monkeypatch.setattr(f"logit_cache.distill.position_losses.{name}", stand_in)


def teacher_of(model: Any) -> Teacher:
    return Teacher(model, OutputLayer.of(model), Placement(CPU, torch.float32, "sdpa", ""), {}, "")


def counted(job: Callable[[], Any], model: Any) -> dict[str, int]:
    job()  # what is found out once per model
    return dict(host_waits(job, CPU, [*model.parameters(), *model.buffers()]))


@pytest.mark.parametrize(
    "read", [Tensor.item, lambda t: bool(t), lambda t: torch.arange(1)[t.view(1) > 0], torch.nonzero]
)
def test_a_read_of_the_device_is_found(read: Callable[[Tensor], Any]) -> None:
    """The count itself: of what is made from the device's tensors, and not of the host's own."""
    weight = torch.ones(2)
    found = host_waits(lambda: read((weight * 3).sum()), CPU, [weight])
    assert sum(found.values()) == 1
    assert next(iter(found)).startswith("lab/test_host_waits.py")
    assert not host_waits(lambda: read(torch.ones(2).sum()), CPU, [weight])


@pytest.mark.parametrize("support", ["topk", "topp", "threshold", "sampled"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mamba"])
def test_stage_one(copied: None, family: str, support: str) -> None:
    settings = {"topk": {"k": 8}, "topp": {"k": 8, "p": 0.9}, "threshold": {"tau": 0.05}, "sampled": {"draws": 9}}
    model = small_model(family, noise=0.2).eval()
    assert check_model(model).layout.name == ("documents" if family == "mamba" else "masks")
    run = TeacherPass(teacher_of(model), Support(support, **settings[support]), (0.5, 1.0))
    labels = torch.where(SEGMENTS >= 0, IDS, -100)
    seeds = row_seeds(0, np.arange(3), 24)
    assert counted(lambda: run(IDS, SEGMENTS, labels, seeds=seeds, mask=labels != -100), model) == {}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("cache"), tail_rank=4)


@pytest.mark.parametrize("tail", ["shape", "bucket"])
@pytest.mark.parametrize("mode", ["cached", "ce"])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_student(copied: None, cache: LogitCache, family: str, mode: str, tail: str) -> None:
    """Forward, loss and backward, with the operations of a GPU without Triton."""
    model = small_model(family, noise=0.2)
    loss = StudentLoss(mode, "causal", True, None)
    settings = LossSettings(2.0, 0.0 if mode == "ce" else 1.0, 0.1, tail)
    assert counted(lambda: student_step(loss, model, cache.batch([1, 5]), settings), model) == {}


def test_a_student_beside_its_teacher(copied: None, cache: LogitCache) -> None:
    model, other = small_model("llama", noise=0.2), small_model("mamba", noise=0.2).requires_grad_(False)
    loss = StudentLoss("online", "causal", True, None, teacher=teacher_of(other))
    weights = [*other.parameters(), *model.parameters()]
    step = partial(student_step, loss, model, settings=LossSettings(1.0, 1.0, 0.1))
    step(cache.batch([1, 5]))
    assert host_waits(lambda: step(cache.batch([1, 5])), CPU, weights) == {}


def test_a_masked_student(copied: None, cache: LogitCache) -> None:
    """Its output layer gets the positions with a label or a target alone, and which these are the CPU knows."""

    def masked() -> Any:
        batch = cache.batch([1, 5])
        batch["labels"][:, ::2] = -100
        return batch

    model, loss, settings = (
        small_model("bert", "masked"),
        StudentLoss("ce", "masked", True, None),
        LossSettings(1.0, 0.0, 1.0),
    )
    rows = loss.on_device(model, masked(), settings, CPU)
    assert rows.learned_N is not None
    assert torch.equal(rows.learned_N, (rows.batch["labels"].flatten() != -100).nonzero()[:, 0])
    assert counted(lambda: student_step(loss, model, masked(), settings), model) == {}


def student_step(loss: StudentLoss, model: Any, batch: Any, settings: LossSettings) -> None:
    rows = loss.on_device(model, batch, settings, CPU)
    fresh = tuple(part.clone() for part in rows.host_rows)  # on a CPU it is the same tensor on both sides
    rows = replace(rows, host_rows=fresh)
    for value in rows.batch.values():
        for tensor in [value] if isinstance(value, Tensor) else vars(value).values():
            if isinstance(tensor, Tensor):
                as_of_device(tensor)
    loss(model, rows, settings, as_of_device(torch.tensor([20, 20])))["loss"].backward()


def test_the_loop_of_training(copied: None, cache: LogitCache, tmp_path: Path) -> None:
    """However many steps a training has: what it reads of the device, it reads once for its log."""
    found = []
    for steps in (2, 5):
        model = small_model("llama")
        args = TrainingArguments(
            str(tmp_path / str(steps)),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=100,
            logging_nan_inf_filter=False,
            save_strategy="no",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(model, args, cache, ce_weight=0.1)
        found.append(host_waits(trainer.train, CPU, model.parameters()))
    assert found[0] == found[1]
    assert all(count == 1 for count in found[0].values()), found[0]


def test_rows_that_are_on_the_device_already_cost_waits() -> None:
    """The count of the tests above is one that can fail: it is the rows on the CPU that spare the waits."""
    model = small_model("mamba")
    rows = [as_of_device(part.clone()) for part in (IDS, SEGMENTS)]
    found = counted(lambda: packing.make_passes(model, RowLayout("documents"), *rows), model)
    assert sum(found.values()) > 3
    assert all(line.startswith("models/packing.py") for line in found)
