"""Each matching loss against a reference in float64, written out position by position; gradients by autograd of that."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from logit_cache.base.errors import RecipeError
from logit_cache.distill.fused import fused_distillation_loss
from logit_cache.distill.loss import distillation_loss
from logit_cache.distill.matching import Matching, attention_loss, cosine_loss, hidden_loss
from logit_cache.models.taps import attention_scores, visible_pairs
from logit_cache.store.signals import Signal
from logit_cache.targets.sparse_targets import SparseTargets
from torch import nn

from tests.models.test_models import build

MASK = torch.tensor([[True, True, False, True], [False, True, True, False]])


def states(width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randn(2, 2, 4, width, generator=generator, dtype=torch.float64)
    return one, two


def test_cosine_is_its_definition() -> None:
    student, teacher = states()
    expected = np.mean(
        [
            1 - float(s @ t) / math.sqrt(float(s @ s) * float(t @ t))
            for s, t in zip(student[MASK].numpy(), teacher[MASK].numpy(), strict=True)
        ]
    )
    assert float(cosine_loss(student, teacher, MASK)) == pytest.approx(expected, rel=1e-12)
    assert float(cosine_loss(student.float(), teacher.float(), MASK)) == pytest.approx(expected, rel=1e-6)
    scaled = teacher * torch.tensor([1.0, 7.0, 0.1, 3.0]).reshape(1, 4, 1)
    assert float(cosine_loss(student, scaled, MASK)) == pytest.approx(expected, rel=1e-12), (
        "a teacher's scale is not seen"
    )
    assert float(cosine_loss(teacher, teacher, MASK)) == pytest.approx(0, abs=1e-15)


def test_hidden_states_through_a_projection() -> None:
    student, _ = states(6)
    _, teacher = states(8, seed=1)
    torch.manual_seed(0)
    projection = nn.Linear(6, 8, dtype=torch.float64)
    weight, bias = projection.weight.detach().numpy(), projection.bias.detach().numpy()
    expected = np.mean(
        [
            ((weight @ s + bias - t) ** 2).mean()
            for s, t in zip(student[MASK].numpy(), teacher[MASK].numpy(), strict=True)
        ]
    )
    segments = torch.where(MASK, 0, -1)
    matching = Matching(hidden_weight=1.0, hidden_layers=[[1, 3]])
    batch = {"segment_ids": segments, "hidden.3": teacher}
    losses = matching.losses({"hidden.1": student}, batch, 2, projection, causal=True)
    assert float(losses["hidden"].detach()) == pytest.approx(expected, rel=1e-12)
    losses["hidden"].backward()
    gradient = np.zeros_like(weight)
    for s, t in zip(student[MASK].numpy(), teacher[MASK].numpy(), strict=True):
        gradient += 2 * np.outer(weight @ s + bias - t, s) / 8 / int(MASK.sum())
    np.testing.assert_allclose(projection.weight.grad.numpy(), gradient, rtol=1e-10)
    assert float(hidden_loss(teacher, teacher, MASK)) == 0


@pytest.mark.parametrize("causal", [True, False])
def test_attention_leaves_padding_out_of_the_mean(causal: bool) -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 1, 1, 1, 1]])
    pairs = visible_pairs(segments, causal=causal)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 6, 3, 6, generator=generator, dtype=torch.float64)
    total, count = 0.0, 0
    for b in range(2):
        for q in range(6):
            for k in range(6):
                alike = segments[b, q] == segments[b, k] and segments[b, q] >= 0
                if alike and (not causal or k <= q):
                    count += 1
                    total += float(((student[b, q, :, k] - teacher[b, q, :, k]) ** 2).mean())
    assert float(attention_loss(student, teacher, pairs)) == pytest.approx(total / count, rel=1e-12)
    spoiled = torch.where(pairs.unsqueeze(2), teacher, 1e6)
    assert float(attention_loss(student, spoiled, pairs)) == pytest.approx(total / count, rel=1e-12)


def test_queries_and_keys_stand_for_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 5, 4 + 2, 3, generator=generator, dtype=torch.float64)
    segments = torch.tensor([[0, 0, 0, 1, 1]])
    pairs = visible_pairs(segments, causal=True)
    matching = Matching(attention_weight=1.0, attention_layers=[[0, 7]])
    own = {"qk.0": student}
    by_qk = matching.losses(own, {"segment_ids": segments, "qk.7": teacher}, 4, causal=True)["attention"]
    maps = {"segment_ids": segments, "attention.7": attention_scores(teacher, 4, pairs)}
    assert float(by_qk) == pytest.approx(float(matching.losses(own, maps, 4, causal=True)["attention"]), rel=1e-12)
    # Query head h reads key head h // 2.
    expected = sum(
        float((student[0, q, h] @ student[0, k, 4 + h // 2] - teacher[0, q, h] @ teacher[0, k, 4 + h // 2]) ** 2)
        for q, k in torch.nonzero(pairs[0]).tolist()
        for h in range(4)
    ) / (4 * int(pairs.sum()))
    assert float(by_qk) == pytest.approx(expected, rel=1e-12)


def test_shares_of_a_step_add_up_to_its_mean() -> None:
    student, teacher = states()
    whole = cosine_loss(student, teacher, MASK)
    parts = [cosine_loss(student[b], teacher[b], MASK[b], positions=int(MASK.sum())) for b in range(2)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)
    assert float(cosine_loss(student, teacher, torch.zeros_like(MASK))) == 0, "no position, no loss"


def test_soft_cross_entropy_is_kl_and_the_teachers_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 30, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 30, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.full((6,), -100)
    targets = SparseTargets.from_logits(logits, k=29, knots=[0.5])
    for temperature in (1.0, 2.0):
        p = (logits / temperature).softmax(-1)
        # With 29 of 30 tokens kept the bucket is one token, and nothing is truncated.
        expected = -(p * (x / temperature).log_softmax(-1)).sum(-1).mean()
        (reference,) = torch.autograd.grad(temperature**2 * expected, x)
        soft = distillation_loss(x, targets, labels, temperature=temperature, divergence="soft_cross_entropy")
        assert float(soft.kd) == pytest.approx(float(expected.detach()), rel=1e-6)
        (gradient,) = torch.autograd.grad(soft.loss, x)
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-7)
        kl = distillation_loss(x, targets, labels, temperature=temperature)
        (of_kl,) = torch.autograd.grad(kl.loss, x)
        torch.testing.assert_close(gradient, of_kl, rtol=1e-5, atol=1e-7)
        hidden = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(30, 5, generator=generator, dtype=torch.float64)
        plain = distillation_loss(
            hidden @ weight.T, targets, labels, temperature=temperature, divergence="soft_cross_entropy"
        )
        fused = fused_distillation_loss(
            hidden, weight, targets, labels, temperature=temperature, divergence="soft_cross_entropy"
        )
        assert float(fused.loss) == pytest.approx(float(plain.loss), rel=1e-10)
        torch.testing.assert_close(
            torch.autograd.grad(fused.loss, hidden)[0],
            torch.autograd.grad(plain.loss, hidden)[0],
            rtol=1e-8,
            atol=1e-10,
        )


def test_what_cannot_be_matched_is_refused() -> None:
    class Config:
        num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 16

        def get_text_config(self) -> Config:
            return self

    signals = {
        "hidden.6": Signal("hidden.6", "direction", (16,)),
        "hidden.3": Signal("hidden.3", "int8", (24,)),
        "qk.5": Signal("qk.5", "int8", (24, 8), heads=12),
    }
    Matching(cosine_weight=1.0, cosine_layers=[[2, 6]]).check(Config(), signals, 32)
    for matching, message in (
        (Matching(hidden_weight=1.0, hidden_layers=[[2, 6]]), "kept as a direction"),
        (Matching(hidden_weight=1.0, hidden_layers=[[3, 3]]), "has no layer 3"),
        (Matching(attention_weight=1.0, attention_layers=[[1, 5]]), "12 heads and the student 4"),
        (Matching(attention_weight=1.0, attention_layers=[[1, 4]]), "does not hold attention.4 or qk.4"),
    ):
        with pytest.raises(RecipeError, match=message):
            matching.check(Config(), signals, 32)
    with pytest.raises(RecipeError, match="several widths"):
        both = {"hidden.6": signals["hidden.6"], "hidden.3": signals["hidden.3"], "hidden.2": Signal("", "int8", (32,))}
        Matching(hidden_layers=[[0, 3], [1, 2]]).projection(Config(), both)


def test_attention_with_a_window_shorter_than_the_rows_is_not_matched() -> None:
    """Pairs outside the window would be taught the 0 that stands for them."""
    config = build("gemma2").config
    assert config.sliding_window == 4 and config.layer_types[:2] == ["sliding_attention", "full_attention"]
    signals = {"attention.0": Signal("attention.0", "int8", (4, 16), heads=4)}
    windowed, full = (Matching(attention_weight=1.0, attention_layers=[[layer, 0]]) for layer in (0, 1))
    with pytest.raises(RecipeError, match=r"students\.s: .*layer 0 sees 4 tokens back and rows have 16"):
        windowed.check(config, signals, 16, "students.s: ")
    windowed.check(config, signals, 4)
    full.check(config, signals, 16)
