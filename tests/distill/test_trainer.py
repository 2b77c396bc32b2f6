"""DistillationTrainer: the model that it trains is the caller's own before and after."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache import DistillationTrainer, LogitCache, distillation_loss, model_inputs
from logit_cache.assess.evaluation import evaluate_student
from logit_cache.targets.basis import TailBasis
from transformers import TrainerCallback

from tests.distill.test_ecosystem import SHAPE, arguments, student
from tests.helpers.synthetic import make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("trainer") / "cache", vocab_size=SHAPE["vocab_size"])


def assert_untouched(model: Any) -> None:
    assert not {"forward", "_original_forward"} & vars(model).keys()
    assert model.forward == types.MethodType(type(model).forward, model)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_and_evaluation_leave_the_models_own_forward(cache: LogitCache, tmp_path: Path, bf16: bool) -> None:
    """accelerate wraps forward for mixed precision: the loss has that wrapper in every call, the model alone in none."""
    model = student()
    autocast: list[bool] = []
    model.model.register_forward_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    trainer = DistillationTrainer(model, arguments(tmp_path, bf16=bf16), cache)
    assert_untouched(model)
    autocast.clear()  # of the checks before the training
    trainer.train()
    assert_untouched(model)
    loss = trainer.evaluate(cache)["eval_loss"]
    assert_untouched(model)
    assert set(autocast) == {bf16}
    model(**model_inputs(cache.batch([0]), model))
    assert autocast[-1] is False
    trainer.train()
    assert trainer.evaluate(cache)["eval_loss"] < loss, "the second training trained on"
    assert_untouched(model)


def test_an_exception_in_training_leaves_the_models_own_forward(cache: LogitCache, tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = student()
    with pytest.raises(KeyboardInterrupt):
        DistillationTrainer(model, arguments(tmp_path), cache, callbacks=[Interrupt()]).train()
    assert_untouched(model)


def test_a_forward_that_the_caller_set_stays(cache: LogitCache, tmp_path: Path) -> None:
    model = student()
    calls: list[int] = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(self).forward(self, *args, **kwargs)

    model.forward = own = types.MethodType(forward, model)
    DistillationTrainer(model, arguments(tmp_path), cache).train()
    assert vars(model)["forward"] is own
    before = len(calls)
    model(**model_inputs(cache.batch([0]), model))
    assert len(calls) == before + 1


class ShapedCache(LogitCache):
    """A cache whose targets get a tail shape, which depends on the position alone."""

    def batch(self, indices: Any) -> Any:
        g = torch.Generator().manual_seed(0)
        basis = TailBasis(torch.randn(self.vocab_size, generator=g), torch.randn(self.vocab_size, 2, generator=g))
        batch = super().batch(indices)
        place = torch.arange(self.row_length, dtype=torch.float32).expand(batch["targets"].mask.shape)
        coordinates = torch.stack([(0.3 * place).sin(), (0.7 * place).cos()], -1)
        return {**batch, "targets": replace(batch["targets"], tail_coordinates=coordinates, basis=basis)}


@pytest.mark.parametrize("tail", [None, "shape", "bucket"])
def test_a_cache_with_a_shape_teaches_it(cache: LogitCache, tmp_path: Path, tail: str | None) -> None:
    """By default and by name; the logged coverage stays the head's mass."""
    shaped, options = ShapedCache(cache.path), {"temperature": 2.0, "ce_weight": 0.3}
    model = student()
    trainer = DistillationTrainer(
        model, arguments(tmp_path, max_steps=1, logging_steps=1, logging_strategy="steps"), shaped, tail=tail, **options
    )
    rows = next(iter(trainer.get_train_dataloader()))
    logits = model(**model_inputs(rows, model)).logits.detach()
    bucket = replace(rows["targets"], tail_coordinates=None, basis=None)
    expected = distillation_loss(logits, bucket if tail == "bucket" else rows["targets"], rows["labels"], **options)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "kd" in line)
    assert line["kd"] == pytest.approx(expected.kd.item(), rel=1e-4)
    assert line["coverage"] == pytest.approx(
        distillation_loss(logits, bucket, rows["labels"], **options).coverage.item()
    )


def test_evaluation_takes_the_tail_as_one_token(cache: LogitCache) -> None:
    """Also where the cache has its shape: what is said of a model must not hang on what the cache guesses."""
    shaped, model = ShapedCache(cache.path), student().eval()
    batch = shaped.batch(range(len(shaped)))
    with torch.no_grad():
        q = torch.softmax(model(**model_inputs(batch, model)).logits.double(), -1)
    kept = batch["labels"] != -100
    targets = batch["targets"]
    log_p, log_tail = (part.double() for part in targets.at_temperature(1.0))
    ids = targets.token_ids.clamp(min=0)
    q_head = torch.where(targets.token_ids >= 0, q.gather(-1, ids), 0.0)
    p = torch.cat([log_p.exp(), log_tail.exp().unsqueeze(-1)], -1)[kept]
    q = torch.cat([q_head, 1 - q_head.sum(-1, keepdim=True)], -1)[kept]
    found = evaluate_student(model, shaped, batch_rows=3, size=1, title="student")
    kl = torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1).mean()
    assert found.kl_to_teacher == pytest.approx(kl.item(), rel=1e-4)
    assert found.acceptance == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), rel=1e-4)
