"""DistillationTrainer: the model that it trains is the caller's own before and after."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache import DistillationTrainer, LogitCache, model_inputs
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
    model(**model_inputs(cache.batch([0])))
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
    model(**model_inputs(cache.batch([0])))
    assert len(calls) == before + 1
