"""Heads that are no product of one weight: the model's own forward pass on given states, in chunks."""

from __future__ import annotations

import pytest
import torch
from logit_cache.base.errors import RecipeError
from logit_cache.distill.fused import fused_loss
from logit_cache.distill.loss import distillation_loss
from logit_cache.distill.loss_settings import LossSettings
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.probe import check_model
from logit_cache.models.rows import body_hidden
from logit_cache.targets.basis_fit import learn_basis
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.supports import Support

from tests.models.tiny import VOCABULARY, small_model


def test_the_head_of_a_mobilebert_is_its_own_forward_pass() -> None:
    """Its logits are of two matrices put together: loss and gradients are those of the whole logits."""
    model = small_model("mobilebert", "masked", noise=0.1)
    assert check_model(model).layout.name == "equal documents"  # a token sees its neighbours' embeddings
    layer = OutputLayer.of(model)
    assert not layer.is_linear and layer.weight.shape[0] == VOCABULARY
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 20), generator=generator)
    segments = torch.tensor([[0] * 9 + [1] * 11, [0] * 20])
    alone = [ids[:1, :9], ids[:1, 9:], ids[1:]]
    expected = torch.cat([model(document).logits[0] for document in alone])
    states = body_hidden(model, ids, segments)
    torch.testing.assert_close(layer.logits(states).flatten(0, 1), expected, rtol=1e-4, atol=1e-4)

    teacher = torch.randn(40, VOCABULARY, generator=generator)
    targets = SparseTargets.from_logits(teacher, k=8)
    labels = torch.randint(0, VOCABULARY, (40,), generator=generator)
    settings = LossSettings(2.0, 1.0, 0.5)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    chunked = fused_loss(states, layer, targets, labels, settings, chunk_size=7).loss
    whole = distillation_loss(expected, targets, labels, temperature=2.0, kd_weight=1.0, ce_weight=0.5).loss
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)
    own, other = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (chunked, whole))
    for a, b in zip(own, other, strict=True):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert "forward" not in vars(model.base_model), "the body has its own forward pass again"

    with pytest.raises(RecipeError, match=r"no product .*: set cache.tail_rank = 0"):
        learn_basis(states.flatten(0, 1).detach(), layer, Support("topk", k=8), 2, step=0.4)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("cohere", (0.0625, None)),
        ("granite", (1.0, None)),
        ("gemma2", (1.0, 30.0)),
        ("recurrent_gemma", (1.0, 30.0)),
        ("xlstm", (1.0, 30.0)),
        ("minicpm3", (1.0, None)),
    ],
)
def test_what_follows_the_output_layer_is_measured(family: str, form: tuple[float, float | None]) -> None:
    layer = OutputLayer.of(small_model(family))
    assert (layer.scale, layer.softcap) == form


def test_a_bias_beside_the_output_layer_is_found_and_trained_also_while_it_is_zero() -> None:
    model = small_model("esm", "masked")
    assert not model.lm_head.bias.any()
    assert OutputLayer.of(model).bias is model.lm_head.bias
