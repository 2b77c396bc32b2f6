"""DistillationTrainer on views of several caches whose tails have a shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from logit_cache import DistillationTrainer, Ensemble, Mixture, distillation_loss, model_inputs
from logit_cache.store.row_source import RowSource
from logit_cache.targets.basis import TailBasis

from tests.distill.test_ecosystem import SHAPE, arguments, student
from tests.helpers.shapes import LinearTeacher, Shaped
from tests.helpers.synthetic import make_cache

VOCAB = int(SHAPE["vocab_size"])


def basis(seed: int, rank: int) -> TailBasis:
    made = LinearTeacher.random(VOCAB, rank, seed)
    return TailBasis(made.offset.float(), made.directions.float(), digest=f"basis {seed}")


@pytest.mark.parametrize("view", [Ensemble, Mixture])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_student_learns_the_whole_distribution(view: type[RowSource], workers: int, tmp_path: Path) -> None:
    """The logged loss is that of the batch's targets as the loader gives them; for an Ensemble, which has no tail mode
    but the shape, the KL from p^ at T = 2."""
    one = make_cache(tmp_path / "one", vocab_size=VOCAB)
    two = make_cache(tmp_path / "two", vocab_size=VOCAB, teacher=1, k=5)
    rows = view([Shaped(one, basis(0, 3)), Shaped(two, basis(1, 2), seed=50)])  # type: ignore[call-arg]
    model = student()
    settings = {"max_steps": 1, "logging_steps": 1, "logging_strategy": "steps", "dataloader_num_workers": workers}
    trainer = DistillationTrainer(model, arguments(tmp_path, **settings), rows, temperature=2.0)
    batch = next(iter(trainer.get_train_dataloader()))
    logits, targets = model(**model_inputs(batch, model)).logits.detach(), batch["targets"]
    expected = distillation_loss(logits, targets, batch["labels"], temperature=2.0).kd
    trainer.train()
    line = next(line for line in trainer.state.log_history if "kd" in line)
    assert line["kd"] == pytest.approx(expected.item(), rel=1e-4)
    if view is Ensemble:
        log_q = torch.log_softmax(logits.double() / 2, -1)[targets.mask]
        p = targets.dense(2.0).double()[targets.mask]
        kl = (torch.special.xlogy(p, p) - p * log_q).sum(-1).mean()
        assert expected.item() == pytest.approx(kl.item(), rel=1e-5)


def test_a_temperature_that_a_teacher_does_not_serve_is_refused_before_training(tmp_path: Path) -> None:
    one = make_cache(tmp_path / "one", vocab_size=VOCAB)
    rows = Ensemble([Shaped(one, basis(0, 3)), Shaped(one, basis(1, 2))])
    with pytest.raises(ValueError, match="inverse temperature 2"):
        DistillationTrainer(student(), arguments(tmp_path), rows, temperature=0.5)
